"""The shards of one recipe on disk: written in order, resumable after a kill, checked when read.

    recipe.json           what the entries depend on, and the layout of a record
    shard-R-N.bin         records end to end, all of one size; R is the rank that wrote it
    shard-R-N.json        key, checksum and meta of each record, the sha256 of the .bin; no shard exists without it
    shard-R-N.part, .log  the shard being written: its records, and a line of (key, checksum, meta) after each, which
                          ends with its own digest

A record counts once its line is in the log and its checksum agrees, so a process killed at any moment loses at most the
record it was writing, and the next one goes on behind it. A full shard is flushed to disk, renamed to .bin, and gets
its JSON last. Nothing in these files depends on when or how often the work was interrupted.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from dpo_fast import locks
from dpo_fast.caching.recipe import Recipe
from dpo_fast.checksums import Damaged, digest, parse_signed, sha256_of, write_signed_json
from dpo_fast.data.images import KEY_BYTES
from dpo_fast.errors import DISK_ERRORS, FORBIDDEN, BadInput, remedy
from dpo_fast.files import (
    flush,
    has_temporaries,
    parse_json,
    read_bytes,
    read_json,
    regular_file,
    remove_temporaries,
    user_path,
    write_json,
)

SHARD_BYTES = 256 << 20  # a full shard's records, about
_SHARD = re.compile(r"shard-(\d+)-(\d+)\.(json|bin|part|log)$")


@dataclass
class Shard:
    """One complete shard, memory-mapped."""

    path: Path  # of the .bin
    key_bytes: np.ndarray  # uint8 [n, KEY_BYTES]
    checksums: np.ndarray  # uint64 [n], xxh3_64 of each record
    meta: list[Any]  # of each record: a flat list, a dict, or None where there is nothing to say
    sha256: str
    records: np.ndarray  # uint8 [n, record_bytes]

    @property
    def keys(self) -> list[bytes]:
        whole = self.key_bytes.tobytes()
        return [whole[i : i + KEY_BYTES] for i in range(0, len(whole), KEY_BYTES)]


class Found(NamedTuple):
    """Where the records of some keys are; -1 where there is none."""

    shard: np.ndarray  # int64 [n]
    row: np.ndarray  # int64 [n]


class Store:
    """The entries of one recipe that are on disk now. Raises BadInput for a folder that is not what it says."""

    def __init__(self, root: Path, recipe: Recipe):
        self.folder, self.recipe = Path(root) / recipe.folder_name, recipe
        self.shards: list[Shard] = []
        if self.folder.is_dir():
            _check_recipe(self.folder, recipe)
            self.shards = [read_shard(path, recipe) for path in shard_indices(self.folder)]
        keys = np.concatenate([shard.key_bytes for shard in self.shards] or [np.zeros((0, KEY_BYTES), np.uint8)])
        heads = _heads(keys)
        order = np.argsort(heads, kind="stable")
        self._heads, self._keys = heads[order], keys[order]
        counts = [len(shard.key_bytes) for shard in self.shards]
        self._shard = np.repeat(np.arange(len(counts)), counts)[order]
        self._row = np.concatenate([np.arange(n) for n in counts] or [np.zeros(0, np.int64)])[order]

    def __len__(self) -> int:
        return len(self._heads)

    def find(self, keys: Sequence[bytes]) -> Found:
        """Where the records of `keys` are."""
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        heads = _heads(wanted)
        shard, row = np.full(len(wanted), -1), np.full(len(wanted), -1)
        first, last = np.searchsorted(self._heads, heads), np.searchsorted(self._heads, heads, "right")
        for i in range(len(wanted)):
            for place in range(first[i], last[i]):  # more than one only where 64 bits of two keys agree
                if (self._keys[place] == wanted[i]).all():
                    shard[i], row[i] = self._shard[place], self._row[place]
        return Found(shard, row)

    def keys(self) -> set[bytes]:
        """The keys of all records."""
        return {key for shard in self.shards for key in shard.keys}

    def record(self, shard: int, row: int) -> np.ndarray:
        """A record, uint8 [record_bytes], checked. Raises Damaged."""
        held = self.shards[shard]
        record = held.records[row]
        if xxhash.xxh3_64_intdigest(record) != held.checksums[row]:
            raise Damaged(
                f"{held.path}: record {row} is damaged (its checksum differs); `python -m dpo_fast.cache verify"
                f" --remove --latent_cache_dir {held.path.parents[1]}` removes damaged shards, and a build or the next"
                " run encodes them again"
            )
        return record

    def meta(self, shard: int, row: int) -> Any:
        return self.shards[shard].meta[row]

    def touch(self) -> None:
        """Note that the entries were used, for `prune`; in a read-only cache nothing is noted."""
        path = self.folder / "recipe.json"
        with suppress(OSError):
            if path.exists():
                os.utime(path)
            elif self.shards:  # `verify --remove` took it
                write_json(path, self.recipe.as_json())


class Writer:
    """Appends records for one rank; going on where an earlier process was. `pending` are the keys it found there.

    `capacity` records fill a shard. Close it (or leave the `with` block) when all is written: that completes the last,
    short shard. After an error the unfinished shard stays for the next process.
    """

    def __init__(self, root: Path, recipe: Recipe, rank: int):
        self.recipe, self.rank = recipe, rank
        self.folder = Path(root) / recipe.folder_name
        self.capacity = max(1, SHARD_BYTES // recipe.record_bytes)
        self._entries: list[tuple[bytes, int, Any]] = []
        self._part: BinaryIO | None = None
        self._log: BinaryIO | None = None
        for number in self._unfinished():
            if self._entries:  # two of them: shards were deleted in between
                self._complete()
            self._number = number
            self._resume()
        if not self._entries:
            self._number = self._free_number()
        self.pending = [key for key, _, _ in self._entries]
        if len(self._entries) >= self.capacity:
            self._complete()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self._entries:
            self._complete()
        elif self._part is not None:
            self._part.close()
            self._log.close()

    def add(self, key: bytes, record: bytes | memoryview, meta: Any = None) -> None:
        """Append one record. Raises OSError (a full disk, for one); what was added before is safe."""
        assert len(record) == self.recipe.record_bytes, (len(record), self.recipe.record_bytes)
        if self._part is None:
            self._part, self._log = open(self._path("part"), "wb", 0), open(self._path("log"), "wb", 0)
        checksum = xxhash.xxh3_64_intdigest(record)
        _write(self._part, record)
        _write(self._log, _line(key, checksum, meta))
        self._entries.append((key, checksum, meta))
        if len(self._entries) == self.capacity:
            self._complete()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard-{self.rank}-{self._number:05d}.{suffix}"

    def _numbers(self, *kinds: str) -> set[int]:
        """The numbers of this rank's files of these kinds."""
        return {number for rank, number, kind in _shard_files(self.folder) if rank == self.rank and kind in kinds}

    def _free_number(self) -> int:
        taken = self._numbers("json")
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _unfinished(self) -> list[int]:
        """The shards that a killed process left without their index, ascending."""
        done = self._numbers("json")
        for number in self._numbers("log") & done:  # done, but for this
            (self.folder / f"shard-{self.rank}-{number:05d}.log").unlink()
        return sorted(self._numbers("bin", "part", "log") - done)

    def _resume(self) -> None:
        """Take up an unfinished shard: whole records in the order of the log, nothing behind them."""
        part, log = self._path("part"), self._path("log")
        if self._path("bin").exists():  # killed between the rename and the JSON
            self._path("bin").rename(part)
        size, lines = self.recipe.record_bytes, []
        if part.exists() and log.exists():
            with regular_file(part).open("rb") as file:
                for line in read_bytes(log).splitlines(keepends=True):
                    record = file.read(size)
                    entry = _entry(line)
                    if entry is None or len(record) < size or xxhash.xxh3_64_intdigest(record) != entry[1]:
                        break
                    self._entries.append(entry)
                    lines.append(line)
        if not self._entries:
            part.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            return
        os.truncate(part, size * len(self._entries))
        os.truncate(log, sum(map(len, lines)))
        self._part, self._log = open(part, "ab", 0), open(log, "ab", 0)

    def _complete(self) -> None:
        os.fsync(self._part.fileno())
        self._part.close()
        self._log.close()
        self._part = self._log = None
        sha256 = sha256_of(self._path("part"))
        os.replace(self._path("part"), self._path("bin"))
        body = {
            "recipe": self.recipe.digest,
            "record_bytes": self.recipe.record_bytes,
            "sha256": sha256,
            "keys": [key.hex() for key, _, _ in self._entries],
            "checksums": [f"{checksum:016x}" for _, checksum, _ in self._entries],
            "meta": [meta for _, _, meta in self._entries],
        }
        write_signed_json(self._path("json"), body, indent=None)
        flush(self.folder)
        self._path("log").unlink()
        self._entries, self._number = [], self._free_number()


