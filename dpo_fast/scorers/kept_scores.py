"""Images on disk to scores, kept on the disk as they come: a scorer sees an image and its prompt once.

    FOLDER/<scorer>/rank-0.json    about: facts of the scorer; scores: image and prompt -> score; its digest

A score belongs to what an image's bytes and its prompt are, so it holds for any baseline, and images that are equal
are scored equal.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.checksums import delete_damaged, parse_signed, write_signed_json
from dpo_fast.data.image_files import THREADS, Files
from dpo_fast.data.images import decoded_bytes, image_key
from dpo_fast.errors import BadInput
from dpo_fast.files import read_bytes, remove_temporaries
from dpo_fast.parallel import Ranks
from dpo_fast.scorers import Scorer
from dpo_fast.scorers.by_size import batches_by_size
from dpo_fast.threads import Sized, ahead

KEPT_AFTER = 256  # images: what a killed process loses at most, on every rank


def score_images(
    images: Files,
    prompts: Sequence[str],
    scorers: Mapping[str, tuple[Callable[[], dict[str, str]], Callable[[], Scorer]]],  # name -> its facts, its loading
    folder: Path,
    ranks: Ranks,
    *,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Scorer -> fp64 [N]. Every rank scores its share of what `folder` lacks, one scorer in memory at a time.

    Of kept scores only those of the very facts count: as they are now, and where something is to be scored as they are
    once the scorer is loaded, which may have fetched files. A scorer gets `batch_size` images at once, all of one size.

    Raises BadInput, on every rank, for an image that does not open and for a score that is not finite.
    """
    assert len(images) == len(prompts)
    units = ranks.on_all(lambda: _units(images, prompts))
    ranks.on_main(lambda: [_tidy(folder / name) for name in scorers])
    found = {}
    for name, (describe, load) in scorers.items():
        kept = _scores(name, describe, cache(load), images, prompts, units, folder / name, ranks, batch_size)
        found[name] = torch.tensor([kept[unit.key] for unit in units], dtype=torch.float64)
    return found


class _Unit(NamedTuple):
    """An image and its prompt."""

    row: int
    key: str  # of the image's bytes and the prompt
    bytes: int  # of the decoded image


def _scores(
    name: str,
    describe: Callable[[], dict[str, str]],
    load: Callable[[], Scorer],  # loads once
    images: Files,
    prompts: Sequence[str],
    units: Sequence[_Unit],
    folder: Path,
    ranks: Ranks,
    batch_size: int,
) -> dict[str, float]:
    """Key -> score by one scorer, after what lacks was scored."""

    def lacking() -> list[_Unit]:
        return [*{unit.key: unit for unit in units if unit.key not in kept}.values()]

    def share() -> list[_Unit]:
        return lacking()[ranks.rank :: ranks.world_size]

    about = ranks.from_main(describe)
    kept = _read(folder, about)
    if ranks.any(bool(lacking())):
        ranks.on_all(lambda: load() if share() else None)
        about = ranks.from_main(describe)
        kept = _read(folder, about)
        mine = share()
        ranks.wait()  # every rank has seen the same scores before one of them writes
        work = ScorerRun(name, load, images, prompts, folder / f"rank-{ranks.rank}.json", about, batch_size)
        ranks.on_all(lambda: work.score(mine, show=ranks.is_main))
        kept = _read(folder, about)
        if ranks.any(bool(lacking())):
            raise BadInput(
                f"{folder} lacks scores that another process has written: it must be on a disk that all processes share"
            )
    return kept


def _units(images: Files, prompts: Sequence[str]) -> list[_Unit]:
    def unit(row: int) -> _Unit:
        path = images.paths[row]
        try:
            data = read_bytes(path)
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror or error})") from error
        key = hashlib.blake2b(image_key(data) + prompts[row].encode(), digest_size=16).hexdigest()
        return _Unit(row, key, decoded_bytes(data))

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(unit, range(len(images))))


def _read(folder: Path, about: Mapping[str, str]) -> dict[str, float]:
    """What all ranks of all commands have kept of this very scorer, whole files only."""
    kept: dict[str, float] = {}
    for file in sorted(folder.glob("rank-*.json")):
        kept |= _read_one(file, about)
    return kept


def _read_one(file: Path, about: Mapping[str, str]) -> dict[str, float]:
    """The scores in a file; none where it is not there, damaged, or of other facts."""
    try:
        content = parse_signed(read_bytes(file))
        if content["about"] != about:
            return {}
        return {str(key): float(score) for key, score in content["scores"].items()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return {}


def _tidy(folder: Path) -> None:
    """Delete damaged and half-written files of scores."""
    remove_temporaries(folder)
    delete_damaged(sorted(folder.glob("rank-*.json")), "its scores are made again")


class ScorerRun:
    """One scorer's share of one rank."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Scorer],
        images: Files,
        prompts: Sequence[str],
        file: Path,
        about: Mapping[str, str],
        batch_size: int,
    ) -> None:
        self.name, self.load, self.images, self.prompts = name, load, images, prompts
        self.file, self.about, self.batch_size = file, about, batch_size

    def score(self, units: Sequence[_Unit], show: bool) -> None:
        """Score these images; show: with a progress bar."""
        if not units:
            return
        scorer = self.load()
        scorer.check([self.prompts[unit.row] for unit in units])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scores = _read_one(self.file, self.about)
        unwritten = 0

        def judge(batch: list[tuple[_Unit, Tensor]]) -> None:
            texts = [self.prompts[unit.row] for unit, _ in batch]
            values = scorer.score(torch.stack([pixels for _, pixels in batch]), texts)
            if not values.isfinite().all():
                unit = batch[int((~values.isfinite()).nonzero()[0])][0]
                path = self.images.paths[unit.row]
                raise BadInput(f"scorer {self.name} gives no finite score for {path}: leave it out")
            scores.update(zip((unit.key for unit, _ in batch), values.tolist(), strict=True))
            bar.update(len(batch))

        pool = ThreadPoolExecutor(THREADS)
        bar = tqdm(total=len(units), desc=f"scoring, {self.name}", unit=" images", disable=not show)
        try:
            plans = (Sized(partial(lambda unit: (unit, self.images[unit.row]), unit), unit.bytes) for unit in units)
            read = ahead(pool, plans, 2 * self.batch_size)
            for batch in batches_by_size(read, lambda one: one[1].shape, self.batch_size):
                judge(batch)
                unwritten += len(batch)
                if unwritten >= KEPT_AFTER:
                    self._write(scores)
                    unwritten = 0
        finally:
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)
            if scores:
                self._write(scores)

    def _write(self, scores: Mapping[str, float]) -> None:
        write_signed_json(self.file, {"about": self.about, "scores": scores}, indent=None)
