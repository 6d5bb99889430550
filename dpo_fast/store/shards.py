"""The files of a store: complete shards, the log of the one being written, and the lock for writing."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dpo_fast import locks
from dpo_fast.checksums import Damaged, digest, parse_signed
from dpo_fast.errors import DISK_ERRORS, FORBIDDEN, BadInput, printable, remedy
from dpo_fast.files import parse_json, read_bytes, read_json
from dpo_fast.store.recipe import DEFAULT_REMEDIES, KEY_BYTES, Recipe, Remedies

logger = logging.getLogger(__name__)

SMALL_SHARD = 1 << 20  # bytes: up to this size a shard is read into memory, not mapped
_SHARD = re.compile(r"shard-(\d+)-(\d+)\.(json|bin|part|log)$")


@dataclass
class Shard:
    """One complete shard: in memory up to SMALL_SHARD, memory-mapped above."""

    path: Path  # of the .bin
    key_bytes: np.ndarray  # uint8 [n, KEY_BYTES]
    checksums: np.ndarray  # uint64 [n], xxh3_64 of each record
    meta: list[Any]  # of each record: a flat list, a dict, or None
    sha256: str
    records: np.ndarray  # uint8 [n, record_bytes]

    @property
    def keys(self) -> list[bytes]:
        whole = self.key_bytes.tobytes()
        return [whole[i : i + KEY_BYTES] for i in range(0, len(whole), KEY_BYTES)]


def shard_files(folder: Path) -> list[tuple[int, int, str]]:
    """(rank, number, suffix) of every file of a shard in `folder`."""
    matches = (_SHARD.match(name) for name in (os.listdir(folder) if folder.is_dir() else []))
    return [(int(m[1]), int(m[2]), m[3]) for m in matches if m]


def has_store(root: Path, recipe: Recipe) -> bool:
    """Whether the folder of a recipe exists in `root`."""
    return (root / recipe.folder_name).is_dir()


def shard_indices(folder: Path) -> list[Path]:
    """The JSON files of the complete shards, in order of rank and number."""
    found = sorted((rank, number) for rank, number, kind in shard_files(folder) if kind == "json")
    return [folder / f"shard-{rank}-{number:05d}.json" for rank, number in found]


def read_shard(path: Path, recipe: Recipe) -> Shard:
    """Open the shard whose index is `path`, after checking the index and the size of the .bin.

    Raises Damaged if either is wrong, BadInput for a shard of another recipe, and OSError if the disk cannot read the
    files, which is no reason to delete them.
    """
    bin_path = path.with_suffix(".bin")
    try:
        body = parse_signed(read_bytes(path))
        keys = np.frombuffer(bytes.fromhex("".join(body["keys"])), np.uint8).reshape(-1, KEY_BYTES)
        checksums = np.array([int(checksum, 16) for checksum in body["checksums"]], np.uint64)
        shared: dict[tuple, list] = {}  # sizes repeat: share their lists, or millions of them take much memory
        meta = [shared.setdefault(tuple(m), m) if isinstance(m, list) else m for m in body["meta"]]
        sha256, of = body["sha256"], (body["recipe"], body["record_bytes"])
        if not len(keys) == len(checksums) == len(meta):
            raise ValueError(f"it has {len(keys)} keys, {len(checksums)} checksums and {len(meta)} notes")
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise Damaged(f"{path} cannot be read as the index of a shard ({error}); {recipe.remedies.lost}") from error
    if of != (recipe.digest, recipe.record_bytes):
        raise BadInput(
            f"{path} belongs to recipe {of[0]} with records of {of[1]} bytes, not to {recipe.digest} with"
            f" {recipe.record_bytes}: move it back to where it came from, or delete it with its .bin"
        )
    size = bin_path.stat().st_size if bin_path.exists() else 0
    if size != len(keys) * recipe.record_bytes:
        raise Damaged(
            f"{bin_path} has {size} bytes, its index says {len(keys)} records of {recipe.record_bytes}"
            f" ({len(keys) * recipe.record_bytes} bytes): it was cut off; {recipe.remedies.lost}"
        )
    shape = len(keys), recipe.record_bytes
    if size <= SMALL_SHARD:  # mapped, thousands of them would take more open files than a process may have
        records = np.fromfile(bin_path, np.uint8).reshape(shape)
    else:
        records = np.memmap(bin_path, np.uint8, "r", shape=shape)
    return Shard(bin_path, keys, checksums, meta, sha256, records)


def damaged_records(shard: Shard) -> list[int]:
    """The rows whose records do not match their checksums in the index."""
    pairs = enumerate(zip(shard.records, shard.checksums, strict=True))
    return [row for row, (record, checksum) in pairs if xxhash.xxh3_64_intdigest(record) != checksum]


def remove_shard(path: Path) -> None:
    """Delete the shard whose index is `path`; the index goes first, so that none is left without its records."""
    path.unlink(missing_ok=True)
    path.with_suffix(".bin").unlink(missing_ok=True)


def drop_damaged(root: Path, recipe: Recipe, *, every_record: bool = False) -> None:
    """Delete and log the shards whose files do not match their index, so that their records are recomputed.

    With `every_record`, every record is also compared with its checksum. If there are damaged shards, raises BadInput
    when another process is writing or the folder cannot be written.
    """
    folder, damaged = Path(root) / recipe.folder_name, []
    for path in shard_indices(folder):
        try:
            shard = read_shard(path, recipe)
            if every_record and (rows := damaged_records(shard)):
                raise Damaged(f"{shard.path} is damaged (records {rows[0]}, ...)")
        except Damaged as error:
            logger.warning("%s: deleted, and made again", printable(str(error)))
            damaged.append(path)
    if damaged:
        with locked(folder, recipe.remedies):
            for path in damaged:
                remove_shard(path)


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise BadInput if the folder has a recipe.json that cannot be parsed or is of another recipe."""
    path = folder / "recipe.json"
    if not path.exists():
        return
    try:
        there = read_json(path)
    except ValueError as error:
        raise BadInput(f"{path} cannot be read ({error}): delete this file, it is made again") from error
    if there != recipe.as_json():
        differences = recipe.differences(there) if isinstance(there, dict) else ["it is no recipe"]
        raise BadInput(
            f"{folder} is not what its name says ({'; '.join(differences)}): delete the folder, or name another"
            f" {recipe.remedies.flag}"
        )


