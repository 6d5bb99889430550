"""The output folder of a run: claimed at the start, filled atomically, never overwritten by accident.

config.yaml  metrics.jsonl  summary.json  bad_rows.jsonl  samples/  checkpoint-N/  README.md (the model card)
with an evaluation: report.html  scores.parquet  samples.png  evaluation/ (images and their scores)
and the result: pytorch_lora_weights.safetensors, or a diffusers pipeline
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dpo_fast.checksums import Damaged, check_text, file_digest, read_signed_json, signed_text
from dpo_fast.errors import BadInput
from dpo_fast.files import (
    LOCK,
    atomic_folder,
    check_writable,
    contents,
    delete,
    exists,
    free_bytes,
    is_inside,
    read_json,
    remove_folder,
    remove_temporaries,
    write_text,
)
from dpo_fast.output_folder import BAD_ROWS, is_free, not_writable, refuse_file
from dpo_fast.votes.records import FILE as VOTES

SUMMARY = "summary.json"
# What a run writes before its first checkpoint, besides its report, its trackers' logs and temporary files.
_BEFORE_CHECKPOINTS = frozenset(("config.yaml", "metrics.jsonl", "validation.jsonl", "samples"))
PUBLISHING = ".publishing"  # a complete result that is being moved into the folder


def claim(folder: Path, *, overwrite: bool, resuming: bool) -> None:
    """Check that a run may use `folder`, which it holds, and delete what killed processes left half-written in it.

    Raises BadInput like `check_claim`.
    """
    try:
        occupied = check_claim(folder, overwrite=overwrite, resuming=resuming)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        if not occupied or (folder / "config.yaml").is_file():  # ours: a mistyped folder is left alone
            finish_publishing(folder)
            remove_temporaries(folder, deep=True)
    except OSError as error:
        raise not_writable(folder, error) from error


def check_claim(folder: Path, *, overwrite: bool, resuming: bool) -> bool:
    """Return whether `folder` holds anything; nothing is written.

    Raises BadInput if the folder is not free (`is_free`) and neither `overwrite` nor `resuming` is set, if `overwrite`
    is set but the folder is not a run's or holds people's votes, and if it cannot be written.
    """
    try:
        refuse_file(folder)
        occupied = not is_free(folder)
        if occupied and not (overwrite or resuming):
            raise BadInput(
                f"--output_dir {folder} is not empty; choose another, go on with --resume_from_checkpoint latest,"
                " or replace it with --overwrite"
            )
        if occupied and overwrite and not (folder / "config.yaml").is_file():
            raise BadInput(f"--overwrite: {folder} does not look like a run (no config.yaml); empty it yourself")
        of_votes = (inner for inner in (folder, folder / "evaluation") if overwrite and exists(inner / VOTES))
        if voted := next(of_votes, None):
            raise BadInput(f"--overwrite: {voted} holds people's votes ({VOTES}): move that file away first")
        check_writable(folder)
    except OSError as error:
        raise not_writable(folder, error) from error
    return occupied


def check_unfinished(folder: Path, logging_dir: str, kept: frozenset[str]) -> None:
    """Raise BadInput if `folder` holds more than `kept` entries and a run that ended before its first checkpoint."""
    names = {entry.name for entry in contents(folder)} - kept - {BAD_ROWS}
    if names and not ("config.yaml" in names and names <= _of_unfinished(logging_dir)):
        raise BadInput(
            f"--resume_from_checkpoint auto: --output_dir {folder} holds no checkpoint and is not empty; choose"
            " another, or replace the run that is there with --overwrite"
        )


def clear_unfinished(folder: Path, logging_dir: str) -> None:
    """Delete what a run that ended before its first checkpoint left, except config.yaml, which `begin` replaces."""
    for name in _of_unfinished(logging_dir) - {"config.yaml"}:
        delete(folder / name)


def kept_inside(folder: Path, *places: Path | str | None) -> frozenset[str]:
    """Return the names of the top-level entries of `folder` that are or contain one of `places` (caches)."""
    inside = (Path(os.path.abspath(place)) for place in places if place)
    root = Path(os.path.abspath(folder))
    return frozenset(path.relative_to(root).parts[0] for path in inside if root in path.parents)


def is_finished(folder: Path, step: int, *, evaluated: bool, uploaded: bool) -> bool:
    """Whether the run in `folder` wrote all of its results at `step`, its last, including any evaluation or upload.

    A summary that cannot be read counts as missing.
    """
    try:
        summary = read_json(folder / SUMMARY)
        return (
            summary["steps"] == step
            and (not evaluated or "win_rate" in summary)
            and (not uploaded or bool(summary["uploaded"]))
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_summary(folder: Path) -> dict[str, object]:
    """Return the content of a run's summary.json. Raises Damaged."""
    return read_signed_json(
        folder / SUMMARY, "the training command with --resume_from_checkpoint latest writes it again"
    )


