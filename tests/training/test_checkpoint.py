"""Checkpoints: whole or refused, found by name, pruned from the oldest, compared by what changes the result."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dpo_fast.config import TrainConfig, public
from dpo_fast.errors import BadInput
from dpo_fast.training import checkpoint

FILES = {
    "weights": {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(3)},
    "optimizer": {"a|exp_avg": torch.arange(12.0).view(4, 3)},
    "counters": {"loss_scale": torch.tensor(2.0)},
}
STATE = {"step": 7, "config": {"seed": 1}}


def test_what_is_saved_is_loaded(tmp_path):
    folder = checkpoint.save(tmp_path / "run", 7, FILES, STATE)
    assert folder == tmp_path / "run" / "checkpoint-7"
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.safetensors" for name in FILES), "state.json"}
    files, state = checkpoint.load(folder)
    assert state == STATE and files.keys() == FILES.keys()
    for name, tensors in FILES.items():
        assert files[name].keys() == tensors.keys()
        assert all(torch.equal(files[name][k], v) and files[name][k].dtype == v.dtype for k, v in tensors.items())


def test_any_layout_of_tensors_is_saved(tmp_path):
    grid = torch.randn(2, 3, 4, 5)
    tensors = {
        "channels last": grid.to(memory_format=torch.channels_last),
        "transposed": grid.mT,
        "shared": grid,
        "part of shared": grid[0],
        "trained": torch.nn.Parameter(grid),
    }
    files, _ = checkpoint.load(checkpoint.save(tmp_path, 1, {"weights": tensors}, {}))
    assert all(torch.equal(files["weights"][name], tensor) for name, tensor in tensors.items())


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def strip(file: Path) -> None:
    state = json.loads(file.read_text())
    del state["digest"]
    file.write_text(json.dumps(state))


DAMAGE = {
    "no folder": shutil.rmtree,
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: (folder / "state.json").write_text('{"step": 7, '),
    "another state": lambda folder: (folder / "state.json").write_text("[]"),
    "a state that names no files": lambda folder: (folder / "state.json").write_text('{"step": 7}'),
    "no text": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"),
    "a missing file": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "half a file": lambda folder: (folder / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "a bit of the state": lambda folder: flip(folder / "state.json", 3),
    "a bit of the first number": lambda folder: flip(folder / "weights.safetensors", -40),
    "a bit of the last number": lambda folder: flip(folder / "weights.safetensors", -1),
    "a bit of a scale": lambda folder: flip(folder / "counters.safetensors", -2),
    "files of each other": lambda folder: shutil.copy(folder / "weights.safetensors", folder / "optimizer.safetensors"),
    "a state without digest": lambda folder: strip(folder / "state.json"),
    "an empty file": lambda folder: (folder / "weights.safetensors").write_bytes(b""),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(tmp_path, name):
    folder = checkpoint.save(tmp_path, 7, FILES, STATE)
    DAMAGE[name](folder)
    with pytest.raises(BadInput, match="is not a whole checkpoint") as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)


def test_one_of_an_earlier_version_is_loaded_and_said_to_be_unchecked(tmp_path, caplog):
    folder = checkpoint.save(tmp_path, 7, FILES, STATE)
    (folder / "state.json").write_text(json.dumps({**STATE, "files": list(FILES)}))
    files, state = checkpoint.load(folder)
    assert state == STATE and torch.equal(files["weights"]["a"], FILES["weights"]["a"])
    assert f"{folder} is of an earlier version, without checksums" in caplog.text
    caplog.clear()
    checkpoint.load(checkpoint.save(tmp_path, 8, FILES, STATE))
    assert caplog.text == ""


def test_the_counters_of_an_earlier_version_are_found_among_the_optimizers_tensors(tmp_path):
    optimizer = FILES["optimizer"] | {"|loss_scale": torch.tensor(2.0), "|kl": torch.tensor(0.5)}
    folder = checkpoint.save(tmp_path, 7, {"weights": FILES["weights"], "optimizer": optimizer}, STATE)
    files, _ = checkpoint.load(folder)
    assert files["counters"] == {"loss_scale": torch.tensor(2.0), "kl": torch.tensor(0.5)}
    assert files["optimizer"].keys() == FILES["optimizer"].keys()


@pytest.mark.faults
def test_a_full_disk_is_an_oserror_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    earlier = checkpoint.save(tmp_path, 7, FILES, STATE)

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (7, 8):
        with pytest.raises(OSError, match="No space left") as caught:
            checkpoint.save(tmp_path, step, FILES, STATE)
        assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [earlier]
    assert checkpoint.load(earlier)[1] == STATE


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="holds no checkpoint-N"):
        checkpoint.find(tmp_path, "latest")
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-2", "checkpoint-x", ".tmp-1-checkpoint-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    assert [path.name for path in checkpoint.all_of(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert checkpoint.find(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert checkpoint.find(tmp_path, "checkpoint-2") == tmp_path / "checkpoint-2"
    assert checkpoint.find(tmp_path / "elsewhere", str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    with pytest.raises(BadInput, match="checkpoint-3: no such folder"):
        checkpoint.find(tmp_path, "checkpoint-3")


@pytest.mark.parametrize("keep, left", [(None, {1, 2, 10}), (2, {2, 10}), (1, {10}), (5, {1, 2, 10})])
def test_the_oldest_are_pruned(tmp_path, keep, left):
    for step in (1, 2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state.json").touch()
    checkpoint.prune(tmp_path, keep)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_differences_that_change_the_result_are_shown():
    saved = public(TrainConfig(beta_dpo=5000.0, max_train_steps=10, log_every=1))
    now = public(TrainConfig(beta_dpo=2000.0, max_train_steps=20, log_every=2, output_dir=Path("elsewhere")))
    assert checkpoint.differences(saved, now) == ["beta_dpo: 5000.0 -> 2000.0"]
    assert checkpoint.differences(saved, saved) == []
    assert checkpoint.differences({}, {"new": 1}) == ["new: None -> 1"]
    assert checkpoint.differences({"old": 1}, {}) == ["old: 1 -> None"]
    newer = {name: getattr(TrainConfig(), name) for name in ("label_smoothing", "hflip", "time_ids")}
    assert checkpoint.differences({}, newer) == []  # flags that came later, at their defaults
    assert checkpoint.differences({}, newer | {"hflip": True}) == ["hflip: False -> True"]
    assert checkpoint.differences({}, {"scorer_models": "elsewhere"}) == []  # it changes no weight


def test_what_may_change_are_settings():
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= checkpoint.MAY_CHANGE
