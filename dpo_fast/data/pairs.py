"""Decide which rows of a source are for training, for validation, or left out; count and report the latter."""

import hashlib
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.data.columns import DISAGREE, UNLABELLED, Columns
from dpo_fast.data.images import SAME, BadImage
from dpo_fast.data.sources import BadRow, Source, StreamedRow
from dpo_fast.data.votes import count_votes
from dpo_fast.errors import BadInput
from dpo_fast.files import write_text

T = TypeVar("T")


class SaysNothing(Enum):
    """Why a row without an error is left out."""

    TIE = "tie"
    UNLABELLED = "no label"


class Usable(NamedTuple):
    """What a usable row says."""

    chosen: int  # which image is chosen, 0 or 1
    label: float  # how probably it is the better one, in [0.5, 1]


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
    """What became of a source's rows: rows = train + validation + ties_dropped + unlabelled + contradicted + bad_rows
    + shared_with_validation."""

    train: PairIndex
    validation: PairIndex
    rows: int
    ties_dropped: int
    shared_with_validation: int  # training pairs left out because validation has one of their images
    bad: list[BadRow]
    unlabelled: int = 0  # nobody gave a label
    # Known if the images have names, or are hashed because validation was requested; else None.
    contradicted: int | None = None  # rows left out because as many say the opposite of the same images and caption
    duplicates: int | None = None  # rows that repeat an earlier one; each is a vote, and trained on

    @property
    def bad_rows(self) -> int:
        return len(self.bad)

    @property
    def left_out(self) -> str:
        """Describe in words what was dropped and what repeats."""
        parts = [f"{self.ties_dropped} ties dropped"]
        parts += [f"{self.unlabelled} without a label dropped"] if self.unlabelled else []
        parts += [f"{self.contradicted} dropped because as many rows say the opposite"] if self.contradicted else []
        parts += [f"{self.duplicates} duplicates kept"] if self.duplicates else []
        if self.shared_with_validation:
            parts.append(f"{self.shared_with_validation} dropped for sharing an image with held-out pairs")
        return ", ".join([*parts, f"{self.bad_rows} bad"])


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
    for_scorers: bool = False,
) -> PairSets:
    """Sort a source's rows into training, validation and left out.

    Ties are dropped and counted, or kept with `soft_labels` (which allows any label in [0, 1]). Rows that Pick-a-Pic
    marks as unlabelled are dropped and counted, and so are votes that contradict each other, if images can be
    identified (see `votes`; with soft labels they stay). `for_scorers` keeps them all, since people's labels do not
    matter then.

    Rows without a caption, a label or an image file are bad rows; so are those whose two labels do not sum to 1, those
    with the same image twice, where that is known, and those of `check_pairs` evenly spaced pairs whose images do not
    decode or are the same. Bad rows are listed in `report_path`. A share of the captions goes to validation, picked by
    a hash of (seed, caption); training pairs that share an image with validation are left out.

    Raises BadInput for invalid labels, for a set with nothing left to train on, and when bad rows are more than
    `max_bad_fraction` of the rows examined.
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
        if len(faulty(found)) > max_bad_fraction * looked_at:
            raise too_many_bad(faulty(found), looked_at, max_bad_fraction, report_path)

    index, ties, unlabelled, unusable = _read_rows(source, soft_labels, for_scorers, progress)
    settle(unusable, rows)
    if len(index) == 0:
        raise nothing_to_train_on(source.description, rows, ties, unlabelled)

    spread = torch.linspace(0, len(index) - 1, min(check_pairs, len(index)), dtype=torch.float64).round().long()
    unusable = _each_pair(source.check_images, index.pair_id[spread], "Checking images", progress)[1]
    unusable = faulty(unusable) if for_scorers else unusable
    settle(unusable, len(spread))
    index = _without(index, unusable)

    validation, shared = index.keep(torch.zeros(len(index), dtype=torch.bool)), 0
    hashes: dict[int, tuple[bytes, bytes]] | None = None
    holding_out = validation_fraction > 0 and len(index) > 0
    if holding_out:
        held_out = _validation_captions(index.captions, validation_fraction, seed)
        hashes, unusable = _each_pair(source.image_keys, index.pair_id, "Hashing images", progress)
        settle(unusable, len(index))
        index = _without(index, unusable)
    same, contradicted, duplicates = [], None, None
    if not for_scorers:
        same, contradicted, duplicates = _find_recurring(source, index, hashes, progress)
    settle(same, len(index))
    if soft_labels:
        contradicted = contradicted and []
    index = _without(index, [*same, *(contradicted or ())])
    if holding_out:
        held = torch.tensor([_caption_key(caption) in held_out for caption in index.captions], dtype=torch.bool)
        seen = {digest for row in index.pair_id[held].tolist() for digest in hashes[row]}
        shares = torch.tensor([not seen.isdisjoint(hashes[row]) for row in index.pair_id.tolist()], dtype=torch.bool)
        validation, index, shared = index.keep(held), index.keep(~shares), int((shares & ~held).sum())
    contradictions = None if contradicted is None else len(contradicted)
    sets = PairSets(index, validation, rows, ties, shared, bad, unlabelled, contradictions, duplicates)
    if len(index) == 0:
        raise BadInput(
            f"{source.description}: no training pair is left, all share an image with validation, cannot be decoded or"
            f" say nothing ({sets.left_out}); lower --validation_fraction, or mend the set"
        )
    return sets


def judge_streamed(row: StreamedRow, columns: Columns, soft_labels: bool) -> Usable | SaysNothing | BadRow:
    """Like `read_row`, but a row is also bad if an image is missing or both are the same (by bytes or keys)."""
    verdict = read_row(row.row, row.caption, row.label, columns, soft_labels)
    if not isinstance(verdict, Usable):
        return verdict
    for image in row.images:
        if isinstance(image, BadImage):
            return BadRow(row.row, image.column, image.reason)
    return BadRow(row.row, columns.images[1], SAME) if row.images[0] == row.images[1] else verdict


def read_row(
    row: int, caption: Any, label: Any, columns: Columns, soft_labels: bool, keep_unlabelled: bool = False
) -> Usable | SaysNothing | BadRow:
    """Decide from a row's label and caption which image is chosen, or why the row is left out.

    Raises BadInput for a value that cannot be a label, because then the column means something else.
    """
    if label == UNLABELLED:
        if not keep_unlabelled:
            return SaysNothing.UNLABELLED
        label = 0.5
    if isinstance(label, dict) and DISAGREE in label:
        first, second = label[DISAGREE]
        if not keep_unlabelled:
            return BadRow(row, columns.label, f"({first:g}) and {columns.second_label} ({second:g}) do not sum to 1")
        label = 0.5
    if isinstance(label, dict) and "has_label" in label:
        raise BadInput(
            f"row {row}: {columns.has_label} is {label['has_label']!r:.200}; it must be true, false, 0, 1 or null:"
            " convert the column"
        )
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
        return SaysNothing.TIE
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return BadRow(row, columns.caption, "is empty")
    if not isinstance(caption, str) or not _is_utf8(caption):
        return BadRow(row, columns.caption, f"is not text ({caption!r:.200})")
    return Usable(0, float(label)) if label >= 0.5 else Usable(1, 1.0 - label)


def write_report(path: Path, bad: Iterable[BadRow]) -> None:
    """Write the bad rows as JSON lines of row, column and reason; an empty file means that there were none."""
    write_text(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in bad))


def faulty(bad: Iterable[BadRow]) -> list[BadRow]:
    """The bad rows that count against max_bad_fraction. Pairs of identical images are not errors: a data set may
    contain many, mostly ties."""
    return [row for row in bad if not row.reason.endswith(SAME)]


def too_many_bad(bad: Sequence[BadRow], looked_at: int, max_bad_fraction: float, report_path: Path | None) -> BadInput:
    """The error for more bad rows than allowed, naming the first few."""
    first = "; ".join(f"row {row}: {column} {reason}" for row, column, reason in bad[:3])
    listed = f" (all of them: {report_path})" if report_path is not None else ""
    return BadInput(
        f"{len(bad)} of {looked_at} rows cannot be used, more than --max_bad_fraction {max_bad_fraction:g}: "
        f"{first}{listed}; mend them or raise --max_bad_fraction"
    )


def nothing_to_train_on(description: str, rows: int, ties: int, unlabelled: int = 0) -> BadInput:
    """The error for a set with no usable pair."""
    without = f", {unlabelled} without a label" if unlabelled else ""
    why = (
        f"all {rows} rows are ties or unusable ({ties} ties{without}; --soft_labels trains on ties)"
        if rows
        else "it has no rows"
    )
    return BadInput(f"{description}: nothing to train on, {why}")


def _read_rows(
    source: Source, soft_labels: bool, keep_unlabelled: bool, progress: bool
) -> tuple[PairIndex, int, int, list[BadRow]]:
    """Judge every row by its caption, label and files, without reading an image.

    Returns the index, the number of ties, the number of unlabelled rows, and the bad rows.
    """
    unusable = {bad.row: bad for bad in source.missing_images(progress)}
    pair_id, chosen, label, captions = [], [], [], []
    nothing = dict.fromkeys(SaysNothing, 0)
    for row, (caption, stored) in enumerate(zip(source.captions(), source.labels(), strict=True)):
        verdict = read_row(row, caption, stored, source.columns, soft_labels, keep_unlabelled)
        if isinstance(verdict, SaysNothing):
            nothing[verdict] += 1
            unusable.pop(row, None)  # it is left out whatever its images are
        elif isinstance(verdict, BadRow):
            unusable[row] = verdict
        elif row not in unusable:
            pair_id.append(row)
            chosen.append(verdict.chosen)
            label.append(verdict.label)
            captions.append(caption)
    index = PairIndex(
        torch.tensor(pair_id, dtype=torch.int64),
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(label, dtype=torch.float32),
        captions,
    )
    return index, nothing[SaysNothing.TIE], nothing[SaysNothing.UNLABELLED], sorted(unusable.values())


def _find_recurring(
    source: Source, index: PairIndex, hashes: dict[int, tuple[bytes, bytes]] | None, progress: bool
) -> tuple[list[BadRow], list[BadRow] | None, int | None]:
    """Find pairs with the same image twice, pairs that contradict as many others, and the number of duplicates.

    Images are identified by `hashes` of their bytes, else by the source's names for them; since names may be wrong,
    pairs are then hashed before they are left out. The last two results are None if neither is known.
    """
    names = None if hashes is not None else source.image_names()
    if hashes is None and names is None:
        return [], None, None
    rows, chosen = index.pair_id.tolist(), index.chosen.tolist()

    def named(position: int) -> tuple | None:
        return names[rows[position]] if hashes is None else hashes[rows[position]]

    same = [k for k in range(len(rows)) if (pair := named(k)) is not None and pair[0] == pair[1]]
    votes = count_votes(index.captions, chosen, named)
    even = votes.even
    if hashes is None and (same or even):
        suspects = sorted({rows[k] for k in [*same, *(k for group in even for k in group)]})
        known, _ = _each_pair(source.image_keys, torch.tensor(suspects), "Comparing images", progress)
        same = [k for k in same if rows[k] in known and len(set(known[rows[k]])) == 1]
        even = [
            group
            for group in even
            if all(rows[k] in known for k in group)
            and count_votes([""] * len(group), [chosen[k] for k in group], lambda i, g=group: known[rows[g[i]]]).even
            == [list(range(len(group)))]
        ]
    left_out = [BadRow(rows[k], source.columns.label or "", "is contradicted") for group in even for k in group]
    return [BadRow(rows[k], source.columns.images[1], SAME) for k in same], sorted(left_out), votes.repeated


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
        for some in rows.split(256):  # a few at a time: Ctrl-C waits for what was submitted to the pool
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
    """False for text with half a surrogate pair, which JSON allows and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _caption_key(caption: str) -> str:
    """The key of a caption, shared by captions that differ only in case, spacing or Unicode composition.

    The key is in NFC. Normalising does not change ASCII captions, so their split does not depend on it.
    """
    folded = unicodedata.normalize("NFD", caption).casefold()  # composed letters do not always fold as their parts do
    return " ".join(unicodedata.normalize("NFC", folded).split())


def _validation_captions(captions: list[str], fraction: float, seed: int) -> set[str]:
    """Pick the distinct captions whose hash falls below `fraction`: at least one, never all.

    Raises BadInput if there are fewer than two distinct captions.
    """

    def place(caption: str) -> float:
        digest = hashlib.blake2b(f"{seed}\0{caption}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    places = sorted((place(caption), caption) for caption in {_caption_key(caption) for caption in captions})
    if len(places) < 2:
        raise BadInput("validation_fraction needs at least two different captions: this set has one, set it to 0")
    count = sum(position < fraction for position, _ in places)
    return {caption for _, caption in places[: min(max(count, 1), len(places) - 1)]}