def begin(folder: Path, *, overwrite: bool, config_yaml: str, kept: frozenset[str] = frozenset()) -> None:
    """Once everything is open, delete an earlier run if asked, except `kept` entries, and write config.yaml.

    The earlier config.yaml is replaced last, so that after a kill at any moment the folder still looks like a run.
    """
    if overwrite:
        for entry in folder.iterdir():
            if entry.name not in kept | {BAD_ROWS, "config.yaml"} and not entry.name.startswith(LOCK):
                delete(entry)
    write_text(folder / "config.yaml", signed_text(config_yaml))


def release(folder: Path) -> None:
    """Remove the folder of a run that could not be opened, unless something worth keeping was written to it."""
    with suppress(OSError):  # the folder does not exist
        if not is_free(folder) or ((folder / BAD_ROWS).exists() and (folder / BAD_ROWS).stat().st_size):
            return
        remove_temporaries(folder)
        (folder / BAD_ROWS).unlink(missing_ok=True)
    with suppress(OSError):  # the folder is not empty
        folder.rmdir()


def check_space(folder: Path, needed_bytes: int, what: str = "one checkpoint and the result") -> None:
    """Raise BadInput when the disk under `folder`, which need not exist, cannot hold `needed_bytes` more."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise BadInput(
            f"--output_dir {folder} has {free / 2**20:.1f} MiB free, but {what} need"
            f" {needed_bytes / 2**20:.1f} MiB; free some space or name another disk"
        )


def publish(folder: Path, write: Callable[[Path], None]) -> dict[str, str]:
    """Let `write(temporary_folder)` produce the result, then move it into `folder` entry by entry.

    Returns the checksums of its files by their paths in `folder`; summary.json keeps them for `check_result`.
    An earlier model_index.json is deleted first and the new one moved last, so that a pipeline that loads is complete.
    After a kill

    - while the result is being written: the earlier result is intact, and `claim` deletes the partial one;
    - between its renaming to PUBLISHING and the move of its last entry: there may be no result that loads, and `claim`
      moves the remaining entries in the same order (`finish_publishing`).
    """
    with atomic_folder(folder / PUBLISHING) as temporary:
        write(temporary)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        digests = {file.relative_to(temporary).as_posix(): file_digest(file) for file in files}
    finish_publishing(folder)
    return digests


def finish_publishing(folder: Path) -> None:
    """Move what is left of a result under PUBLISHING into `folder`, if there is any. Raises OSError."""
    if not (folder / PUBLISHING).is_dir():
        return
    entries = sorted((folder / PUBLISHING).iterdir(), key=lambda entry: entry.name == "model_index.json")
    if entries:
        (folder / "model_index.json").unlink(missing_ok=True)
    for entry in entries:
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            remove_folder(target)
        elif entry.is_dir():
            target.unlink(missing_ok=True)
        os.replace(entry, target)
    (folder / PUBLISHING).rmdir()


def _of_unfinished(logging_dir: str) -> frozenset[str]:
    return _BEFORE_CHECKPOINTS | set(Path(logging_dir).parts[:1])


def check_config(folder: Path) -> None:
    """Compare a run's config.yaml with its checksum, if it has one. Raises Damaged."""
    check_text(folder / "config.yaml", "put it back from a copy; if the change is meant, delete its first line")


def check_result(folder: Path) -> None:
    """Compare a run's config.yaml, summary.json and result with their checksums, if they have any.

    Raises Damaged for a file that is not what the run wrote.
    """
    check_config(folder)
    path = folder / SUMMARY
    if not path.is_file():
        return
    summary = read_signed_json(path, "put it back from a copy, or delete it, and the result is used unchecked")
    result = summary.get("result", {})
    if not isinstance(result, dict) or not all(map(is_inside, result)):
        raise Damaged(f"{path} is damaged (it lists no files of this folder as result): put it back from a copy")
    for name, expected in result.items():
        if (folder / name).is_file() and file_digest(folder / name) != expected:
            raise Damaged(
                f"{folder / name} is not what the run wrote (its checksum is not the one in {path.name}): it is"
                " damaged, or the run was stopped before it had finished; the training command with"
                f" --resume_from_checkpoint latest writes it again, or, if the change is meant, delete {path.name}"
            )
