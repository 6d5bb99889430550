"""Images on disk to scores, kept on the disk as they come: a scorer sees an image and its prompt once.

    FOLDER/<scorer>/rank-0.json    about: the scorer's name, precision and files; scores: image and prompt -> score

A score belongs to what an image's bytes and its prompt are, so it holds for any baseline, and images that are equal
are scored equal.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.caching import ahead
from dpo_fast.data.images import image_key
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.pairing import Files
from dpo_fast.evaluation.scorers import Scorer
from dpo_fast.files import remove_temporaries, write_text
from dpo_fast.parallel import Ranks

BATCH = 16  # images handed to a scorer at once, all of one size
KEPT_AFTER = 256  # images: what a killed process loses at most, on every rank
THREADS = 4  # that read and decode


def score_images(
    images: Files,
    prompts: Sequence[str],
    scorers: Mapping[str, tuple[dict[str, str], Callable[[], Scorer]]],  # name -> what it is, and how it is loaded
    folder: Path,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Scorer -> fp64 [N]. Every rank scores its share of what `folder` lacks, one scorer in memory at a time.

    Raises BadInput, on every rank, for an image that does not open and for a score that is not finite.
    """
    assert len(images) == len(prompts)
    keys: list[str] = []
    ranks.on_all(lambda: keys.extend(_keys(images, prompts)))
    ranks.on_main(lambda: [remove_temporaries(folder / name) for name in scorers])
    found = {}
    for name, (about, load) in scorers.items():
        of_scorer = folder / name
        kept = _read(of_scorer, about)
        units = {key: row for row, key in enumerate(keys) if key not in kept}
        ranks.wait()  # every rank has seen the same scores before one of them writes
        if units:
            mine = list(units.items())[ranks.rank :: ranks.world_size]
            work = _Work(name, load, images, prompts, of_scorer / f"rank-{ranks.rank}.json", about)
            ranks.on_all(lambda work=work, mine=mine: work.score(mine, show=ranks.is_main))
            kept = _read(of_scorer, about)
        lacking = sum(key not in kept for key in keys)
        if lacking:
            raise BadInput(
                f"{of_scorer} lacks {lacking} scores that another process has written: it must be on a disk that all"
                " processes share"
            )
        found[name] = torch.tensor([kept[key] for key in keys], dtype=torch.float64)
    return found


def _keys(images: Files, prompts: Sequence[str]) -> list[str]:
    def key(path: Path, prompt: str) -> str:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror or error})") from error
        return hashlib.blake2b(image_key(data) + prompt.encode(), digest_size=16).hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(key, images.paths, prompts))


def _read(folder: Path, about: Mapping[str, str]) -> dict[str, float]:
    """What all ranks of all commands have kept of this very scorer."""
    kept: dict[str, float] = {}
    for file in sorted(folder.glob("rank-*.json")):
        kept |= _read_one(file, about)
    return kept


def _read_one(file: Path, about: Mapping[str, str]) -> dict[str, float]:
    """None where the file is not there, or of another precision, version or folder of weights."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["scores"] if content["about"] == about else {}


class _Work:
    """One scorer's share of one rank."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Scorer],
        images: Files,
        prompts: Sequence[str],
        file: Path,
        about: Mapping[str, str],
    ) -> None:
        self.name, self.load, self.images, self.prompts = name, load, images, prompts
        self.file, self.about = file, about

    def score(self, units: Sequence[tuple[str, int]], show: bool) -> None:
        """Score the images of these (key, row); show: with a progress bar."""
        if not units:
            return
        scorer = self.load()
        scorer.check([self.prompts[row] for _, row in units])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scores = _read_one(self.file, self.about)
        waiting: dict[torch.Size, list[tuple[str, int, Tensor]]] = defaultdict(list)  # by size: a batch has one
        unwritten = 0

        def judge(batch: list[tuple[str, int, Tensor]]) -> int:
            texts = [self.prompts[row] for _, row, _ in batch]
            values = scorer.score(torch.stack([pixels for *_, pixels in batch]), texts)
            if not values.isfinite().all():
                row = batch[int((~values.isfinite()).nonzero()[0])][1]
                raise BadInput(f"scorer {self.name} gives no finite score for {self.images.paths[row]}: leave it out")
            scores.update(zip((key for key, *_ in batch), values.tolist(), strict=True))
            bar.update(len(batch))
            return len(batch)

        pool = ThreadPoolExecutor(THREADS)
        bar = tqdm(total=len(units), desc=f"scoring, {self.name}", unit=" images", disable=not show)
        try:
            plans = (partial(lambda key, row: (key, row, self.images[row]), *unit) for unit in units)
            for unit in ahead(pool, plans, 2 * BATCH):
                batch = waiting[unit[2].shape]
                batch.append(unit)
                if len(batch) == BATCH:
                    unwritten += judge(waiting.pop(unit[2].shape))
                if unwritten >= KEPT_AFTER:
                    self._write(scores)
                    unwritten = 0
            for batch in waiting.values():
                judge(batch)
        finally:
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)
            if scores:
                self._write(scores)

    def _write(self, scores: Mapping[str, float]) -> None:
        write_text(self.file, json.dumps({"about": self.about, "scores": scores}) + "\n")
