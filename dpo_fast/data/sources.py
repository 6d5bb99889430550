"""Where preference pairs come from: the hub, parquet and Arrow files, saved data sets, folders with JSONL.

Every source answers the same few questions (`Source`); nothing here decodes an image. Three layouts are understood:

    Pick-a-Pic   jpg_0, jpg_1, label_0 (1: jpg_0 is better, 0: jpg_1 is, 0.5: a tie), caption
    preference   prompt, chosen, rejected; the two hold images
    JSONL        a folder with SPLIT.jsonl of {"prompt": ..., "chosen": path, "rejected": path}, paths relative to it

`image_columns`, `label_column` and `caption_column` name other columns in any of them.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import pyarrow as pa
from tqdm import tqdm

from dpo_fast.data.images import BadImage
from dpo_fast.errors import BadInput

LAYOUTS = (
    "Pick-a-Pic (jpg_0, jpg_1, label_0, caption), preference (prompt, chosen, rejected with images), "
    "or a folder with JSONL (prompt, chosen, rejected with file paths)"
)
NO_LABEL = "none"  # the label_column that says: the first image column is always the better one


class BadRow(NamedTuple):
    """A row that cannot be trained on: its index in the source, the column at fault, and why."""

    row: int
    column: str
    reason: str


class StreamedRow(NamedTuple):
    """One row of a stream; an image is its encoded bytes, or the reason why there are none."""

    row: int
    caption: Any
    label: Any
    images: tuple[bytes | BadImage, bytes | BadImage]


@dataclass(frozen=True)
class Columns:
    """The columns of one pair. `label` None: the first image is always the better one."""

    images: tuple[str, str]
    label: str | None
    caption: str


class Source(Protocol):
    """Rows of preference pairs with random access. A row number never changes: it is the pair's id."""

    description: str  # one line for the log
    columns: Columns

    def __len__(self) -> int: ...

    def captions(self) -> list[Any]:
        """One a row, as stored: text, or whatever stands there instead."""

    def labels(self) -> list[Any]:
        """One a row, as stored: how probably image 0 is the better one (1.0 everywhere without a label column)."""

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        """The two encoded images. Raises BadImage, naming the column, where one is not there."""

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        """Rows whose images are files that cannot be used, found without reading them."""

    def identity(self) -> str:
        """What must stay the same for a run to be resumed."""


def open_source(
    name_or_path: str | Path,
    *,
    config_name: str | None = None,
    split: str | None = None,
    image_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    max_rows: int | None = None,
) -> "Source | StreamedSource":
    """Open a hub id, a .parquet / .arrow / .jsonl file, a folder of one of these, or a folder written by save_to_disk.

    No split named: train (which a single file is, whatever its name), else the only one. `image_columns` names two
    columns, the first being the image that the label is about; custom ones need `label_column` too, or "none" where the
    first is always the better one. `max_rows` keeps the first rows. With `streaming` the result is a `StreamedSource`,
    read in order without a download beforehand.

    Raises BadInput for what cannot be found, opened or understood.
    """
    if max_rows is not None and max_rows < 1:
        raise BadInput(f"max_train_samples ({max_rows}) must be at least 1")
    wanted = _WantedColumns(image_columns, label_column, caption_column)
    path = Path(name_or_path).expanduser()
    if path.exists():
        if config_name or revision:
            raise BadInput(
                f"config_name and revision belong to hub data sets, and {str(path)!r} is on this disk: leave them out"
            )
        name = path.resolve().name
        shards, root = _local_splits(path)
        split = _pick_split(split, list(shards), name)
        if root is not None:
            source = JsonlSource(name, split, shards[split], root, wanted, max_rows)
            return StreamedSource.over(source) if streaming else source
        table = _load_local(shards[split], streaming, cache_dir)
    elif _looks_local(str(name_or_path)):
        raise BadInput(
            f"data set {str(name_or_path)!r} does not exist: give an existing file or folder, or a hub id (owner/name)"
        )
    else:
        name = str(name_or_path)
        with _as_bad_input(f"data set {name!r}"):
            # The split is settled first: loading without one would download them all.
            hub = {"revision": revision, "token": token}
            split = _pick_split(split, datasets.get_dataset_split_names(name, config_name, **hub), name)
            table = datasets.load_dataset(
                name, config_name, split=split, streaming=streaming, cache_dir=_text(cache_dir), **hub
            )
            name = "@".join([f"{name}/{config_name}" if config_name else name] + ([revision] if revision else []))
    if streaming:
        return StreamedSource.of_table(name, split, table, wanted, max_rows)
    return TableSource(name, split, table, wanted, max_rows)


