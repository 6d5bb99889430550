"""Which rows of a source train, which validate, and which are left out, counted and reported."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.data.columns import Columns
from dpo_fast.data.images import BadImage
from dpo_fast.data.sources import BadRow, Source
from dpo_fast.errors import BadInput
from dpo_fast.files import write_text

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PairIndex:
    """The pairs of one split, in the order of the source."""

    pair_id: Tensor  # int64 [n]: the row in the source, before any filtering
    chosen: Tensor  # int64 [n]: which of the row's two images is the chosen one, 0 or 1
    label: Tensor  # fp32 [n]: how probable it is that the chosen image is the better one, in [0.5, 1]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def keep(self, kept: Tensor) -> "PairIndex":
        """The pairs where `kept` (bool [n]) is true."""
        captions = [caption for caption, keep in zip(self.captions, kept.tolist(), strict=True) if keep]
        return PairIndex(self.pair_id[kept], self.chosen[kept], self.label[kept], captions)


@dataclass(frozen=True, eq=False)
class PairSets:
    """What became of a source's rows: rows = train + validation + ties_dropped + bad_rows + shared_with_validation."""

    train: PairIndex
    validation: PairIndex
    rows: int
    ties_dropped: int
    shared_with_validation: int  # training pairs left out because validation has one of their images
    bad: list[BadRow]

    @property
    def bad_rows(self) -> int:
        return len(self.bad)


