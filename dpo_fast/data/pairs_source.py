"""Where preference pairs come from: the hub, parquet and Arrow files, saved data sets, folders with JSONL.

Three layouts are understood:

    Pick-a-Pic   jpg_0, jpg_1, label_0 (1: jpg_0 is better, 0: jpg_1 is, 0.5: a tie), caption
    preference   prompt, chosen, rejected; the last two hold images
    JSONL        a folder with SPLIT.jsonl of {"prompt": ..., "chosen": path, "rejected": path}, paths relative to it

`image_columns`, `label_column` and `caption_column` name other columns in any of them.
"""

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import datasets
import pyarrow.parquet as pq

from dpo_fast.data.columns import LAYOUTS, WantedColumns
from dpo_fast.data.relabelled import check_labels
from dpo_fast.data.sources import JsonlSource, Source, StreamedSource, TableSource, as_bad_input, stamp_of
from dpo_fast.errors import BadInput
from dpo_fast.files import exists, is_inside, read_json, regular_file, regular_files, user_path


class PairsOptions(Protocol):
    """The flags of a command that reads pairs."""

    dataset_name: str
    dataset_config_name: str | None
    dataset_split_name: str | None
    image_columns: tuple[str, str] | None
    label_column: str | None
    caption_column: str | None
    cache_dir: str | None
    hub_token: str | None


@dataclass(frozen=True)
class PairsSource:
    """Which preference pairs to read, and how."""

    name: str | Path  # a hub id, a .parquet / .arrow / .jsonl file, a folder of such files, or a save_to_disk folder
    config_name: str | None = None  # of a hub data set
    split: str | None = None  # None: train (a single file always is), else the only one
    image_columns: tuple[str, str] | None = None  # the label is about the first
    label_column: str | None = None  # default: label_0, but "none" (the first is better) for chosen, rejected
    caption_column: str | None = None
    streaming: bool = False  # read in order, without downloading everything first
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | None = None
    max_rows: int | None = None  # use only the first rows

    @classmethod
    def of(cls, options: PairsOptions, *, max_rows: int | None, streaming: bool = False) -> "PairsSource":
        """The pairs that a command's flags name."""
        return cls(
            options.dataset_name,
            options.dataset_config_name,
            options.dataset_split_name,
            options.image_columns,
            options.label_column,
            options.caption_column,
            streaming=streaming,
            cache_dir=options.cache_dir,
            token=options.hub_token,
            max_rows=max_rows,
        )


def open_source(source: PairsSource) -> "Source | StreamedSource":
    """Open the pairs; with `streaming` the result is a `StreamedSource`.

    Raises BadInput for a data set that cannot be found, opened or understood.
    """
    max_rows, streaming, cache_dir, split = source.max_rows, source.streaming, source.cache_dir, source.split
    if max_rows is not None and max_rows < 1:
        raise BadInput(f"max_train_samples ({max_rows}) must be at least 1")
    wanted = WantedColumns(source.image_columns, source.label_column, source.caption_column)
    path = user_path(source.name)
    if exists(path):
        if source.config_name or source.revision:
            raise BadInput(
                f"config_name and revision belong to hub data sets, and {str(path)!r} is on this disk: leave them out"
            )
        name = path.resolve().name
        shards, root = _local_splits(path)
        split = _pick_split(split, list(shards), name)
        if root is not None:
            opened = JsonlSource(name, split, shards[split], root, wanted, max_rows)
            return StreamedSource.over(opened) if streaming else opened
        table, files = _load_local(shards[split], streaming, cache_dir), shards[split]
    elif _looks_local(str(source.name)):
        raise BadInput(
            f"data set {str(source.name)!r} does not exist: give an existing file or folder, or a hub id (owner/name)"
        )
    else:
        name = str(source.name)
        with as_bad_input(f"data set {name!r}"), _hub_advice():
            root = _cache_root(cache_dir)
            # Choose the split first: loading without one would download them all.
            hub = {"revision": source.revision, "token": source.token}
            split = _pick_split(split, datasets.get_dataset_split_names(name, source.config_name, **hub), name)
            kept = root if cache_dir is not None else None
            table = datasets.load_dataset(
                name, source.config_name, split=split, streaming=streaming, cache_dir=kept, **hub
            )
            files = []
            name = f"{name}/{source.config_name}" if source.config_name else name
            name = f"{name}@{source.revision}" if source.revision else name
    if streaming:
        files = [file for path in files for file in (sorted(path.rglob("*.arrow")) if path.is_dir() else [path])]
        return StreamedSource.of_table(name, split, table, wanted, max_rows, files)
    return TableSource(name, split, table, wanted, max_rows)


