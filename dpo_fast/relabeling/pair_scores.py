"""Score both images of every preference pair, in parts, keeping scores on disk as they are computed.

FOLDER/<scorer>-<hash>/ is a store (`dpo_fast.store`) with a record for each row of the source: the scores of its two
images, or why one of them does not decode. The hash is of the scorer's facts and of the pairs' source; the key of
a record is a hash of the row, its caption and the state of its image files.

A part has fixed rows and is scored on its own, in batches that depend on its rows alone, so that another process, or a
later one, gets bit-identical scores. An image that occurs twice in a part with the same caption is scored once, so that
a pair of equal images is a tie.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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

from dpo_fast.data import BadImage, BadRow, PairIndex, Source
from dpo_fast.data.images import decode, decoded_bytes, image_key
from dpo_fast.data.pairs import too_many_bad
from dpo_fast.errors import BadInput
from dpo_fast.parallel import Ranks
from dpo_fast.scorers import Scorer
from dpo_fast.scorers.by_size import batches_by_size
from dpo_fast.scorers.kept_scores import warn_of_older_scores
from dpo_fast.store import KEY_BYTES, Field, Recipe, Remedies, Store, Writer, log_keys, mend
from dpo_fast.threads import Sized, ahead

PART_ROWS = 256  # of the source; the most that a killed process loses on each rank, and a damaged file
ROWS_AHEAD = 16  # read before they are needed
FIELDS = (Field("scores", (2,), "float64"),)  # of image 0 and image 1; NaN where one of them does not decode
REMEDIES = Remedies("--scores_dir", "the folder of the scores", "name another --scores_dir")

Key = tuple[bytes, str]  # an image's hash and its caption


@dataclass(frozen=True)
class Scores:
    """Scores of pairs, in the order of the source."""

    rows: np.ndarray  # int64 [n]: indices in the source
    of: dict[str, np.ndarray]  # scorer -> fp64 [n, 2], of image 0 and image 1
    bad: list[BadRow]  # rows whose images do not decode; not among `rows`
    scored_now: int  # pairs scored by this call, with any scorer, over all ranks


class _Unit(NamedTuple):
    """A distinct image of a part with its caption, and the row and column where it first occurs."""

    key: Key
    row: int
    column: str
    data: bytes


def score_pairs(
    source: Source,
    index: PairIndex,  # which rows, and their captions
    scorers: Mapping[str, Scorer],
    facts: Mapping[str, dict[str, str]],  # of each scorer: `scorers.facts`, read after loading it
    folder: Path,
    ranks: Ranks,
    *,
    batch_size: int,
    num_workers: int,
    max_bad_fraction: float,
) -> Scores | None:
    """Score what `folder` does not have yet, each rank its share of the parts; return all scores on the main rank.

    Other ranks get None. The caller holds the folder (`locks.hold`). Raises BadInput, on every rank, if more than
    `max_bad_fraction` of the rows do not decode, and for what a scorer cannot judge.
    """
    work = PairScoring(source, index, scorers, facts, folder, batch_size, max_bad_fraction)

    def begin() -> None:
        warn_of_older_scores(folder, scorers)
        for recipe in work.recipes.values():
            mend(folder, recipe, ranks.world_size)

    ranks.on_main(begin)
    writers = ranks.on_all(lambda: work.open_writers(ranks.rank))  # which resume this rank's unfinished shards
    ranks.on_all(work.find_scored)
    missing = [first for first in work.parts if work.missing(first)]
    ranks.wait()  # every rank has seen the same parts before one of them writes
    mine = missing[ranks.rank :: ranks.world_size]
    ranks.on_all(lambda: work.score_all(mine, writers, num_workers, _title(ranks)))
    done = sum(ranks.gather(sum(len(work.parts[first]) for first in mine)))
    return ranks.on_main(lambda: work.collect(done))


def _title(ranks: Ranks) -> str | None:
    """The title of the progress bar, which the main rank shows."""
    if not ranks.is_main:
        return None
    return "Scoring pairs" if ranks.world_size == 1 else "Scoring pairs, this process's share"


class PairScoring:
    """The scoring of one data set, as one rank sees it."""

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
        self.source, self.scorers, self.folder = source, scorers, folder
        self.batch_size, self.max_bad_fraction, self.pairs = batch_size, max_bad_fraction, len(index)
        self.recipes = {
            name: Recipe(name, {**facts[name], "pairs": source.identity.images}, FIELDS, REMEDIES) for name in scorers
        }
        self.captions = dict(zip(index.pair_id.tolist(), index.captions, strict=True))
        self.parts: dict[int, list[int]] = defaultdict(list)  # first row -> the rows to score
        for row in self.captions:
            self.parts[row - row % PART_ROWS].append(row)
        self.keys = {row: _key(row, source.row_stamp(row), caption) for row, caption in self.captions.items()}
        self.bad: dict[int, BadRow] = {}  # found by this rank
        self.scored: dict[str, set[bytes]] = {}  # scorer -> keys of its records; set by `find_scored`

    def open_writers(self, rank: int) -> dict[str, Writer]:
        """Open a writer for each scorer's store; `score_all` closes them."""
        return {name: Writer(self.folder, recipe, rank, capacity=PART_ROWS) for name, recipe in self.recipes.items()}

    def find_scored(self) -> None:
        """Read which records the stores hold, in complete shards and in those that writers have resumed."""
        self.scored = {
            name: Store(self.folder, recipe).keys() | log_keys(self.folder / recipe.folder_name)
            for name, recipe in self.recipes.items()
        }

    def missing(self, first: int) -> list[str]:
        """The scorers that have not judged all rows of a part."""
        keys = {self.keys[row] for row in self.parts[first]}
        return [name for name in self.scorers if not keys <= self.scored[name]]

    def collect(self, scored_now: int) -> Scores:
        """Return the scores of all parts. Raises BadInput if some are missing or too many rows are bad."""
        of: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.scorers}
        bad: dict[int, BadRow] = {}
        for name, recipe in self.recipes.items():
            store = Store(self.folder, recipe)
            found = store.find([self.keys[row] for row in self.captions])
            for row, shard, at in zip(self.captions, found.shard, found.row, strict=True):
                if shard < 0:
                    raise BadInput(
                        f"{self.folder} lacks scores that another process has written: it must be on a disk that all"
                        " processes share; name one with --scores_dir"
                    )
                if (wrong := store.meta(shard, at)) is not None:
                    bad[row] = BadRow(row, *wrong)
                else:
                    of[name][row] = store.record(shard, at).view(np.float64)
        self._refuse_too_many(bad)
        rows = [row for row in self.captions if row not in bad]
        arrays = {name: np.array([scores[row] for row in rows]).reshape(-1, 2) for name, scores in of.items()}
        return Scores(np.array(rows, dtype=np.int64), arrays, sorted(bad.values()), scored_now)

    def score_all(
        self, parts: Sequence[int], writers: Mapping[str, Writer], num_workers: int, title: str | None
    ) -> None:
        """Score these parts and write each; complete the stores' last shards."""
        with ExitStack() as ends:
            for writer in writers.values():
                ends.enter_context(writer)
            if not parts:
                return
            total = sum(len(self.parts[first]) for first in parts)
            bar = ends.enter_context(tqdm(total=total, desc=title, unit=" pairs", disable=not title))
            pool = ThreadPoolExecutor(num_workers)
            ends.callback(pool.shutdown, wait=False, cancel_futures=True)
            for first in parts:
                self.score(first, pool, writers)
                bar.update(len(self.parts[first]))

    def score(self, first: int, pool: ThreadPoolExecutor, writers: Mapping[str, Writer]) -> None:
        """Score a part with the scorers that have not judged all of it, and write the scores to their stores."""
        rows, names = self.parts[first], self.missing(first)
        images: dict[int, list[Key]] = {}  # row -> keys of its two images
        bad: dict[int, BadRow] = {}
        faults: dict[Key, str] = {}
        values: dict[Key, dict[str, float]] = {}

        def decoded() -> Iterator[tuple[_Unit, Tensor]]:
            units = self._units(rows, images, bad, pool)
            plans = (Sized(partial(_pixels, unit), decoded_bytes(unit.data)) for unit in units)
            for unit, pixels in ahead(pool, plans, 2 * self.batch_size):
                if isinstance(pixels, BadImage):
                    faults[unit.key] = pixels.reason
                else:
                    yield unit, pixels

        def judge(batch: list[tuple[_Unit, Tensor]]) -> None:
            units = [unit for unit, _ in batch]
            stack, captions = torch.stack([pixels for _, pixels in batch]), [unit.key[1] for unit in units]
            for name in names:
                scores = self.scorers[name].score(stack, captions).tolist()
                for unit, score in zip(units, scores, strict=True):
                    if not np.isfinite(score):
                        raise BadInput(f"scorer {name} gives {score} for row {unit.row}: {unit.column}; leave it out")
                    values.setdefault(unit.key, {})[name] = score

        for batch in batches_by_size(decoded(), lambda one: one[1].shape, self.batch_size):
            judge(batch)

        for row, pair in images.items():
            wrong = [side for side in (0, 1) if pair[side] in faults]
            if wrong:
                bad[row] = BadRow(row, self.source.columns.images[wrong[0]], faults[pair[wrong[0]]])
        for name in names:
            for row in rows:
                if self.keys[row] in self.scored[name]:
                    continue
                wrong = bad.get(row)
                scores = [np.nan] * 2 if wrong else [values[key][name] for key in images[row]]
                note = [wrong.column, wrong.reason] if wrong else None
                writers[name].add(self.keys[row], np.array(scores).tobytes(), note)
        self.bad |= bad
        self._refuse_too_many(self.bad)

    def _units(
        self, rows: Sequence[int], keys: dict[int, list[Key]], bad: dict[int, BadRow], pool: ThreadPoolExecutor
    ) -> Iterator[_Unit]:
        """Iterate over the distinct images of some rows; fills `keys`, or `bad` for rows with an unreadable image."""
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


def _key(row: int, stamp: str, caption: str) -> bytes:
    """Return the key of a row's record, which changes with its caption and its image files."""
    return hashlib.blake2b(f"{row}\n{stamp}\n{caption}".encode(errors="replace"), digest_size=KEY_BYTES).digest()


def _pixels(unit: _Unit) -> tuple[_Unit, Tensor | BadImage]:
    """Decode an image to uint8 [3,H,W] of its own size, upright and over white, or return why it cannot be decoded."""
    try:
        pixels = np.array(decode(unit.data))
    except BadImage as error:
        return unit, error
    return unit, torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