class TableSource:
    """A `datasets.Dataset` (memory-mapped Arrow) whose image columns hold encoded bytes."""

    def __init__(self, name: str, split: str, table: datasets.Dataset, wanted: "_WantedColumns", max_rows: int | None):
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
        return [1.0] * len(self) if self.columns.label is None else self._column(self.columns.label)

    def image_bytes(self, row: int) -> tuple[bytes, bytes]:
        try:
            record = self._table[row]
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"cannot be read ({_one_line(error)})", self.columns.images[0]) from error
        first, second = (_embedded(record[column], column) for column in self.columns.images)
        return first, second

    def missing_images(self, progress: bool = False) -> list[BadRow]:
        return []  # embedded: a null shows when the row is read

    def identity(self) -> str:
        return _identity(self._name, self._split, self.columns, len(self))

    def _column(self, name: str) -> list[Any]:
        return self._table.select_columns([name])[:][name]  # only this column's buffers are touched


class JsonlSource:
    """Lines of JSON naming image files beside them. A path may not lead out of the folder, by `..` or by a link."""

    def __init__(
        self, name: str, split: str, files: list[Path], root: Path, wanted: "_WantedColumns", max_rows: int | None
    ):
        records = [record for file in files for record in _read_jsonl(file)][:max_rows]
        self.columns = wanted.find(list(dict.fromkeys(key for record in records for key in record)), name)
        # Kept column by column: a million small dicts would take a gigabyte.
        self._captions = [record.get(self.columns.caption) for record in records]
        self._labels = [1.0 if self.columns.label is None else record.get(self.columns.label) for record in records]
        self._paths = [tuple(record.get(column) for column in self.columns.images) for record in records]
        self._name, self._split, self._root = name, split, Path(os.path.realpath(root))
        self.description = _describe(name, split, self.columns, len(self))

    def __len__(self) -> int:
        return len(self._paths)

    def captions(self) -> list[Any]:
        return self._captions

    def labels(self) -> list[Any]:
        return self._labels

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

    def identity(self) -> str:
        return _identity(self._name, self._split, self.columns, len(self))

    def _resolve(self, row: int, side: int) -> Path:
        """The file behind a path, by its true name, if that is a file inside the folder."""
        given, column = self._paths[row][side], self.columns.images[side]
        if not isinstance(given, str) or not given:
            raise BadImage(f"is not a file path ({given!r:.200})", column)
        try:
            path = Path(os.path.realpath(self._root / given))
        except ValueError as error:  # a null character, or half a surrogate pair
            raise BadImage(f"is not a file path ({given!r:.200})", column) from error
        if not path.is_relative_to(self._root):
            raise BadImage(f"leads out of the folder ({given!r:.200})", column)
        if not os.path.isfile(path):
            raise BadImage(f"is not an existing file ({given!r:.200})", column)
        return path

    def _read(self, row: int, side: int) -> bytes:
        path = self._resolve(row, side)
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({_one_line(error)})", self.columns.images[side]) from error


