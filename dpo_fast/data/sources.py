"""Sources of preference pairs, whatever they are stored in. Images are decoded only by `check_images`."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dpo_fast.data.columns import Columns, WantedColumns
from dpo_fast.data.images import SAME, BadImage, Encoded, ImageKey, Keys, decode, image_key
from dpo_fast.errors import BadInput, Unresponsive, disk_error, one_line, printable
from dpo_fast.files import file_name, parse_json, read_bytes


class BadRow(NamedTuple):
    """A row that cannot be trained on: its index in the source, the column responsible, and the reason."""

    row: int
    column: str
    reason: str


class StreamedRow(NamedTuple):
    """One row of a stream; its images are encoded, or given as keys if the cache knows the stream."""

    row: int
    caption: Any
    label: Any
    images: Encoded | Keys


@dataclass(frozen=True)
class Identity:
    """What a source is, for whatever is kept of it. Each field is equal for what that use takes to be the same."""

    rows: str  # set, split, columns and number of rows: what must stay the same for a run to be resumed
    images: str  # what its images and captions are from, whatever the labels and however many of the rows are read
    look: Callable[[], str] = field(default=str, compare=False, repr=False)  # gives the stamp

    @cached_property
    def stamp(self) -> str:
        """Names, sizes and times of change of the files, at the first time of asking; "" for a stream from the hub."""
        return self.look()


class Source(Protocol):
    """Preference pairs with random access. A pair's row index is its id and never changes."""

    description: str  # one line for the log
    columns: Columns

    def __len__(self) -> int: ...

    def captions(self) -> list[Any]:
        """One per row, as stored: text, or whatever the column holds instead."""

    def labels(self) -> list[Any]:
        """One per row, from `Columns.label_of`: the probability that image 0 is the better one."""

    def image_names(self) -> list[tuple[str, str] | None] | None:
        """One per row: names that are equal for equal images, as far as known without reading any. None: not known."""

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        """The two encoded images. Raises BadImage, naming the column, if one is not available."""

    def check_images(self, row: int) -> None:
        """Raise BadImage, naming the column, if an image of the row is not available, does not decode, or is the same
        as the other one."""

    def image_keys(self, row: int) -> tuple[ImageKey, ImageKey]:
        """The key of each image. Raises BadImage, naming the column, if one is not available."""

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        """Rows whose images are files that cannot be used, found without reading them."""

    @property
    def identity(self) -> Identity:
        """The source's identity, computed once on first access."""

    def row_stamp(self, row: int) -> str:
        """A stamp of the row's images: while this and `identity.images` are equal, they count as unchanged."""


class _Encoded:
    """Methods that need only the images' bytes."""

    def check_images(self, row: int) -> None:
        images = self.image_bytes(row)
        for column, image in zip(self.columns.images, images, strict=True):
            try:
                decode(image)
            except BadImage as error:
                raise BadImage(error.reason, column) from error
        if images[0] == images[1]:
            raise BadImage(SAME, self.columns.images[1])

    def image_keys(self, row: int) -> tuple[ImageKey, ImageKey]:
        first, second = self.image_bytes(row)
        return image_key(first), image_key(second)


