"""Score images on disk, keeping scores on disk as they are computed: a scorer sees an image and its prompt once.

FOLDER/<scorer>-<hash>/ is a store (`dpo_fast.store`) with a record for each image and its prompt; the hash is that of
the scorer's facts. The key of a record is a hash of the image's bytes and the prompt, so a score is reused for any
baseline, and equal images get equal scores.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.data.image_files import THREADS, Files
from dpo_fast.data.images import decoded_bytes, image_key
from dpo_fast.errors import BadInput
from dpo_fast.files import read_bytes
from dpo_fast.parallel import Ranks
from dpo_fast.scorers import Scorer
from dpo_fast.scorers.by_size import batches_by_size
from dpo_fast.store import KEY_BYTES, Field, Recipe, Remedies, Store, Writer, has_store, log_keys, mend
from dpo_fast.threads import Sized, ahead

logger = logging.getLogger(__name__)

SHARD_IMAGES = 1024  # per shard: a damaged file loses at most this many scores
REMEDIES = Remedies(name="the folder of the scores")


def score_images(
    images: Files,
    prompts: Sequence[str],
    scorers: Mapping[str, tuple[Callable[[], dict[str, str]], Callable[[], Scorer]]],  # name -> (its facts, load)
    folder: Path,
    ranks: Ranks,
    *,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Return scorer -> scores, fp64 [N]. Every rank scores its share of what is missing from `folder`.

    One scorer is in memory at a time. Kept scores count only if they have the scorer's present facts; if any score is
    missing, the facts are read again once the scorer is loaded, since loading may have fetched files. A scorer gets at
    most `batch_size` images at once, all of one size.

    Raises BadInput, on every rank, for an image that does not open and for a score that is not finite.
    """
    assert len(images) == len(prompts)
    units = ranks.on_all(lambda: _units(images, prompts))
    ranks.on_main(lambda: warn_of_older_scores(folder, scorers))
    found = {}
    for name, (describe, load) in scorers.items():
        kept = _scores(name, describe, cache(load), images, prompts, units, folder, ranks, batch_size)
        found[name] = torch.tensor([kept[unit.key] for unit in units], dtype=torch.float64)
    return found


class _Unit(NamedTuple):
    """An image and its prompt."""

    row: int
    key: bytes  # of the image's bytes and the prompt
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
) -> dict[bytes, float]:
    """Return key -> score by one scorer, after scoring what is missing."""

    def lacking() -> list[_Unit]:
        return [*{unit.key: unit for unit in units if unit.key not in kept}.values()]

    def share() -> list[_Unit]:
        return lacking()[ranks.rank :: ranks.world_size]

    def found(writing: bool) -> tuple[Recipe, dict[bytes, float]]:
        """Return the recipe of the store for the scorer's present facts, and the scores in its complete shards."""
        about = ranks.from_main(describe)
        recipe = Recipe(name, about, (Field("score", (), "float64"),), REMEDIES)
        ranks.on_main(lambda: mend(folder, recipe, ranks.world_size) if writing or has_store(folder, recipe) else None)
        return recipe, ranks.on_all(lambda: read_scores(folder, recipe))

    recipe, kept = found(writing=False)
    if ranks.any(bool(lacking())):
        ranks.on_all(lambda: load() if share() else None)
        recipe, kept = found(writing=True)
        writer = ranks.on_all(lambda: Writer(folder, recipe, ranks.rank, capacity=SHARD_IMAGES))
        resumed = ranks.on_all(lambda: log_keys(folder / recipe.folder_name))  # of all ranks' unfinished shards
        mine = [unit for unit in lacking() if unit.key not in resumed][ranks.rank :: ranks.world_size]
        ranks.wait()  # every rank has seen the same scores before one of them writes
        work = ScorerRun(name, load, images, prompts, batch_size)

        def score() -> None:
            with writer:
                if mine:
                    work.score(mine, writer, show=ranks.is_main)

        ranks.on_all(score)
        kept = ranks.on_all(lambda: read_scores(folder, recipe))
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
        key = hashlib.blake2b(image_key(data) + prompts[row].encode(), digest_size=KEY_BYTES).digest()
        return _Unit(row, key, decoded_bytes(data))

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(unit, range(len(images))))


def has_scores(root: Path, name: str) -> bool:
    """Whether a scorer has scored anything that is kept in `root`."""
    return any(root.glob(f"{name}-*/shard-*"))


def warn_of_older_scores(root: Path, names: Iterable[str]) -> None:
    """Log where earlier versions kept scores, in files that are no longer read."""
    for name in names:
        if (root / name).is_dir():
            logger.warning("%s holds scores of an earlier version, which are not used: delete it", root / name)


def read_scores(root: Path, recipe: Recipe) -> dict[bytes, float]:
    """Return key -> score for every record in a store of scores. Raises Damaged."""
    store = Store(root, recipe)
    rows = ((shard, row) for shard, held in enumerate(store.shards) for row in range(len(held.checksums)))
    values = [store.record(*place).view(np.float64)[0] for place in rows]
    return dict(zip((key for shard in store.shards for key in shard.keys), map(float, values), strict=True))


class ScorerRun:
    """One rank's share of the scoring by one scorer."""

    def __init__(
        self, name: str, load: Callable[[], Scorer], images: Files, prompts: Sequence[str], batch_size: int
    ) -> None:
        self.name, self.load, self.images, self.prompts, self.batch_size = name, load, images, prompts, batch_size

    def score(self, units: Sequence[_Unit], writer: Writer, show: bool) -> None:
        """Score these images and append the scores to a store; show: with a progress bar."""
        scorer = self.load()
        scorer.check([self.prompts[unit.row] for unit in units])
        pool = ThreadPoolExecutor(THREADS)
        bar = tqdm(total=len(units), desc=f"scoring, {self.name}", unit=" images", disable=not show)
        try:
            for batch in batches_by_size(self._read(units, pool), lambda one: one[1].shape, self.batch_size):
                for (unit, _), value in zip(batch, self._judge(scorer, batch), strict=True):
                    writer.add(unit.key, np.float64(value).tobytes())
                bar.update(len(batch))
        finally:
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, units: Sequence[_Unit], pool: ThreadPoolExecutor) -> Iterable[tuple[_Unit, Tensor]]:
        """Iterate over the images, uint8 [3,H,W] of their own sizes, reading ahead."""
        plans = (Sized(partial(lambda unit: (unit, self.images[unit.row]), unit), unit.bytes) for unit in units)
        return ahead(pool, plans, 2 * self.batch_size)

    def _judge(self, scorer: Scorer, batch: list[tuple[_Unit, Tensor]]) -> list[float]:
        texts = [self.prompts[unit.row] for unit, _ in batch]
        values = scorer.score(torch.stack([pixels for _, pixels in batch]), texts)
        if not values.isfinite().all():
            unit = batch[int((~values.isfinite()).nonzero()[0])][0]
            path = self.images.paths[unit.row]
            raise BadInput(f"scorer {self.name} gives no finite score for {path}: leave it out")
        return values.tolist()