def begin_folder(root: Path, recipe: Recipe) -> None:
    """Make the recipe's folder, with recipe.json (it may be missing: shards and the folder's name tell of it too).

    Raises BadInput where it holds another recipe, or cannot be made.
    """
    folder = Path(root) / recipe.folder_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        if not (folder / "recipe.json").exists():
            write_json(folder / "recipe.json", recipe.as_json())
    except OSError as error:
        raise not_writable(folder, error) from error
    _check_recipe(folder, recipe)


def finish_orphans(root: Path, recipe: Recipe, ranks: int) -> None:
    """Complete the unfinished shards of ranks from `ranks` on: an earlier build had more processes."""
    folder = Path(root) / recipe.folder_name
    for rank in sorted({rank for rank, _, kind in _shard_files(folder) if kind in ("part", "log") and rank >= ranks}):
        with Writer(root, recipe, rank):
            pass


def tidy(root: Path, recipe: Recipe) -> bool:
    """Complete the unfinished shards of killed processes and clear away what else they left. True if there was any.

    In a folder that another process builds, or that cannot be written, everything stays as it is.
    """
    folder = Path(root) / recipe.folder_name
    unfinished = any(kind in ("part", "log") for _, _, kind in _shard_files(folder))
    if not unfinished and not has_temporaries(folder):
        return False
    with suppress(OSError, BadInput), locked(folder):
        begin_folder(root, recipe)
        finish_orphans(root, recipe, 0)
    return True