class TableSource(_Encoded):
    """A `datasets.Dataset` (memory-mapped Arrow) whose image columns hold encoded bytes."""

    def __init__(self, name: str, split: str, table: datasets.Dataset, wanted: "WantedColumns", max_rows: int | None):
        self.columns = wanted.find(table.column_names, name)
        self._table = _raw_images(table, self.columns, name)
        if max_rows is not None:
            self._table = self._table.select(range(min(max_rows, len(self._table))))
        self._name, self._split = name, split
        self.description = _describe(name, split, self.columns, len(self))

    def __len__(self) -> int:
        return len(self._table)

    def captions(self) -> list[Any]:
        return self._column(self.columns.caption)

    def labels(self) -> list[Any]:
        stored = {name: self._column(name) for name in self.columns.of_label}
        if len(stored) == 1:
            return stored[self.columns.label]
        return [self.columns.label_of({name: stored[name][row] for name in stored}) for row in range(len(self))]

    def image_names(self) -> list[tuple[str, str] | None] | None:
        if self.columns.names is None:
            return None
        named = zip(*map(self._column, self.columns.names), strict=True)
        return [(first, second) if first and second else None for first, second in named]

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        try:
            record = self._table[row]
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"cannot be read ({one_line(error)})", self.columns.images[0]) from error
        first, second = (_embedded(record[column], column) for column in self.columns.images)
        return first, second

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        return []  # embedded: a null is found when its row is read

    @cached_property
    def identity(self) -> Identity:
        files = [file["filename"] for file in self._table.cache_files]
        stamp = stamp_of(files) if files else self._table._fingerprint  # in memory: it identifies the contents
        images = f"{_images(self._name, self._split, self.columns)} {stamp}"
        return Identity(_rows(self._name, self._split, self.columns, len(self)), images, partial(str, stamp))

    def row_stamp(self, row: int) -> str:
        return ""  # `identity.images` covers the files that hold all rows

    def _column(self, name: str) -> list[Any]:
        return self._table.select_columns([name])[:][name]  # only this column's buffers are touched


class JsonlSource(_Encoded):
    """Lines of JSON that name image files in their folder. A path may not lead out of it, by `..` or by a link.

    In a snapshot of the hub's cache every file is a link into the repository's folder `blobs`, which is allowed.
    """

    def __init__(
        self, name: str, split: str, files: list[Path], root: Path, wanted: "WantedColumns", max_rows: int | None
    ):
        records = [record for file in files for record in _read_jsonl(file)][:max_rows]
        self.columns = wanted.find(list(dict.fromkeys(key for record in records for key in record)), name)
        # Kept column by column: a million small dicts would take a gigabyte.
        self._captions = [record.get(self.columns.caption) for record in records]
        self._labels = [self.columns.label_of(record) for record in records]
        self._paths = [tuple(record.get(column) for column in self.columns.images) for record in records]
        self._name, self._split, self._root = name, split, Path(os.path.realpath(root))
        self._blobs = _blobs_of(self._root)
        self.description = _describe(name, split, self.columns, len(self))

    def __len__(self) -> int:
        return len(self._paths)

    def captions(self) -> list[Any]:
        return self._captions

    def labels(self) -> list[Any]:
        return self._labels

    def image_names(self) -> list[tuple[str, str] | None] | None:
        return [
            tuple(map(os.path.normpath, paths)) if all(isinstance(path, str) for path in paths) else None
            for paths in self._paths
        ]

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        first, second = (self._read(row, side) for side in (0, 1))
        return first, second

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        missing = []
        for row in tqdm(range(len(self)), desc="Looking for image files", unit=" pairs", disable=not progress):
            try:
                for side in (0, 1):
                    self._resolve(row, side)
            except BadImage as error:
                missing.append(BadRow(row, error.column, error.reason))
        return missing

    @cached_property
    def identity(self) -> Identity:
        files = [self._root / _stored(path) for paths in self._paths for path in paths if isinstance(path, str)]
        about = self._name, self._split, self.columns
        return Identity(_rows(*about, len(self)), _images(*about), partial(stamp_of, files))

    def row_stamp(self, row: int) -> str:
        return stamp_of(self._root / _stored(path) for path in self._paths[row] if isinstance(path, str))

    def _resolve(self, row: int, side: int) -> Path:
        """The real path of an image file. Raises BadImage unless it is an existing file inside the folder."""
        given, column = self._paths[row][side], self.columns.images[side]
        if not isinstance(given, str) or not given:
            raise BadImage(f"is not a file path ({given!r:.200})", column)
        try:
            relative = file_name(given)
            path = Path(os.path.realpath(self._root / relative))
        except ValueError as error:  # a null character, or half a surrogate pair
            raise BadImage(f"is not a file path ({given!r:.200})", column) from error
        inside = os.path.normpath(self._root / relative).startswith(f"{self._root}{os.sep}")
        in_blobs = self._blobs is not None and path.parent == self._blobs and inside
        if not (path.is_relative_to(self._root) or in_blobs):
            raise BadImage(f"leads out of the folder ({given!r:.200})", column)
        if not os.path.isfile(path):
            raise BadImage(f"is not an existing file ({given!r:.200})", column)
        return path

    def _read(self, row: int, side: int) -> bytes:
        path = self._resolve(row, side)
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({one_line(error)})", self.columns.images[side]) from error