@contextmanager
def locked(
    folder: Path, remedies: Remedies = DEFAULT_REMEDIES, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold `folder` for writing.

    If another process holds it, raises BadInput naming the holder; with `waiting`, calls that once with a message and
    waits instead. Raises BadInput also if the folder cannot be written.
    """
    otherwise = f"wait until it is done (a second process would do the same work), or name another {remedies.flag}"
    try:
        held = locks.hold(folder, waiting=waiting, otherwise=otherwise)
    except OSError as error:
        raise not_writable(folder, error, remedies) from error
    with held:
        yield


def not_writable(folder: Path, error: OSError, remedies: Remedies) -> BadInput:
    """The BadInput for a disk error at a store's folder, with its remedy."""
    if error.errno in DISK_ERRORS and error.errno not in FORBIDDEN:
        return BadInput(f"{remedies.name} {folder} cannot be written ({error.strerror}): {remedy(error)}")
    return BadInput(f"{remedies.name} {folder} cannot be written ({error.strerror or error}): {remedies.unwritable}")


def log_line(key: bytes, checksum: int, meta: Any) -> bytes:
    """A line of the log, ending with its own digest."""
    entry = [key.hex(), f"{checksum:016x}", meta]
    return json.dumps([*entry, digest(json.dumps(entry).encode())]).encode() + b"\n"


def log_entry(line: bytes) -> tuple[bytes, int, Any] | None:
    """Parse a line of the log; None if it was cut off or has changed."""
    try:
        key, checksum, meta, _ = parse_json(line)
        entry = bytes.fromhex(key), int(checksum, 16), meta
    except (ValueError, TypeError):
        return None
    return entry if line == log_line(*entry) else None
