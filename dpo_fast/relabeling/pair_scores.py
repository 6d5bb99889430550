"""Preference pairs before scorers: both images of every pair scored, kept in parts on the disk as they come.

    FOLDER/pairs.json                       which images and captions these are
    FOLDER/<scorer>/rows-00000512.json      scores of the pairs among the rows 512 to 512 + PART_ROWS - 1

A part has fixed rows and is scored by itself, in batches that follow from its rows alone, so that what is there is
never scored again, and what another process or a later one scores is the same to the bit. It carries its digest, the
facts of its scorer, what the pairs are of, and of each row a mark of its caption and its images: what these no longer
fit is scored anew, and so is a part that was damaged. An image that occurs twice in a part with one caption is scored
once, so that a pair of equal images is a tie.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast import locks
from dpo_fast.checksums import delete_damaged, parse_signed, read_signed_json, write_signed_json
from dpo_fast.data import BadImage, BadRow, PairIndex, Source
from dpo_fast.data.images import decode, decoded_bytes, image_key
from dpo_fast.data.pairs import too_many_bad
from dpo_fast.errors import BadInput
from dpo_fast.files import read_bytes, remove_temporaries
from dpo_fast.parallel import Ranks
from dpo_fast.scorers import Scorer
from dpo_fast.scorers.by_size import batches_by_size
from dpo_fast.threads import Sized, ahead

PART_ROWS = 256  # of the source; what a killed process loses at most, on every rank
ROWS_AHEAD = 16  # read before they are needed
RECORD = "pairs.json"

Key = tuple[bytes, str]  # an image, by its hash, and its caption


@dataclass(frozen=True)
class Scores:
    """Scores of pairs, in the order of the source."""

    rows: np.ndarray  # int64 [n]: in the source
    of: dict[str, np.ndarray]  # scorer -> fp64 [n, 2], of image 0 and image 1
    bad: list[BadRow]  # rows whose images do not decode: they are not among `rows`
    scored_now: int  # pairs, by any scorer, over all ranks


class _Unit(NamedTuple):
    """A distinct image of a part with its caption, and where it was met first."""

    key: Key
    row: int
    column: str
    data: bytes


class _Part(NamedTuple):
    scores: dict[int, list[float]]  # row -> of image 0, of image 1
    bad: dict[int, BadRow]
    marks: dict[int, str]  # of all these rows


def score_pairs(
    source: Source,
    index: PairIndex,  # which rows, and their captions
    scorers: Mapping[str, Scorer],
    facts: Mapping[str, dict[str, str]],  # of each scorer, as `scorers.facts` has them now that it is loaded
    folder: Path,
    ranks: Ranks,
    *,
    batch_size: int,
    num_workers: int,
    max_bad_fraction: float,
    waiting: Callable[[str], None],
) -> Scores | None:
    """Score what `folder` does not hold yet, each rank its share of the parts; the main rank gets all scores.

    `waiting` is told that another process scores into the folder, which is waited for. Raises BadInput, on every rank,
    where the folder is of other images and captions, where more than `max_bad_fraction` of the rows do not decode, and
    for what a scorer cannot judge.
    """
    work = PairScoring(source, index, scorers, facts, folder, batch_size, max_bad_fraction)
    with ExitStack() as held:

        def begin() -> None:
            otherwise = "wait until it is done, or name another --scores_dir"
            held.enter_context(locks.hold(folder, otherwise=otherwise, waiting=waiting))
            _claim(folder, source)

        ranks.on_main(begin)
        missing = [first for first in work.parts if work.missing(first)]
        ranks.wait()  # every rank has seen the same parts before one of them writes
        mine = missing[ranks.rank :: ranks.world_size]
        ranks.on_all(lambda: work.score_all(mine, num_workers, _title(ranks)))
        done = sum(ranks.gather(sum(len(work.parts[first]) for first in mine)))
        return ranks.on_main(lambda: work.collect(done))


def _title(ranks: Ranks) -> str | None:
    """The title of the progress bar, which the main rank shows."""
    if not ranks.is_main:
        return None
    return "Scoring pairs" if ranks.world_size == 1 else "Scoring pairs, this process's share"


def _claim(folder: Path, source: Source) -> None:
    """Make the folder one of these images and captions, or raise BadInput where it is of others."""
    this, record = {"contents": source.contents()}, folder / RECORD
    if not record.is_file():
        write_signed_json(record, this)
    before = read_signed_json(record, f"put it back from a copy, or delete {folder}, or name another --scores_dir")
    if before != this:
        raise BadInput(
            f"{folder} holds scores of other pairs, or of these before they changed ({before}; now {this}): delete it,"
            " or name another --scores_dir"
        )
    remove_temporaries(folder, deep=True)
    for entry in folder.iterdir():
        if entry.is_dir():
            delete_damaged(sorted(entry.glob("rows-*.json")), "its rows are scored again")


class PairScoring:
    """The scoring of one set, as one rank sees it."""

    def __init__(
        self,
        source: Source,
        index: PairIndex,
        scorers: Mapping[str, Scorer],
        facts: Mapping[str, dict[str, str]],
        folder: Path,
        batch_size: int,
        max_bad_fraction: float,
    ) -> None:
        self.source, self.scorers, self.facts, self.folder = source, scorers, facts, folder
        self.batch_size, self.max_bad_fraction, self.pairs = batch_size, max_bad_fraction, len(index)
        self.contents = source.contents()
        self.captions = dict(zip(index.pair_id.tolist(), index.captions, strict=True))
        self.parts: dict[int, list[int]] = defaultdict(list)  # first row -> the rows to score
        for row in self.captions:
            self.parts[row - row % PART_ROWS].append(row)
        self.marks = {row: _mark(source.row_stamp(row), caption) for row, caption in self.captions.items()}
        self.bad: dict[int, BadRow] = {}  # met by this rank

    def missing(self, first: int) -> list[str]:
        """The scorers that have not judged all rows of a part."""
        return [name for name in self.scorers if self._judged(name, first) is None]

    def collect(self, scored_now: int) -> Scores:
        """All parts' scores."""
        of: dict[str, dict[int, list[float]]] = {name: {} for name in self.scorers}
        bad: dict[int, BadRow] = {}
        for name in self.scorers:
            for first in self.parts:
                part = self._judged(name, first)
                if part is None:
                    raise BadInput(
                        f"{self.folder} lacks scores that another process has written: it must be on a disk that all"
                        " processes share; name one with --scores_dir"
                    )
                of[name] |= part.scores
                bad |= {row: wrong for row, wrong in part.bad.items() if row in self.captions}
        self._refuse_too_many(bad)
        rows = [row for row in self.captions if row not in bad]
        arrays = {name: np.array([scores[row] for row in rows]).reshape(-1, 2) for name, scores in of.items()}
        return Scores(np.array(rows, dtype=np.int64), arrays, sorted(bad.values()), scored_now)

    def score_all(self, parts: Sequence[int], num_workers: int, title: str | None) -> None:
        """Score these parts and write each."""
        total = sum(len(self.parts[first]) for first in parts)
        bar = tqdm(total=total, desc=title, unit=" pairs", disable=not (title and parts))
        pool = ThreadPoolExecutor(num_workers)
        try:
            for first in parts:
                self.score(first, pool)
                bar.update(len(self.parts[first]))
        finally:
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def score(self, first: int, pool: ThreadPoolExecutor) -> None:
        """Score a part by the scorers that have not, and write it."""
        rows, names = self.parts[first], self.missing(first)
        keys: dict[int, list[Key]] = {}
        bad: dict[int, BadRow] = {}
        faults: dict[Key, str] = {}
        values: dict[Key, dict[str, float]] = {}

        def decoded() -> Iterator[tuple[_Unit, Tensor]]:
            units = self._units(rows, keys, bad, pool)
            plans = (Sized(partial(_pixels, unit), decoded_bytes(unit.data)) for unit in units)
            for unit, pixels in ahead(pool, plans, 2 * self.batch_size):
                if isinstance(pixels, BadImage):
                    faults[unit.key] = pixels.reason
                else:
                    yield unit, pixels

        def judge(batch: list[tuple[_Unit, Tensor]]) -> None:
            units = [unit for unit, _ in batch]
            images, captions = torch.stack([pixels for _, pixels in batch]), [unit.key[1] for unit in units]
            for name in names:
                scores = self.scorers[name].score(images, captions).tolist()
                for unit, score in zip(units, scores, strict=True):
                    if not np.isfinite(score):
                        raise BadInput(f"scorer {name} gives {score} for row {unit.row}: {unit.column}; leave it out")
                    values.setdefault(unit.key, {})[name] = score

        for batch in batches_by_size(decoded(), lambda one: one[1].shape, self.batch_size):
            judge(batch)

        for row, pair in keys.items():
            wrong = [side for side in (0, 1) if pair[side] in faults]
            if wrong:
                bad[row] = BadRow(row, self.source.columns.images[wrong[0]], faults[pair[wrong[0]]])
        for name in names:
            scores = {row: [values[key][name] for key in pair] for row, pair in keys.items() if row not in bad}
            self._write(name, first, scores, bad)
        self.bad |= bad
        self._refuse_too_many(self.bad)

    def _units(
        self, rows: Sequence[int], keys: dict[int, list[Key]], bad: dict[int, BadRow], pool: ThreadPoolExecutor
    ) -> Iterator[_Unit]:
        """The distinct images of some rows; fills `keys`, or `bad` where an image is not there."""
        seen: set[Key] = set()
        for row, images in ahead(pool, (partial(self._images, row) for row in rows), ROWS_AHEAD):
            if isinstance(images, BadRow):
                bad[row] = images
                continue
            keys[row] = [(image_key(data), self.captions[row]) for data in images]
            for key, column, data in zip(keys[row], self.source.columns.images, images, strict=True):
                if key not in seen:
                    seen.add(key)
                    yield _Unit(key, row, column, data)

    def _images(self, row: int) -> tuple[int, tuple[bytes, bytes] | BadRow]:
        try:
            return row, self.source.image_bytes(row)
        except BadImage as error:
            return row, BadRow(row, error.column, error.reason)

    def _refuse_too_many(self, bad: Mapping[int, BadRow]) -> None:
        if len(bad) > self.max_bad_fraction * self.pairs:
            raise too_many_bad(sorted(bad.values()), self.pairs, self.max_bad_fraction, None)

    # ---- parts on the disk ---------------------------------------------------------------------------------------

    def _path(self, name: str, first: int) -> Path:
        return self.folder / name / f"rows-{first:08d}.json"

    def _judged(self, name: str, first: int) -> _Part | None:
        """A part's scores; None where any of its rows was not judged as it is now."""
        part = self._read(name, first)
        return part if all(part.marks.get(row) == self.marks[row] for row in self.parts[first]) else None

    def _read(self, name: str, first: int) -> _Part:
        """A part as it was written, by this very scorer; an empty one where it is not there, or damaged."""
        try:
            content = parse_signed(read_bytes(self._path(name, first)))
            if (content["about"], content["contents"]) != (self.facts[name], self.contents):
                return _Part({}, {}, {})
            bad = {row: BadRow(row, column, reason) for row, column, reason in content["bad"]}
            scores = {row: [float(a), float(b)] for row, (a, b) in zip(content["rows"], content["scores"], strict=True)}
            return _Part(scores, bad, dict(zip([*scores, *bad], content["marks"], strict=True)))
        except (FileNotFoundError, ValueError, LookupError, TypeError, OverflowError):
            return _Part({}, {}, {})

    def _write(self, name: str, first: int, scores: dict[int, list[float]], bad: dict[int, BadRow]) -> None:
        """Write a part, keeping the scores of rows outside this set, which another set may have."""
        before = self._read(name, first)
        scores = scores | {row: both for row, both in before.scores.items() if row not in self.marks}
        bad = bad | {row: wrong for row, wrong in before.bad.items() if row not in self.marks}
        content = {
            "about": self.facts[name],
            "contents": self.contents,
            "rows": [*scores],
            "scores": [*scores.values()],
            "bad": [*bad.values()],
            "marks": [self.marks.get(row) or before.marks[row] for row in (*scores, *bad)],
        }
        write_signed_json(self._path(name, first), content, indent=None)


def _mark(stamp: str, caption: str) -> str:
    """What tells a row from what it was before."""
    return hashlib.blake2b(f"{stamp}\n{caption}".encode(errors="replace"), digest_size=8).hexdigest()


def _pixels(unit: _Unit) -> tuple[_Unit, Tensor | BadImage]:
    """An image decoded: uint8 [3,H,W], of its own size, upright and over white."""
    try:
        pixels = np.array(decode(unit.data))
    except BadImage as error:
        return unit, error
    return unit, torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