class RowsSource(_Encoded):
    """A few rows that are held in memory."""

    def __init__(self, description: str, columns: Columns, rows: Sequence[StreamedRow]):
        self.description, self.columns, self._held = description, columns, rows
        text = repr([(row.row, row.caption, row.label) for row in rows])
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
        self.identity = Identity(f"{description} rows={digest}", digest, partial(str, digest))

    def __len__(self) -> int:
        return len(self._held)

    def captions(self) -> list[Any]:
        return [row.caption for row in self._held]

    def labels(self) -> list[Any]:
        return [row.label for row in self._held]

    def image_names(self) -> None:
        return None

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        for image in self._held[row].images:
            if isinstance(image, BadImage):
                raise image
        return self._held[row].images

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        return []

    def row_stamp(self, row: int) -> str:
        return ""  # `identity.images` covers them


class StreamedSource:
    """Rows in the order of the source, read anew by every call of `rows`."""

    def __init__(
        self,
        description: str,
        identity: Identity,
        columns: Columns,
        rows: Callable[[], Iterator[StreamedRow]],
        length: int | None = None,
    ):
        self.description = description
        self.identity = replace(identity, rows=f"{identity.rows} streamed")
        self.columns = columns
        self.length = length  # if known beforehand; for estimates only
        self._rows = rows

    @classmethod
    def of_table(
        cls,
        name: str,
        split: str,
        table: datasets.IterableDataset,
        wanted: "WantedColumns",
        max_rows: int | None,
        files: Sequence[Path] = (),
    ) -> "StreamedSource":
        """Stream a `datasets.IterableDataset`; `files` are its local files. Raises BadInput if it cannot be opened.

        `rows` raises BadInput for a damaged file, and Unresponsive if the stream breaks off.
        """
        length = _length(table, split, files)
        with as_bad_input(f"data set {name!r}"):
            names = table.column_names or list(next(iter(table.take(1)), {}))
        columns = wanted.find(names, name)
        table = _raw_images(table, columns, name)
        if max_rows is not None:
            table = table.take(max_rows)
            length = max_rows if length is None else min(length, max_rows)

        def rows() -> Iterator[StreamedRow]:
            records, row = iter(table), 0
            while True:
                try:
                    record = next(records, None)
                except Exception as error:  # the network and the file formats raise errors of any type
                    broken = f"data set {name!r}: the stream broke off after {row} rows ({one_line(error)}); "
                    if files and disk_error(error) is None:
                        raise BadInput(f"{broken}a file of it is damaged: copy it again") from error
                    raise Unresponsive(
                        f"{broken}the run can be resumed from its last checkpoint, the cache be built on by the same"
                        " command"
                    ) from error
                if record is None:
                    return
                images = tuple(_or_reason(_embedded, record[column], column) for column in columns.images)
                yield StreamedRow(row, record[columns.caption], columns.label_of(record), images)
                row += 1

        about = name, split, columns
        look = partial(stamp_of, files) if files else str
        identity = Identity(_rows(*about, max_rows), _images(*about), look)
        return cls(_describe(*about, None), identity, columns, rows, length)

    @classmethod
    def over(cls, source: Source) -> "StreamedSource":
        """Stream a source that has random access."""

        def rows() -> Iterator[StreamedRow]:
            for row, (caption, label) in enumerate(zip(source.captions(), source.labels(), strict=True)):
                images = _or_reason(source.image_bytes, row)
                yield StreamedRow(row, caption, label, images if isinstance(images, tuple) else (images, images))

        # The manifest of a stream holds its captions and labels too.
        text = hashlib.blake2b(repr((source.captions(), source.labels())).encode(errors="replace"), digest_size=8)
        identity = replace(source.identity, look=partial(_joined, source.identity, text.hexdigest()))
        return cls(source.description, identity, source.columns, rows, len(source))

    def rows(self) -> Iterator[StreamedRow]:
        """Every row once, from the first."""
        return self._rows()