class NotFetched(NamedTuple):
    """A data set of the hub that would have to be downloaded first, as far as the hub describes it."""

    rows: int | None  # of the split
    download: int | None  # bytes, of all its splits
    size: int | None  # bytes on disk once it is unpacked


def not_fetched(source: PairsSource) -> NotFetched | None:
    """Return what the hub says of a data set that `open_source` would download; None if it would download nothing.

    Raises BadInput like `open_source`.
    """
    name = str(source.name)
    if source.streaming or is_local(name):
        return None
    with as_bad_input(f"data set {name!r}"), _hub_advice():
        root = _cache_root(source.cache_dir)
        kept = root if source.cache_dir is not None else None
        hub = {"revision": source.revision, "token": source.token}
        builder = datasets.load_dataset_builder(name, source.config_name, cache_dir=kept, **hub)
        if os.path.isdir(builder.cache_dir):
            return None
        splits = builder.info.splits or {}
        split = splits.get(_pick_split(source.split, list(splits), name)) if splits else None
    return NotFetched(split.num_examples if split else None, builder.info.download_size, builder.info.dataset_size)


@contextmanager
def _hub_advice() -> Iterator[None]:
    """Add what to do to the error of a data set that the hub cannot be asked for."""
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"{error}; name a local file or folder with --dataset_name") from error


def stream_columns(path: Path, columns: list[str], *, split: str | None = None) -> datasets.IterableDataset:
    """Stream the rows of a local set of parquet or Arrow files; of parquet files only `columns` are read.

    Raises BadInput for files that cannot be opened and for a split that does not exist.
    """
    shards, root = _local_splits(path)
    split = _pick_split(split, list(shards), path.name)
    if root is not None:
        raise BadInput(f"data set {str(path)!r} holds JSONL: name a .parquet or .arrow file, or a folder of them")
    return _load_local(shards[split], True, None, columns)


def split_names(path: Path) -> list[str]:
    """The split names of a local data set. Raises BadInput for a path that holds none."""
    return list(_local_splits(path)[0])


def is_local(name_or_path: str | Path) -> bool:
    """Whether a name is a local path, existing or not, rather than a hub id."""
    return exists(user_path(name_or_path)) or _looks_local(str(name_or_path))


def _local_splits(path: Path) -> tuple[dict[str, list[Path]], Path | None]:
    """Map split names to files (a save_to_disk folder counts as one); for JSONL also return the images' root folder."""
    if path.resolve() == Path(path.resolve().anchor):
        raise BadInput(f"data set {str(path)!r} is the root of the file system: name the folder of the data set")
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow", ".jsonl"):
            raise BadInput(f"data set {str(path)!r} is not a .parquet, .arrow or .jsonl file; accepted: {LAYOUTS}")
        return {"train": [path]}, path.parent if path.suffix == ".jsonl" else None
    if not path.is_dir():
        regular_file(path)
    if (path / "dataset_dict.json").is_file():
        with as_bad_input(f"data set {str(path)!r}"):
            names = read_json(path / "dataset_dict.json")["splits"]
            if not isinstance(names, list) or not names or not all(is_inside(split) for split in names):
                raise ValueError("dataset_dict.json names no splits of this folder")
            return {split: [path / split] for split in names}, None
    if (path / "state.json").is_file():
        return {"train": [path]}, None
    for pattern in ("*.jsonl", "**/*.parquet", "**/*.arrow"):
        splits: dict[str, list[Path]] = {}
        with as_bad_input(f"folder {str(path)!r}"):
            found = sorted(path.glob(pattern))
        for file in found:
            splits.setdefault(_split_of(file, path), []).append(regular_file(file))
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
    if wanted is None and "train" in splits:
        return "train"
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted not in splits:
        raise BadInput(
            f"data set {name!r} has no split {wanted or 'train'!r}: "
            f"choose one of its splits with --dataset_split_name: {', '.join(splits)}"
        )
    return wanted