def build_index(
    source: Source,
    *,
    seed: int,
    soft_labels: bool = False,
    max_bad_fraction: float = 0.01,
    validation_fraction: float = 0.0,
    report_path: Path | None = None,
    check_pairs: int = 1000,
    progress: bool = True,
) -> PairSets:
    """Sort a source's rows into training, validation and left out.

    Ties are dropped and counted, or kept with `soft_labels` (which allows any label in [0, 1]). Rows without a caption,
    a label or an image file are bad rows; so are those of `check_pairs` evenly spaced pairs whose images do not decode.
    Bad rows are listed in `report_path`. A share of the captions goes to validation, picked by a hash of (seed,
    caption); training pairs that share an image with validation are left out.

    Raises BadInput for labels that are no labels, for a set in which nothing is left to train on, and when bad rows are
    more than `max_bad_fraction` of the rows looked at.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise BadInput(f"max_bad_fraction ({max_bad_fraction}) must be from 0 to 1")
    if not 0 <= validation_fraction < 1:
        raise BadInput(f"validation_fraction ({validation_fraction}) must be at least 0 and less than 1")
    rows = len(source)
    bad: list[BadRow] = []

    def settle(found: list[BadRow], looked_at: int) -> None:
        bad.extend(found)
        if report_path is not None:
            write_report(report_path, bad)
        if len(found) > max_bad_fraction * looked_at:
            raise too_many_bad(found, looked_at, max_bad_fraction, report_path)

    index, ties, unusable = _read_rows(source, soft_labels, progress)
    settle(unusable, rows)
    if len(index) == 0:
        raise nothing_to_train_on(source.description, rows, ties)

    spread = torch.linspace(0, len(index) - 1, min(check_pairs, len(index)), dtype=torch.float64).round().long()
    unusable = _each_pair(source.check_images, index.pair_id[spread], "Checking images", progress)[1]
    settle(unusable, len(spread))
    index = _without(index, unusable)

    validation, shared = index.keep(torch.zeros(len(index), dtype=torch.bool)), 0
    if validation_fraction > 0:
        held_out = _validation_captions(index.captions, validation_fraction, seed)
        hashes, unusable = _each_pair(source.image_keys, index.pair_id, "Hashing images", progress)
        settle(unusable, len(index))
        index = _without(index, unusable)
        held = torch.tensor([_caption_key(caption) in held_out for caption in index.captions], dtype=torch.bool)
        seen = {digest for row in index.pair_id[held].tolist() for digest in hashes[row]}
        shares = torch.tensor([not seen.isdisjoint(hashes[row]) for row in index.pair_id.tolist()], dtype=torch.bool)
        validation, index, shared = index.keep(held), index.keep(~shares), int((shares & ~held).sum())
    if len(index) == 0:
        raise BadInput(
            f"{source.description}: no training pair is left, all share an image with validation or cannot be decoded; "
            "lower --validation_fraction"
        )
    return PairSets(index, validation, rows, ties, shared, bad)


def read_row(
    row: int, caption: Any, label: Any, columns: Columns, soft_labels: bool
) -> tuple[int, float] | BadRow | None:
    """Which image of a row is chosen (0 or 1) and how probably it is the better one; None is a tie that is dropped.

    Raises BadInput where the label is not one at all, for then the column means something else.
    """
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return BadRow(row, columns.label or "", "has no label")
    if not isinstance(label, (int, float)):
        raise BadInput(
            f"row {row}: {columns.label} is {label!r}, not a number; name the label column with --label_column"
        )
    if not 0 <= label <= 1:
        raise BadInput(
            f"row {row}: {columns.label} is {label}; labels are 1 (first image better), 0 (second) or 0.5 (tie)"
        )
    if not soft_labels and label not in (0, 0.5, 1):
        raise BadInput(
            f"row {row}: {columns.label} is {label}, neither 0, 0.5 nor 1; --soft_labels trains on it as a probability"
        )
    if label == 0.5 and not soft_labels:
        return None
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return BadRow(row, columns.caption, "is empty")
    if not isinstance(caption, str) or not _is_utf8(caption):
        return BadRow(row, columns.caption, f"is not text ({caption!r:.200})")
    return (0, float(label)) if label >= 0.5 else (1, 1.0 - label)


def write_report(path: Path, bad: Iterable[BadRow]) -> None:
    """The bad rows as JSON lines of row, column and reason; an empty file says that there were none."""
    write_text(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in bad))


def too_many_bad(bad: Sequence[BadRow], looked_at: int, max_bad_fraction: float, report_path: Path | None) -> BadInput:
    """The error for more bad rows than allowed, naming the first few."""
    first = "; ".join(f"row {row}: {column} {reason}" for row, column, reason in bad[:3])
    listed = f" (all of them: {report_path})" if report_path is not None else ""
    return BadInput(
        f"{len(bad)} of {looked_at} rows cannot be used, more than --max_bad_fraction {max_bad_fraction:g}: "
        f"{first}{listed}; mend them or raise --max_bad_fraction"
    )


def nothing_to_train_on(description: str, rows: int, ties: int) -> BadInput:
    """The error for a set with no usable pair."""
    why = (
        f"all {rows} rows are ties or unusable ({ties} ties; --soft_labels trains on ties)"
        if rows
        else "it has no rows"
    )
    return BadInput(f"{description}: nothing to train on, {why}")


def _read_rows(source: Source, soft_labels: bool, progress: bool) -> tuple[PairIndex, int, list[BadRow]]:
    """Judge every row by its caption, label and files, without reading an image: the index, the ties, the bad rows."""
    unusable = {bad.row: bad for bad in source.missing_images(progress)}
    pair_id, chosen, label, captions, ties = [], [], [], [], 0
    for row, (caption, stored) in enumerate(zip(source.captions(), source.labels(), strict=True)):
        verdict = read_row(row, caption, stored, source.columns, soft_labels)
        if verdict is None:
            ties += 1
            unusable.pop(row, None)  # a tie is left out whatever its images are
        elif isinstance(verdict, BadRow):
            unusable[row] = verdict
        elif row not in unusable:
            pair_id.append(row)
            chosen.append(verdict[0])
            label.append(verdict[1])
            captions.append(caption)
    index = PairIndex(
        torch.tensor(pair_id, dtype=torch.int64),
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(label, dtype=torch.float32),
        captions,
    )
    return index, ties, sorted(unusable.values())


def _each_pair(
    function: Callable[[int], T], rows: Tensor, title: str, progress: bool
) -> tuple[dict[int, T], list[BadRow]]:
    """Apply `function` to each row, in threads: row -> result, and the rows where it raised BadImage."""

    def one(row: int) -> T | BadRow:
        try:
            return function(row)
        except BadImage as error:
            return BadRow(row, error.column, error.reason)

    done: dict[int, T] = {}
    failed: list[BadRow] = []
    bar = tqdm(total=len(rows), desc=title, unit=" pairs", disable=not progress)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for some in rows.split(256):  # a few at a time: Ctrl-C waits for what is handed to the pool
            for row, result in zip(some.tolist(), pool.map(one, some.tolist()), strict=True):
                if isinstance(result, BadRow):
                    failed.append(result)
                else:
                    done[row] = result
                bar.update()
    return done, failed


def _without(index: PairIndex, bad: list[BadRow]) -> PairIndex:
    return index.keep(~torch.isin(index.pair_id, torch.tensor([row.row for row in bad], dtype=torch.int64)))


def _is_utf8(text: str) -> bool:
    """False for half a surrogate pair, which JSON lets through and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _caption_key(caption: str) -> str:
    """Captions that differ in case or spacing only are one prompt."""
    return " ".join(caption.casefold().split())


def _validation_captions(captions: list[str], fraction: float, seed: int) -> set[str]:
    """The share of the distinct captions whose hash falls below `fraction`; at least one, and never all."""

    def place(caption: str) -> float:
        digest = hashlib.blake2b(f"{seed}\0{caption}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    places = sorted((place(caption), caption) for caption in {_caption_key(caption) for caption in captions})
    if len(places) < 2:
        raise BadInput("validation_fraction needs at least two different captions: this set has one, set it to 0")
    count = sum(position < fraction for position, _ in places)
    return {caption for _, caption in places[: min(max(count, 1), len(places) - 1)]}