class StreamedSource:
    """Rows in the order of the source, read anew by every call of `rows`. Its length is not known beforehand."""

    def __init__(self, description: str, identity: str, columns: Columns, rows):
        self.description = description
        self.columns = columns
        self._identity = identity
        self._rows = rows

    @classmethod
    def of_table(
        cls, name: str, split: str, table: datasets.IterableDataset, wanted: "_WantedColumns", max_rows: int | None
    ) -> "StreamedSource":
        """Stream a `datasets.IterableDataset`."""
        with _as_bad_input(f"data set {name!r}"):
            names = table.column_names or list(next(iter(table.take(1)), {}))
        columns = wanted.find(names, name)
        table = _raw_images(table, columns, name)
        if max_rows is not None:
            table = table.take(max_rows)

        def rows() -> Iterator[StreamedRow]:
            records, row = iter(table), 0
            while True:
                try:
                    record = next(records, None)
                except Exception as error:  # the network and the file formats raise what they like
                    raise RuntimeError(
                        f"data set {name!r}: the stream broke off after {row} rows ({_one_line(error)}); "
                        "the run can be resumed from its last checkpoint"
                    ) from error
                if record is None:
                    return
                label = 1.0 if columns.label is None else record[columns.label]
                images = tuple(_or_reason(_embedded, record[column], column) for column in columns.images)
                yield StreamedRow(row, record[columns.caption], label, images)
                row += 1

        return cls(_describe(name, split, columns, None), _identity(name, split, columns, max_rows), columns, rows)

    @classmethod
    def over(cls, source: Source) -> "StreamedSource":
        """Stream a source that has random access."""

        def rows() -> Iterator[StreamedRow]:
            for row, (caption, label) in enumerate(zip(source.captions(), source.labels(), strict=True)):
                images = _or_reason(source.image_bytes, row)
                yield StreamedRow(row, caption, label, images if isinstance(images, tuple) else (images, images))

        return cls(source.description, source.identity(), source.columns, rows)

    def rows(self) -> Iterator[StreamedRow]:
        """Every row once, from the first."""
        return self._rows()

    def identity(self) -> str:
        """What must stay the same for a run to be resumed."""
        return self._identity + " streamed"


class _WantedColumns(NamedTuple):
    """The column names a user gave, None for those to be found."""

    images: Sequence[str] | None
    label: str | None
    caption: str | None

    def find(self, columns: list[str], name: str) -> Columns:
        """Settle on columns that exist, or raise BadInput listing those that do."""
        if not columns:
            raise BadInput(f"data set {name!r} is empty: it has no rows and no columns")

        def missing(what: str, remedy: str) -> BadInput:
            return BadInput(
                f"data set {name!r} has {what}; its columns are {', '.join(columns)}. {remedy} Accepted: {LAYOUTS}."
            )

        for given in (*(self.images or ()), self.caption, None if self.label == NO_LABEL else self.label):
            if given is not None and given not in columns:
                raise missing(f"no column {given!r}", "Name one of these.")
        if self.images is not None:
            if len(self.images) != 2 or self.images[0] == self.images[1]:
                raise BadInput(f"image_columns ({', '.join(self.images)}) must name two different columns")
            images = (self.images[0], self.images[1])
        else:
            known = [pair for pair in (("jpg_0", "jpg_1"), ("chosen", "rejected")) if set(pair) <= set(columns)]
            if not known:
                raise missing(
                    "no image columns jpg_0 and jpg_1, nor chosen and rejected", "Or name two with --image_columns."
                )
            images = known[0]

        label = self.label
        if label is None and images != ("chosen", "rejected"):
            if "label_0" not in columns:
                remedy = f"Name one with --label_column, or 'none' if {images[0]} is always the better image."
                raise missing("no label column label_0", remedy)
            label = "label_0"

        caption = self.caption or next((column for column in ("caption", "prompt") if column in columns), None)
        if caption is None:
            raise missing("no caption or prompt column", "Or name one with --caption_column.")
        return Columns(images, None if label == NO_LABEL else label, caption)


