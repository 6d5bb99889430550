"""Append records to a store, resuming where a killed process stopped."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dpo_fast.checksums import sha256_of, write_signed_json
from dpo_fast.errors import BadInput, printable
from dpo_fast.files import flush, has_temporaries, naming, read_bytes, regular_file, remove_temporaries, write_json
from dpo_fast.store.recipe import Recipe
from dpo_fast.store.shards import check_recipe, drop_damaged, locked, log_entry, log_line, not_writable, shard_files

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20  # of a full shard's records, approximately


class Writer:
    """Appends records for one rank, resuming an unfinished shard, whose keys `pending` holds.

    A shard holds `capacity` records, by default as many as fit in SHARD_BYTES. Leaving the `with` block completes the
    last, shorter shard. After an error the unfinished shard is kept for the next process.
    """

    def __init__(self, root: Path, recipe: Recipe, rank: int, capacity: int | None = None):
        self.recipe, self.rank = recipe, rank
        self.folder = Path(root) / recipe.folder_name
        self.capacity = capacity or max(1, SHARD_BYTES // recipe.record_bytes)
        self._entries: list[tuple[bytes, int, Any]] = []
        self._part: BinaryIO | None = None
        self._log: BinaryIO | None = None
        for number in self._unfinished():
            if self._entries:  # a second one: shards were deleted in between
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
        """Append one record. Raises OSError, for instance for a full disk; records added before are safe."""
        assert len(record) == self.recipe.record_bytes, (len(record), self.recipe.record_bytes)
        if self._part is None:
            self.folder.mkdir(parents=True, exist_ok=True)  # on a disk that ranks do not share the others lack it
            self._part, self._log = open(self._path("part"), "wb", 0), open(self._path("log"), "wb", 0)
        checksum = xxhash.xxh3_64_intdigest(record)
        with naming(self._path("part")):
            _write(self._part, record)
            _write(self._log, log_line(key, checksum, meta))
        self._entries.append((key, checksum, meta))
        if len(self._entries) == self.capacity:
            self._complete()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard-{self.rank}-{self._number:05d}.{suffix}"

    def _numbers(self, *kinds: str) -> set[int]:
        """The numbers of this rank's shards that have a file of one of these kinds."""
        return {number for rank, number, kind in shard_files(self.folder) if rank == self.rank and kind in kinds}

    def _free_number(self) -> int:
        taken = self._numbers("json")
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _unfinished(self) -> list[int]:
        """The numbers of the shards that a killed process left without an index, ascending."""
        _remove_finished_logs(self.folder, self.rank)
        done = self._numbers("json")
        return sorted(self._numbers("bin", "part", "log") - done)

    def _resume(self) -> None:
        """Resume an unfinished shard: keep its complete records in log order, and cut off what follows them."""
        part, log = self._path("part"), self._path("log")
        if self._path("bin").exists():  # killed between the rename and the JSON
            self._path("bin").rename(part)
        size, lines = self.recipe.record_bytes, []
        if part.exists() and log.exists():
            with regular_file(part).open("rb") as file:
                for line in read_bytes(log).splitlines(keepends=True):
                    record = file.read(size)
                    entry = log_entry(line)
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
        with naming(self._path("part")):
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
    """Make the recipe's folder, and its recipe.json if that is missing (shards and the folder's name identify it too).

    Raises BadInput if the folder holds another recipe or cannot be written.
    """
    folder = Path(root) / recipe.folder_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        if not (folder / "recipe.json").exists():
            write_json(folder / "recipe.json", recipe.as_json())
    except OSError as error:
        raise not_writable(folder, error, recipe.remedies) from error
    check_recipe(folder, recipe)


def finish_orphans(root: Path, recipe: Recipe, ranks: int) -> None:
    """Complete the unfinished shards of ranks >= `ranks`, left by a build that had more processes."""
    folder = Path(root) / recipe.folder_name
    for rank in sorted({rank for rank, _, kind in shard_files(folder) if kind in ("part", "log") and rank >= ranks}):
        with Writer(root, recipe, rank):
            pass


def mend(root: Path, recipe: Recipe, ranks: int) -> None:
    """Make the recipe's folder, complete what earlier ranks >= `ranks` left, and delete what is damaged, logging it.

    Every record is read: for stores of small records into which no other process is writing. Ranks below `ranks` resume
    their own unfinished shards (`Writer`), so that an interruption changes no file.
    """
    mark = root / recipe.folder_name / "recipe.json"
    try:
        check_recipe(mark.parent, recipe)
    except BadInput as error:  # the folder's name says what the recipe is
        logger.warning("%s is damaged (%s): it is written again", mark, printable(str(error)))
        mark.unlink(missing_ok=True)
    begin_folder(root, recipe)
    _remove_finished_logs(mark.parent)
    finish_orphans(root, recipe, ranks)
    drop_damaged(root, recipe, every_record=True)


def tidy(root: Path, recipe: Recipe) -> bool:
    """Complete the unfinished shards of killed processes and delete their temporary files. True if there were any.

    A folder that another process is building, or that cannot be written, is left as it is.
    """
    folder = Path(root) / recipe.folder_name
    unfinished = any(kind in ("part", "log") for _, _, kind in shard_files(folder))
    if not unfinished and not has_temporaries(folder):
        return False
    with suppress(OSError, BadInput), locked(folder, recipe.remedies):
        begin_folder(root, recipe)
        finish_orphans(root, recipe, 0)
    return True


def _remove_finished_logs(folder: Path, rank: int | None = None) -> None:
    """Delete the logs of complete shards, which are the last files to go; rank: only of this one."""
    files = shard_files(folder)
    complete = {(of, number) for of, number, kind in files if kind == "json" and rank in (None, of)}
    for of, number, kind in files:
        if kind == "log" and (of, number) in complete:
            (folder / f"shard-{of}-{number:05d}.log").unlink()


def log_keys(folder: Path) -> set[bytes]:
    """The keys of the records in unfinished shards, once their writers have resumed them."""
    keys = set()
    for rank, number, kind in shard_files(folder):
        if kind == "log" and (path := folder / f"shard-{rank}-{number:05d}.log").exists():  # not a dangling link
            lines = read_bytes(path).splitlines(keepends=True)
            keys |= {entry[0] for entry in map(log_entry, lines) if entry is not None}
    return keys


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`; an unbuffered file may accept only a part at a time."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
