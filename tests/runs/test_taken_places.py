"""Every command and the places that it writes and reads: one writer a folder, errors of the disk in one line, and no
wait for what is no file."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dpo_fast import cache, output_folder, relabel, scorers, sweep
from dpo_fast.command_line import parse
from dpo_fast.errors import BadInput
from dpo_fast.evaluate import main as evaluate
from dpo_fast.evaluation.prompts import read_lines, read_prompts
from dpo_fast.generate import main as generate
from dpo_fast.locks import hold_file
from dpo_fast.models import merge_lora
from dpo_fast.train import main as train
from dpo_fast.training import checkpoint
from dpo_fast.training.metrics import MetricsFile
from dpo_fast.training.trainer import Trainer
from tests.helpers import fake_scorers
from tests.helpers.disks import failing
from tests.helpers.pairs import open_pairs
from tests.helpers.pipelines import load_model
from tests.helpers.runs import flags_for


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_refused(main: Callable[[list[str]], int], flags: list, capfd) -> str:
    """The one line that is said."""
    capfd.readouterr()
    assert main([str(flag) for flag in flags]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("dpo_fast: error:"))
    return line


def test_a_second_run_is_refused_and_the_first_goes_on(sdxl_path, pairs, tmp_path, capfd, monkeypatch):
    out, finish, refused = tmp_path / "out", Trainer.finish, []
    flags = flags_for(sdxl_path, pairs, out)

    def meanwhile(self) -> None:
        for more in ([], ["--overwrite"], ["--resume_from_checkpoint", "latest"]):
            before = entries(out)
            refused.append(assert_refused(train, [*flags, *more], capfd))
            assert entries(out) == before
        finish(self)

    monkeypatch.setattr(Trainer, "finish", meanwhile)
    assert train(flags) == 0
    assert len(refused) == 3
    assert all(f"{out} is being written by process {os.getpid()} on " in line for line in refused)
    assert "pytorch_lora_weights.safetensors" in entries(out) and ".lock" not in entries(out)


def test_a_run_holds_its_folder_through_its_evaluation(sdxl_path, pairs, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []

    def evaluate_run(config, prompts, ranks) -> None:
        with pytest.raises(BadInput, match="is being written by"):
            output_folder.hold(out)
        seen.append(entries(out))
        raise BadInput("that is all")

    monkeypatch.setattr("dpo_fast.api.training.check_request", lambda config, ranks: [])
    monkeypatch.setattr("dpo_fast.api.training.evaluate_run", evaluate_run)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat on a mat\n")
    flags = flags_for(sdxl_path, pairs, out, "--eval_scorers", "clip", "--eval_prompts", prompts)
    assert train(flags) == 2
    assert ".lock" in seen[0] and ".lock" not in entries(out)


@pytest.mark.faults
def test_what_a_kill_leaves_before_the_first_configuration_blocks_no_run(sdxl_path, pairs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".tmp-abcdefgh-config.yaml", ".tmp-abcdefgh-bad_rows.jsonl", ".lock", "bad_rows.jsonl"):
        (out / name).touch()
    assert train(flags_for(sdxl_path, pairs, out)) == 0
    assert not [name for name in entries(out) if name.startswith(".")]


def test_the_other_commands_are_refused_where_another_process_writes(sdxl_path, pairs, tmp_path, capfd):
    out = tmp_path / "out"
    images = ["--policy", sdxl_path, "--baseline", sdxl_path, "--prompts", "a cat on a mat", "--output_dir", out]
    with output_folder.hold(out):
        for command, flags in [
            (generate, images),
            (evaluate, [*images, "--scorers", "clip"]),
            (sweep.main, flags_for(sdxl_path, pairs, out, "--beta_dpo", "1,2")),
        ]:
            assert f"{out} is being written by process {os.getpid()} on " in assert_refused(command, flags, capfd)
            assert entries(out) == {".lock"}
    output = tmp_path / "labelled.parquet"
    with hold_file(output, otherwise="x"):
        line = assert_refused(relabel.main, ["--dataset_name", pairs, "--scorer", "clip", "--output", output], capfd)
        assert f"{output} is being written by process " in line and "another --output" in line


FAULTS = [
    # command, call, end of the path, errno
    ("train", "open", ".lock", errno.EROFS),
    ("train", "os.mkdir", "/out", errno.EPERM),
    ("train", "os.listdir", "/out", errno.ESTALE),
    ("train", "open", "-config.yaml", errno.EMFILE),
    ("train", "fsync", "-config.yaml", errno.EIO),
    ("train", "open", "metrics.jsonl", errno.EISDIR),
    ("train", "fsync", "weights.safetensors", errno.ESTALE),
    ("train", "os.rename", "/checkpoint-4", errno.EBUSY),
    ("train", "os.rename", "/pytorch_lora_weights.safetensors", errno.ETXTBSY),
    ("train", "os.rename", "/summary.json", errno.EDQUOT),
    ("train", "os.rename", "/README.md", errno.ENAMETOOLONG),
    ("cache", "open", ".part", errno.EMFILE),
    ("cache", "fsync", ".part", errno.EIO),
    ("cache", "os.rename", ".bin", errno.EBUSY),
    ("cache", "os.rename", "/manifest.json", errno.ESTALE),
    ("generate", "os.mkdir", "/MODEL", errno.EPERM),
    ("generate", "os.rename", ".png", errno.ESTALE),
    ("generate", "fsync", "-images.json", errno.EIO),
    ("sweep", "os.rename", "/sweep.json", errno.EIO),
    ("relabel", "os.rename", "/l.parquet", errno.ENOSPC),
    ("relabel", "fsync", ".part", errno.EIO),
]


@pytest.mark.faults
@pytest.mark.parametrize("command, call, end, number", FAULTS)
def test_an_error_of_the_disk_is_one_line_with_the_path(
    sd15_path, pairs, tmp_path, capfd, monkeypatch, command, call, end, number
):
    monkeypatch.setattr(scorers, "MODULE_OF", {"red": "fake"})
    monkeypatch.setattr(scorers, "load_scorer", lambda name, device, **_: fake_scorers.load(name, tmp_path / "log"))
    for name in ("facts", "provenance"):
        monkeypatch.setattr(scorers, name, lambda name, device, **_: {"scorer": name})
    out, run = tmp_path / "out", flags_for(sd15_path, pairs, tmp_path / "out", "--latent_cache_dir", tmp_path / "cache")
    images = ["--policy", sd15_path, "--baseline", "none", "--prompts", "a red hat", "--output_dir", out]
    main, flags = {
        "train": (train, run),
        "cache": (cache.main, ["build", *run]),
        "generate": (generate, [*images, "--sampling_steps", 2, "--resolution", 64]),
        "sweep": (sweep.main, [*run, "--beta_dpo", "1,2"]),
        "relabel": (relabel.main, ["--dataset_name", pairs, "--scorer", "red", "--output", tmp_path / "l.parquet"]),
    }[command]
    with failing(call, end.replace("MODEL", sd15_path.name), number):
        line = assert_refused(main, flags, capfd)
    assert os.strerror(number) in line and str(tmp_path) in line
    assert not list(tmp_path.rglob(".tmp-*"))


@contextmanager
def fifo(path: Path) -> Iterator[Path]:
    """A FIFO into which nobody writes; whoever opens it all the same reads nothing after 5 seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)

    def release() -> None:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        except OSError:
            pass

    timer = threading.Timer(5, release)
    timer.start()
    yield path
    timer.cancel()