def log_keys(folder: Path) -> set[bytes]:
    """The keys of the records in unfinished shards, after their writers took them up."""
    keys = set()
    for rank, number, kind in _shard_files(folder):
        if kind == "log" and (path := folder / f"shard-{rank}-{number:05d}.log").exists():  # not a link to nowhere
            lines = read_bytes(path).splitlines(keepends=True)
            keys |= {entry[0] for entry in map(_entry, lines) if entry is not None}
    return keys


def default_root() -> Path:
    """Where the cache is kept by default: $DPO_FAST_CACHE, or dpo_fast in $HF_HOME or in ~/.cache."""
    if given := os.environ.get("DPO_FAST_CACHE"):
        return user_path(given)
    return user_path(os.environ.get("HF_HOME") or "~/.cache") / "dpo_fast"


def not_writable(folder: Path, error: OSError) -> BadInput:
    """A disk's error at the cache folder as BadInput, with what to do about it."""
    if error.errno in DISK_ERRORS and error.errno not in FORBIDDEN:
        return BadInput(f"the cache folder {folder} cannot be written ({error.strerror}): {remedy(error)}")
    return BadInput(
        f"the cache folder {folder} cannot be written ({error.strerror or error}): name another --latent_cache_dir, or"
        " train with --no-cache; what is complete can be read as it is"
    )


@contextmanager
def locked(
    folder: Path, waiting: Callable[[str], None] | None = None, flag: str = "--latent_cache_dir"
) -> Iterator[None]:
    """Hold `folder`, which `flag` names, for building.

    Where another process has it: BadInput that names the holder, or, with `waiting`, which is told of it once, its end
    is waited for.
    """
    otherwise = f"wait until it is done (a second builder would do the same work), or name another {flag}"
    try:
        held = locks.hold(folder, waiting=waiting, otherwise=otherwise)
    except OSError as error:
        raise not_writable(folder, error) from error
    with held:
        yield


def shard_indices(folder: Path) -> list[Path]:
    """The JSON files of the complete shards, in order of rank and number."""
    found = sorted((rank, number) for rank, number, kind in _shard_files(folder) if kind == "json")
    return [folder / f"shard-{rank}-{number:05d}.json" for rank, number in found]