def _local_splits(path: Path) -> tuple[dict[str, list[Path]], Path | None]:
    """Split name -> its files (a save_to_disk folder counts as one file); and the images' root folder for JSONL."""
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow", ".jsonl"):
            raise BadInput(f"data set {str(path)!r} is not a .parquet, .arrow or .jsonl file; accepted: {LAYOUTS}")
        return {"train": [path]}, path.parent if path.suffix == ".jsonl" else None
    if (path / "dataset_dict.json").is_file():
        with _as_bad_input(f"data set {str(path)!r}"):
            return {
                split: [path / split] for split in json.loads((path / "dataset_dict.json").read_text())["splits"]
            }, None
    if (path / "state.json").is_file():
        return {"train": [path]}, None
    for pattern in ("*.jsonl", "**/*.parquet", "**/*.arrow"):
        splits: dict[str, list[Path]] = {}
        for file in sorted(path.glob(pattern)):
            splits.setdefault(_split_of(file, path), []).append(file)
        if splits:
            return splits, path if pattern == "*.jsonl" else None
    raise BadInput(f"folder {str(path)!r} holds no .jsonl, .parquet or .arrow files; accepted: {LAYOUTS}")


def _split_of(file: Path, root: Path) -> str:
    """train-00000-of-00004-0a1b.parquet -> train; train/0000.parquet -> train; 0000.parquet -> train."""
    name = re.sub(r"(^|[-_.])\d+([-_]of[-_]\d+([-_][0-9a-f]+)?)?$", "", file.stem)
    if name in ("", "part", "data") and file.parent != root:
        name = file.parent.name
    return name if name not in ("", "part") else "train"


def _pick_split(wanted: str | None, splits: list[str], name: str) -> str:
    if wanted is None:
        wanted = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
        if wanted is None:
            raise BadInput(
                f"data set {name!r} has no split named train: choose one with --dataset_split_name from {', '.join(splits)}"
            )
    if wanted not in splits:
        raise BadInput(
            f"data set {name!r} has no split {wanted!r}: choose one with --dataset_split_name from {', '.join(splits)}"
        )
    return wanted


def _load_local(files: list[Path], streaming: bool, cache_dir: str | Path | None):
    with _as_bad_input(f"data set {str(files[0])!r}"):
        if files[0].is_dir():
            table = datasets.load_from_disk(str(files[0]))
            return table.to_iterable_dataset() if streaming else table
        return datasets.load_dataset(
            files[0].suffix[1:],  # "parquet" and "arrow" are also the loaders' names
            data_files={"train": [str(file) for file in files]},
            split="train",
            streaming=streaming,
            cache_dir=_text(cache_dir),
        )


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{str(file)!r} cannot be read as UTF-8 text: {_one_line(error)}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{str(file)!r} line {number} is not JSON ({error}): put one object on each line") from error
        if not isinstance(record, dict):
            raise BadInput(
                f'{str(file)!r} line {number} is not an object like {{"prompt": ..., "chosen": ..., "rejected": ...}}'
            )
        records.append(record)
    return records


def _raw_images(table, columns: Columns, name: str):
    """Keep the pair's columns only, images undecoded; refuse columns that cannot hold images."""
    table = table.select_columns([c for c in (*columns.images, columns.label, columns.caption) if c is not None])
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
    """The encoded bytes in a cell: bytes themselves, or an Image's {"bytes", "path"}."""
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


def _describe(name: str, split: str, columns: Columns, rows: int | None) -> str:
    size = "streamed" if rows is None else f"{rows} rows"
    better = f"{columns.images[0]} is the chosen image" if columns.label is None else f"label {columns.label}"
    return f"{name}, split {split}, {size}: images {' and '.join(columns.images)}, {better}, caption {columns.caption}"


def _identity(name: str, split: str, columns: Columns, rows: int | None) -> str:
    # A path's last name only: moving a data set, or naming it from another folder, is no other data set.
    return f"{name} split={split} rows={rows} columns={','.join(columns.images)},{columns.label},{columns.caption}"


def _looks_local(name: str) -> bool:
    return (
        name.startswith(("/", "./", "../", "~"))
        or name.count("/") > 1
        or Path(name).suffix in (".parquet", ".arrow", ".jsonl")
    )


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _as_bad_input(what: str) -> Iterator[None]:
    """Whatever `datasets` says of something it cannot open becomes one line, naming the cause behind its wrappers."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise BadInput(f"{what} cannot be opened: {_one_line(cause or error)}") from error