def model(path: Path, **more: object):
    return load_model(path, dtype=torch.float32, device="cpu", **more)


READERS = {
    "a configuration": ("c.yaml", lambda path, sdxl: parse(["--config", str(path)])),
    "prompts": ("prompts.txt", lambda path, sdxl: read_lines(path, "--eval_prompts")),
    "a table of prompts": ("p.tsv", lambda path, sdxl: read_prompts((f"partiprompts={path}",))),
    "a data file": ("pairs.parquet", lambda path, sdxl: open_pairs(path)),
    "a data file in a folder": ("data/train-0.parquet", lambda path, sdxl: open_pairs(path.parent)),
    "lines in a folder": ("data/train.jsonl", lambda path, sdxl: open_pairs(path.parent)),
    "a model": ("model.safetensors", lambda path, sdxl: model(path)),
    "a VAE": ("vae.safetensors", lambda path, sdxl: model(sdxl, vae_path=path)),
    "a VAE in a folder": ("vae/config.json", lambda path, sdxl: model(sdxl, vae_path=path.parent)),
    "a LoRA": ("lora.safetensors", lambda path, sdxl: merge_lora(model(sdxl).pipeline, path)),
    "a LoRA in a folder": ("lora/a.safetensors", lambda path, sdxl: merge_lora(model(sdxl).pipeline, path.parent)),
    "a checkpoint": ("checkpoint-1/state.json", lambda path, sdxl: checkpoint.load(path.parent)),
    "metrics": ("metrics.jsonl", lambda path, sdxl: MetricsFile(path)),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", READERS)
def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(sdxl_path, tmp_path, kind):
    name, read = READERS[kind]
    with fifo(tmp_path / name) as path:
        with pytest.raises(BadInput) as refused:
            read(path, sdxl_path)
        assert str(tmp_path / Path(name).parts[0]) in str(refused.value)
        assert "FIFO" in str(refused.value) or "is no file" in str(refused.value)