def read_shard(path: Path, recipe: Recipe) -> Shard:
    """The shard whose index is `path`: its index checked, its size checked.

    Raises Damaged, and OSError where the disk does not give the files: that is no reason to delete them.
    """
    bin_path = path.with_suffix(".bin")
    try:
        body = parse_signed(read_bytes(path))
        keys = np.frombuffer(bytes.fromhex("".join(body["keys"])), np.uint8).reshape(-1, KEY_BYTES)
        checksums = np.array([int(checksum, 16) for checksum in body["checksums"]], np.uint64)
        shared: dict[tuple, list] = {}  # sizes recur: one list of each, or millions of records take much memory
        meta = [shared.setdefault(tuple(m), m) if isinstance(m, list) else m for m in body["meta"]]
        sha256, of = body["sha256"], (body["recipe"], body["record_bytes"])
        if not len(keys) == len(checksums) == len(meta):
            raise ValueError(f"it has {len(keys)} keys, {len(checksums)} checksums and {len(meta)} notes")
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise Damaged(f"{path} cannot be read as the index of a shard ({error}); {rebuild_command(recipe)}") from error
    if of != (recipe.digest, recipe.record_bytes):
        raise BadInput(
            f"{path} belongs to recipe {of[0]} with records of {of[1]} bytes, not to {recipe.digest} with"
            f" {recipe.record_bytes}: move it back to where it came from, or delete it with its .bin"
        )
    size = bin_path.stat().st_size if bin_path.exists() else 0
    if size != len(keys) * recipe.record_bytes:
        raise Damaged(
            f"{bin_path} has {size} bytes, its index says {len(keys)} records of {recipe.record_bytes}"
            f" ({len(keys) * recipe.record_bytes} bytes): it was cut off; {rebuild_command(recipe)}"
        )
    records = np.memmap(bin_path, np.uint8, "r", shape=(len(keys), recipe.record_bytes))
    return Shard(bin_path, keys, checksums, meta, sha256, records)


def remove_shard(path: Path) -> None:
    """Delete a shard by its index's path; the index first, so that no index stands without its records."""
    path.unlink(missing_ok=True)
    path.with_suffix(".bin").unlink(missing_ok=True)


def drop_damaged(root: Path, recipe: Recipe) -> None:
    """Delete the shards whose files do not fit their index, so that they are encoded again.

    Raises BadInput where there are such and another process builds, or the folder cannot be written.
    """
    folder, damaged = Path(root) / recipe.folder_name, []
    for path in shard_indices(folder):
        try:
            read_shard(path, recipe)
        except Damaged:
            damaged.append(path)
    if damaged:
        with locked(folder):
            for path in damaged:
                remove_shard(path)


def _check_recipe(folder: Path, recipe: Recipe) -> None:
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
            " --latent_cache_dir"
        )


def rebuild_command(recipe: Recipe) -> str:
    """What makes a shard again that had to be given up."""
    command = "reference --draws K" if recipe.kind == "reference" else "build"
    return f"`python -m dpo_fast.cache {command}` with the flags of the run makes it again"


def _shard_files(folder: Path) -> list[tuple[int, int, str]]:
    """(rank, number, suffix) of every file of a shard in `folder`."""
    matches = (_SHARD.match(name) for name in (os.listdir(folder) if folder.is_dir() else []))
    return [(int(m[1]), int(m[2]), m[3]) for m in matches if m]


def _heads(keys: np.ndarray) -> np.ndarray:
    """The first 64 bits of keys, uint64 [n]."""
    return keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)


def _line(key: bytes, checksum: int, meta: Any) -> bytes:
    """A line of the log, with a digest of its own."""
    entry = [key.hex(), f"{checksum:016x}", meta]
    return json.dumps([*entry, digest(json.dumps(entry).encode())]).encode() + b"\n"


def _entry(line: bytes) -> tuple[bytes, int, Any] | None:
    """What `_line` was given; None where the line was cut off or has changed."""
    try:
        key, checksum, meta, _ = parse_json(line)
        entry = bytes.fromhex(key), int(checksum, 16), meta
    except (ValueError, TypeError):
        return None
    return entry if line == _line(*entry) else None


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`; an unbuffered file may take only a part at a time."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
