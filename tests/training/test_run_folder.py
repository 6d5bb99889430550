"""The output folder: claimed without harm, cleared only when asked, filled entry by entry."""

import errno
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dpo_fast import output_folder
from dpo_fast.errors import BadInput
from dpo_fast.training import run_folder
from tests.helpers.kills import killed_before_each_call


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def a_run(folder: Path) -> Path:
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "checkpoint-1" / "state.json").touch()
    (folder / output_folder.BAD_ROWS).write_text("{}\n")
    return folder


@pytest.mark.parametrize("kind", ["missing", "empty", "only a report", "what a kill leaves"])
def test_a_folder_without_a_run_is_free(tmp_path, kind):
    folder = tmp_path / "runs" / "new"
    if kind != "missing":
        folder.mkdir(parents=True)
    if kind in ("only a report", "what a kill leaves"):
        (folder / output_folder.BAD_ROWS).touch()
    if kind == "what a kill leaves":
        for name in (".tmp-abcdefgh-config.yaml", ".lock", ".lock.lease", ".lock.lease.break.1.abc", ".nfs0001"):
            (folder / name).touch()
        (folder / ".tmp-abcdefgh-checkpoint-1").mkdir()
        (folder / ".tmp-abcdefgh-checkpoint-1" / "state.json").touch()
    run_folder.claim(folder, overwrite=False, resuming=False)
    assert {name for name in entries(folder) if not name.startswith((".lock", ".nfs"))} <= {output_folder.BAD_ROWS}


def test_a_folder_with_a_run_is_not(tmp_path):
    folder = a_run(tmp_path / "run")
    before = entries(folder)
    with pytest.raises(BadInput, match=r"is not empty; .* --overwrite"):
        run_folder.claim(folder, overwrite=False, resuming=False)
    run_folder.claim(folder, overwrite=True, resuming=False)
    run_folder.claim(folder, overwrite=False, resuming=True)
    assert entries(folder) == before


def test_what_is_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BadInput, match="does not look like a run"):
        run_folder.claim(tmp_path, overwrite=True, resuming=False)
    with pytest.raises(BadInput, match="is a file; name a folder"):
        run_folder.claim(tmp_path / "thesis.tex", overwrite=True, resuming=False)
    with pytest.raises(BadInput, match="cannot be written"):
        run_folder.claim(tmp_path / "thesis.tex" / "run", overwrite=False, resuming=False)
    assert entries(tmp_path) == {"thesis.tex"}


@pytest.mark.parametrize("inner", ["", "evaluation"])
def test_votes_are_never_overwritten(tmp_path, inner):
    folder = a_run(tmp_path / "run")
    file = folder / inner / "votes.sqlite"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"votes")
    with pytest.raises(BadInput, match=r"--overwrite: .* holds people's votes \(votes.sqlite\): move that file away"):
        run_folder.claim(folder, overwrite=True, resuming=False)
    run_folder.claim(folder, overwrite=False, resuming=True)
    file.rename(tmp_path / "votes.sqlite")
    run_folder.claim(folder, overwrite=True, resuming=False)


def test_beginning_keeps_or_clears_the_earlier_run(tmp_path):
    folder = a_run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (folder / "link").symlink_to(outside)
    (folder / ".lock").touch()
    run_folder.begin(folder, overwrite=False, config_yaml="seed: 2\n")
    assert entries(folder) == {
        *("config.yaml", "checkpoint-1", "checkpoint-1/state.json"),
        *(output_folder.BAD_ROWS, "link", ".lock"),
    }
    checksum, *written = (folder / "config.yaml").read_text().splitlines()
    assert checksum.startswith("# checksum") and written == ["seed: 2"]
    run_folder.begin(folder, overwrite=True, config_yaml="seed: 3\n")
    assert entries(folder) == {"config.yaml", output_folder.BAD_ROWS, ".lock"}
    assert (folder / "config.yaml").read_text().splitlines()[1:] == ["seed: 3"]
    assert entries(outside) == {"kept"}


def test_releasing_removes_only_what_is_worth_nothing(tmp_path):
    run_folder.release(tmp_path / "missing")
    for name, report in (("empty", None), ("empty report", ""), ("report", "{}\n")):
        (tmp_path / name).mkdir()
        if report is not None:
            (tmp_path / name / output_folder.BAD_ROWS).write_text(report)
        run_folder.release(tmp_path / name)
    a_run(tmp_path / "run")
    before = entries(tmp_path / "run")
    run_folder.release(tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"report", "run"} and entries(tmp_path / "run") == before