def _stored(path: str) -> str:
    """The path of an image as Python passes it to the system; unchanged if it is not a valid path."""
    try:
        return file_name(path)
    except ValueError:
        return path


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(file).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{str(file)!r} cannot be read as UTF-8 text: {one_line(error)}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise BadInput(f"{str(file)!r} line {number} is not JSON ({error}): put one object on each line") from error
        if not isinstance(record, dict):
            raise BadInput(
                f'{str(file)!r} line {number} is not an object like {{"prompt": ..., "chosen": ..., "rejected": ...}}'
            )
        records.append(record)
    return records


def _blobs_of(root: Path) -> Path | None:
    """The folder of the files' contents if `root` is in a snapshot of the hub's cache
    (datasets--owner--name/snapshots/<commit>), else None."""
    for snapshots in root.parents:
        if snapshots.name == "snapshots" and re.match(r"(datasets|models|spaces)--", snapshots.parent.name):
            return snapshots.parent / "blobs"
    return None


def _raw_images(table, columns: Columns, name: str):
    """Keep only the pair's columns, images undecoded. Raises BadInput for columns that cannot hold images."""
    table = table.select_columns([*columns.images, *columns.of_label, columns.caption, *(columns.names or ())])
    for column in columns.images:
        feature = (table.features or {}).get(column)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif not (
            feature is None
            or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "null"))
            or (isinstance(feature, dict) and "bytes" in feature)
        ):
            kind = "text" if isinstance(feature, datasets.Value) and "string" in feature.dtype else str(feature)
            raise BadInput(f"data set {name!r}: column {column!r} holds {kind}, not images (bytes or an Image feature)")
    return table


def _embedded(value: Any, column: str) -> bytes:
    """The encoded bytes in a cell, which holds bytes or an Image's {"bytes", "path"}. Raises BadImage for others."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is None:
        raise BadImage("is missing" if path is None else f"is not embedded, only its path is ({path!r})", column)
    if not isinstance(value, bytes):
        raise BadImage(f"is not image bytes ({type(value).__name__})", column)
    return value


def _or_reason(function, *arguments):
    """The function's result, or the BadImage it raised."""
    try:
        return function(*arguments)
    except BadImage as error:
        return error


def _length(table: datasets.IterableDataset, split: str, files: Sequence[Path]) -> int | None:
    """The number of rows of a stream, if its files or its description give it."""
    if files and all(file.suffix == ".parquet" for file in files):
        return sum(pq.read_metadata(os.path.abspath(file)).num_rows for file in files)
    known = (table.info.splits or {}).get(split)
    return known.num_examples or None if known is not None else None


def stamp_of(files: Iterable[str | Path]) -> str:
    """A hash of the files' names, sizes and modification times; a file that cannot be accessed counts by its name."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
        except (OSError, ValueError):
            digest.update(f"{file}\n".encode(errors="replace"))
    return digest.hexdigest()


def _joined(identity: Identity, text: str) -> str:
    return identity.stamp + text


def _describe(name: str, split: str, columns: Columns, rows: int | None) -> str:
    size = "streamed" if rows is None else f"{rows} rows"
    better = f"{columns.images[0]} is the chosen image" if columns.label is None else f"label {columns.label}"
    images = " and ".join(columns.images)
    return printable(f"{name}, split {split}, {size}: images {images}, {better}, caption {columns.caption}")


def _rows(name: str, split: str, columns: Columns, rows: int | None) -> str:
    # Only a path's last part: a data set stays the same if it is moved, or named from another folder.
    return f"{name} split={split} rows={rows} columns={','.join(columns.images)},{columns.label},{columns.caption}"


def _images(name: str, split: str, columns: Columns) -> str:
    return f"{name} split={split} columns={','.join(columns.images)},{columns.caption}"


@contextmanager
def as_bad_input(what: str) -> Iterator[None]:
    """Turn whatever `datasets` raises on opening `what` into a one-line BadInput that names the underlying cause."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # the network and the file formats raise errors of any type
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise BadInput(f"{what} cannot be opened: {one_line(cause or error)}") from error