def _load_local(
    files: list[Path], streaming: bool, cache_dir: str | Path | None, columns: list[str] | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the rows of files of one kind; of parquet files only `columns`, if given."""
    with as_bad_input(f"data set {str(files[0])!r}"), _quiet(files):
        root = _cache_root(cache_dir)
        if files[0].is_dir():
            regular_files(files[0])
            _check_saved(files[0])
            table = datasets.load_from_disk(_literal(files[0], root))
            return table.to_iterable_dataset() if streaming else table
        kind = files[0].suffix[1:]  # "parquet" and "arrow" are also the loaders' names
        if kind == "parquet":  # the loader fails on files without rows
            filled = [file for file in files if pq.read_metadata(os.path.abspath(file)).num_rows]
            if not filled:
                raise BadInput(f"data set {str(files[0])!r} is empty: it has no rows")
            files = filled
            for file in files:
                check_labels(file)
        only = {"columns": columns} if columns and kind == "parquet" else {}
        return datasets.load_dataset(
            kind,
            data_files={"train": [glob.escape(_literal(file, root)) for file in files]},
            split="train",
            streaming=streaming,
            cache_dir=root if cache_dir is not None else None,
            **only,
        )


def _check_saved(folder: Path) -> None:
    """Raise ValueError if the state.json of a save_to_disk folder names files outside it."""
    files = read_json(folder / "state.json")["_data_files"]
    if not all(is_inside(file["filename"]) for file in files):
        raise ValueError("state.json names files outside the folder")


def _cache_root(cache_dir: str | Path | None) -> str:
    """The folder where `datasets` keeps its copies. Raises BadInput for a path with `::`, which it would misread."""
    root = _absolute(datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir)
    if "::" in root:
        raise BadInput(
            f"the cache of data sets ({root}) cannot be used: a name with '::' means a chain of file systems to the"
            " library `datasets`; name another folder with --cache_dir, or HF_HOME"
        )
    return root


def _literal(file: Path, root: str) -> str:
    """Return a path by which `datasets` opens exactly `file`.

    `datasets` takes a relative `a:b` for a URL, `::` for a chain of file systems, and `$x` for an environment variable.
    A file with `::` or `$` in its path gets a link beside the Arrow copies under `root`. The link is named by a hash of
    the file's path, size and modification time, so that each state of the file gets one copy. Raises BadInput if a link
    is needed and `root` has a `$` too.
    """
    name = _absolute(file)
    if "::" not in name and "$" not in name:
        return name
    if "$" in root:
        raise BadInput(
            f"{name!r} needs a link in the cache of data sets ({root}), whose own name has a '$', which the library"
            " `datasets` takes for a variable; name another folder with --cache_dir, or HF_HOME"
        )
    folder = Path(root, "dpo_fast-links")
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"{stamp_of([name])}{file.suffix}"
    if not link.is_symlink() or os.readlink(link) != name:
        temporary = Path(tempfile.mkdtemp(dir=folder), link.name)
        temporary.symlink_to(name)
        os.replace(temporary, link)
        temporary.parent.rmdir()
    return str(link)


def _absolute(name: str | Path) -> str:
    """Return a name unchanged, or its absolute path if the name could be taken for a URL or a home folder, or needs a
    link (see `_literal`)."""
    return os.path.abspath(user_path(name)) if re.search(r"^~|[:$]", str(name)) else str(name)


@contextmanager
def _quiet(files: list[Path]) -> Iterator[None]:
    """Hide the progress bars of `datasets` for work of a few seconds: they say nothing and hide our own."""
    small = sum(file.stat().st_size for file in files) < 1 << 30
    if not small or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _looks_local(name: str) -> bool:
    return (
        name.startswith(("/", "./", "../", "~"))
        or name.count("/") > 1
        or Path(name).suffix in (".parquet", ".arrow", ".jsonl")
    )