def test_space_is_checked_in_bytes(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 3 * 2**20))
    run_folder.check_space(tmp_path, 3 * 2**20)
    with pytest.raises(BadInput, match=r"3\.0 MiB free, but .* 5\.0 MiB"):
        run_folder.check_space(tmp_path, 5 * 2**20)


def test_a_result_is_moved_in_with_its_index_last(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "run")
    (folder / "unet").mkdir()
    (folder / "unet" / "stale").touch()
    (folder / "model_index.json").write_text("old")
    moved = []
    replace = run_folder.os.replace

    def watched(source, target):
        if target.name != run_folder.PUBLISHING:
            assert not (folder / "model_index.json").exists()
            moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr(run_folder.os, "replace", watched)

    def write(temporary: Path) -> None:
        for name in ("model_index.json", "unet/weights", "vae/weights"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text("new")
            (temporary / name).chmod(0o600)

    run_folder.publish(folder, write)
    assert set(moved[:-1]) == {"unet", "vae"} and moved[-1] == "model_index.json"
    assert (folder / "model_index.json").read_text() == "new"
    assert stat.S_IMODE((folder / "unet" / "weights").stat().st_mode) & 0o044
    assert {path.name for path in folder.iterdir()} == {
        *("model_index.json", "unet", "vae"),
        *("config.yaml", "checkpoint-1", output_folder.BAD_ROWS),
    }
    assert entries(folder / "unet") == {"weights"}


@pytest.mark.faults
def test_a_result_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    folder = a_run(tmp_path / "run")
    (folder / "model_index.json").touch()
    before = entries(folder)

    def write(temporary: Path) -> None:
        (temporary / "model_index.json").touch()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError) as caught:
        run_folder.publish(folder, write)
    assert caught.value.errno == errno.ENOSPC and entries(folder) == before


@pytest.mark.faults
@pytest.mark.parametrize("pipeline", [True, False])
def test_a_result_survives_a_kill_at_any_moment(tmp_path, pipeline):
    """What loads is whole, and after the next claim there is a whole result: the earlier one or the new one."""
    folder = tmp_path / "run"
    names = ("model_index.json", "unet/weights", "vae/weights") if pipeline else ("pytorch_lora_weights.safetensors",)

    def write(to: Path, text: str) -> None:
        for name in names:
            (to / name).parent.mkdir(exist_ok=True)
            (to / name).write_text(text)

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        write(a_run(folder), "old")

    def texts() -> set[str]:
        return {(folder / name).read_text() for name in names}

    for _ in killed_before_each_call(prepare, lambda: run_folder.publish(folder, lambda to: write(to, "new"))):
        if (folder / names[0]).exists():
            assert texts() in ({"old"}, {"new"})
        run_folder.claim(folder, overwrite=False, resuming=True)
        assert texts() in ({"old"}, {"new"})
        kept = {name.split("/")[0] for name in names} | {"config.yaml", "checkpoint-1", output_folder.BAD_ROWS}
        assert {path.name for path in folder.iterdir()} == kept
    assert texts() == {"new"}


@pytest.mark.faults
def test_clearing_an_earlier_run_away_can_be_killed_and_repeated(tmp_path):
    folder = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        a_run(folder)

    work = lambda: run_folder.begin(folder, overwrite=True, config_yaml="seed: 2\n")
    for _ in killed_before_each_call(prepare, work):
        run_folder.claim(folder, overwrite=True, resuming=False)
        work()
        assert entries(folder) == {"config.yaml", output_folder.BAD_ROWS}


def test_a_run_that_is_written_is_refused_to_others_with_its_holder(tmp_path):
    with output_folder.hold(tmp_path / "run"):
        run_folder.claim(tmp_path / "run", overwrite=False, resuming=False)
        with pytest.raises(BadInput, match=r"run is being written by process \d+ on .* --output_dir"):
            output_folder.hold(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file; name a folder"):
        output_folder.hold(tmp_path / "file")
    with pytest.raises(BadInput, match="cannot be written"):
        output_folder.hold(tmp_path / "file" / "run")


def test_releasing_within_the_hold_leaves_nothing(tmp_path):
    with output_folder.hold(tmp_path / "run"):
        (tmp_path / "run" / output_folder.BAD_ROWS).touch()
        (tmp_path / "run" / ".tmp-abcdefgh-config.yaml").touch()
        run_folder.release(tmp_path / "run")
    assert entries(tmp_path) == set()
