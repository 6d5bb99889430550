"""The output folder of a run: claimed at the start, filled atomically, never overwritten by accident.

config.yaml  metrics.jsonl  summary.json  bad_rows.jsonl  samples/  checkpoint-N/  README.md (the model card)
with an evaluation: report.html  scores.parquet  samples.png
and the result: pytorch_lora_weights.safetensors, or a diffusers pipeline
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dpo_fast.errors import BadInput
from dpo_fast.files import filled, remove_temporaries, write_text

REPORT = "bad_rows.jsonl"
SUMMARY = "summary.json"
# What a run writes before its first checkpoint, beside its report, its trackers' logs and temporary files.
_BEFORE_CHECKPOINTS = frozenset(("config.yaml", "metrics.jsonl", "validation.jsonl", "samples"))


def claim(folder: Path, *, overwrite: bool, resuming: bool) -> None:
    """Make sure that a run may use `folder`, without changing what is in it.

    Raises BadInput where it holds anything (but a report of bad rows) and neither `overwrite` nor `resuming` was asked
    for, and where it cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--output_dir {folder} is a file; name a folder")
        occupied = folder.is_dir() and any(entry.name != REPORT for entry in folder.iterdir())
        if occupied and not (overwrite or resuming):
            raise BadInput(
                f"--output_dir {folder} is not empty; choose another, go on with --resume_from_checkpoint latest,"
                " or replace it with --overwrite"
            )
        if occupied and overwrite and not (folder / "config.yaml").is_file():
            raise BadInput(f"--overwrite: {folder} does not look like a run (no config.yaml); empty it yourself")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise BadInput(
            f"--output_dir {folder} cannot be written ({error.strerror or error}); name a folder that can"
        ) from error


def is_unfinished(folder: Path, logging_dir: str) -> bool:
    """Whether `folder` holds a run that ended before its first checkpoint, and nothing else."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    ours = _BEFORE_CHECKPOINTS | {REPORT, Path(logging_dir).parts[0]}
    return "config.yaml" in names and all(name in ours or name.startswith(".") for name in names)


def is_finished(folder: Path, step: int, *, evaluated: bool, uploaded: bool) -> bool:
    """Whether the run in `folder` wrote all of its results at `step`, its last: with an evaluation or upload, that too.

    A summary that cannot be read is one that is not there.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return (
            summary["steps"] == step
            and (not evaluated or "win_rate" in summary)
            and (not uploaded or bool(summary["uploaded"]))
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def begin(folder: Path, *, overwrite: bool, config_yaml: str) -> None:
    """Now that everything is open: clear an earlier run away if asked, and write config.yaml."""
    remove_temporaries(folder)
    if overwrite:
        for entry in folder.iterdir():
            if entry.name != REPORT:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    write_text(folder / "config.yaml", config_yaml)


def release(folder: Path) -> None:
    """Remove a folder that nothing worth keeping was written to, after the run could not be opened."""
    with suppress(OSError):  # it is not there
        if [entry.name for entry in folder.iterdir()] == [REPORT] and not (folder / REPORT).stat().st_size:
            (folder / REPORT).unlink()
    with suppress(OSError):  # there is something in it
        folder.rmdir()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise BadInput when the disk under `folder` cannot hold `needed_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise BadInput(
            f"--output_dir {folder} has {free / 2**20:.1f} MiB free, but one checkpoint and the result need"
            f" {needed_bytes / 2**20:.1f} MiB; free some space or name another disk"
        )


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary_folder)` produce the result, then move it into `folder` entry by entry.

    A pipeline's model_index.json goes last, an earlier one first: what can be loaded is complete.
    """
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as name:
        with filled(Path(name)):
            write(Path(name))
        (folder / "model_index.json").unlink(missing_ok=True)
        for entry in sorted(Path(name).iterdir(), key=lambda e: e.name == "model_index.json"):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
