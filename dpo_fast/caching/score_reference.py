"""Score pairs with the reference: its errors are computed once, cached, and checked at every start.

A loss needs two values per pair and draw from the reference. They are computed here without gradients and in batches
larger than training's; each rank computes its share of the records (`dpo_fast.caching.ref_errors`). Cached records are
not recomputed. A process killed at any moment loses only the record it was working on, and the next one ends with the
same files.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from dpo_fast.caching.build import Cached
from dpo_fast.caching.manifest import Manifest, RememberedSource
from dpo_fast.caching.needed import NeededRows
from dpo_fast.caching.reader import CachedTransform
from dpo_fast.caching.recipe import cache_recipe, read_recipe
from dpo_fast.caching.ref_errors import BLOCK, FIELDS, ErrorBlocks, RefErrors, ScoredPair, Unit
from dpo_fast.caching.settings import ScoringSettings
from dpo_fast.caching.stages import disk_errors_as_bad_input, stage_on_all_ranks
from dpo_fast.data import Batch, PairIndex, PairTransform
from dpo_fast.data.batch import EncodedPair, chosen_first, load_keys
from dpo_fast.data.pairs import Usable, judge_streamed
from dpo_fast.errors import BadInput
from dpo_fast.forward import NoReference, conditioning_of, predict
from dpo_fast.kernels import dispatch, pair_errors
from dpo_fast.models import Family
from dpo_fast.parallel import Ranks
from dpo_fast.store import Store, Writer, begin_folder, changes, drop_damaged, finish_orphans, locked, log_keys, tidy
from dpo_fast.threads import ahead

SCORING_BATCHES = 4  # training batches scored at once: without a backward pass activations are not kept
SAMPLE = 64  # (pair, draw) combinations that are scored again at every start
MOST_ABOVE_FLOOR = 4  # times the noise floor: rounding does not explain more
LEAST_FLOOR = 8 * 2.0**-23  # relative to the error: fp32 rounding, in case two batch shapes happen to agree

logger = logging.getLogger(__name__)

PairsOf = tuple[list[int], Callable[[int], ScoredPair]]  # ascending rows, and the pair of each


@dataclass(frozen=True)
class ReferenceErrors:
    """The complete reference errors of a run's pairs."""

    errors: RefErrors
    pair_draws: int  # pairs times draws
    scored_now: int  # of them, over all ranks
    seconds: float  # spent on scoring, on this rank


@dataclass(frozen=True)
class StartCheck:
    """How far the policy at step 0 is from the cached errors, as root mean squares of margins."""

    initial_margin_rms: float
    noise_floor: float  # between two batch shapes of the same pairs; at least fp32 rounding


def pairs_of_table(source: RememberedSource, index: PairIndex, rows: Sequence[int]) -> PairsOf:
    """The pairs of an index at `rows`, which are ascending."""
    position = {row: i for i, row in enumerate(index.pair_id.tolist())}

    def pair_of(row: int) -> ScoredPair:
        return ScoredPair(row, load_keys(source, row), index.captions[position[row]], int(index.chosen[position[row]]))

    return list(rows), pair_of


def pairs_of_stream(soft_labels: bool, manifest: Manifest, wanted: NeededRows) -> PairsOf:
    """The first usable pairs of a stream whose rows the manifest knows."""
    chosen: dict[int, int] = {}
    for streamed in manifest.streamed_rows():
        if len(chosen) == wanted.pairs:
            break
        verdict = judge_streamed(streamed, manifest.columns, soft_labels)
        if isinstance(verdict, Usable):
            chosen[streamed.row] = verdict.chosen

    def pair_of(row: int) -> ScoredPair:
        streamed = manifest.streamed_row(row)
        return ScoredPair(row, streamed.images, streamed.caption, chosen[row])

    return list(chosen), pair_of


class Scoring:
    """Computes the errors of some pairs under one recipe. Every rank makes one, and all call its methods together.

    `model` is what `models.reference_recipe_facts` returned before adapters were added. The family's UNet still holds
    the reference's weights, since no step has been taken yet.
    """

    def __init__(
        self,
        settings: ScoringSettings,
        ranks: Ranks,
        family: Family,
        model: dict[str, Any],
        cached: Cached,
        transform: PairTransform,
        pairs: PairsOf,
        draws: int,
    ):
        self.settings, self.ranks, self.family = settings, ranks, family
        self.transform = CachedTransform(transform, cached.latents, cached.text)
        facts = {
            **model,
            "latents": cached.latents.recipe.digest,
            "text": cached.text.recipe.digest,
            "resolution": transform.resolution,
            "time_ids": transform.time_ids if family.needs_time_ids else "none",
            "seed": transform.seed,
            "hflip": transform.hflip,
            "proportion_empty_prompts": transform.caption_dropout,
            "value": "mean squared error of an image, fp32",
        }
        self.recipe = cache_recipe("reference", facts, FIELDS)
        self.blocks = ErrorBlocks(*pairs, draws, by_chosen=family.needs_time_ids and transform.time_ids == "real")
        self.root = settings.root
        self.numerics = _numerics(settings, ranks.device)
        self.scored_now, self.seconds = 0, 0.0
        self.writer: Writer | None = None  # set by `_open_writer`
        self.mine: list[Unit] = []  # this rank's share of the missing records

    @property
    def batch_size(self) -> int:
        """Pairs scored at once."""
        return min(BLOCK, SCORING_BATCHES * self.settings.batch_size)

    def fill(self, *, repair: bool = False, waiting: Callable[[str], None] | None = None) -> ReferenceErrors:
        """Compute the missing errors and open the result.

        `repair` recomputes shards whose files do not match their index; without it they raise BadInput. If another
        process is computing them, `waiting` is called with a message and this one waits; without `waiting`, BadInput
        is raised. Raises BadInput also for a cache that cannot be used or written, and for errors that are not finite.
        """
        if repair:
            self.ranks.on_main(lambda: drop_damaged(self.root, self.recipe))
        store = Store(self.root, self.recipe)
        missing = self._missing(store.keys())
        if self.ranks.any(bool(missing)):
            if self.ranks.is_main:
                self._tell_of_other_facts({unit.key for _, unit in missing})
            with ExitStack() as held:
                self.ranks.on_main(lambda: self._begin(held, waiting))
                stage_on_all_ranks(self.ranks, self._open_writer, self.root)
                stage_on_all_ranks(self.ranks, self._look_again, self.root)
                stage_on_all_ranks(self.ranks, self._score_missing, self.root)
            store = Store(self.root, self.recipe)
        elif self.ranks.from_main(lambda: tidy(self.root, self.recipe)):
            store = Store(self.root, self.recipe)
        store.touch()
        now = sum(self.ranks.gather(self.scored_now))
        return ReferenceErrors(RefErrors(store, self.blocks), len(self.blocks), now, self.seconds)

    def check_start(self, scored: ReferenceErrors) -> StartCheck:
        """Score a random sample again with the current policy and compare it with the cached errors.

        Raises BadInput if they differ by more than rounding explains. The noise floor is measured on the same sample,
        scored at two batch shapes.
        """

        def check() -> StartCheck:
            start = self._compare(scored.errors)
            other = sorted({line for made in scored.errors.made_by for line in changes(made, self.numerics)})
            if other:
                logger.warning(
                    "the cached reference errors were computed otherwise (%s): of %d computed again the margins differ"
                    " by %.2g rms, between two batch shapes of this machine by %.2g",
                    "; ".join(other),
                    min(SAMPLE, len(self.blocks)),
                    start.initial_margin_rms,
                    start.noise_floor,
                )
            if not start.initial_margin_rms <= MOST_ABOVE_FLOOR * start.noise_floor:
                name = scored.errors.folder.name
                raise BadInput(
                    f"--cached_reference: the margins before the first step are {start.initial_margin_rms:.3g} rms, and"
                    f" rounding explains {start.noise_floor:.3g}: the errors in {name} are not those of this reference;"
                    f" delete them with `python -m dpo_fast.cache prune --latent_cache_dir {self.root} --name {name}"
                    " --yes`, and the same command computes them again"
                )
            return start

        return self.ranks.from_main(check)

    # ---- stages --------------------------------------------------------------------------------------------------

    def _missing(self, there: set[bytes]) -> list[tuple[int, Unit]]:
        """The missing records, each with its index."""
        return [(number, unit) for number, unit in enumerate(self.blocks.units) if unit.key not in there]

    def _begin(self, held: ExitStack, waiting: Callable[[str], None] | None) -> None:
        held.enter_context(locked(self.root / self.recipe.folder_name, self.recipe.remedies, waiting))
        with disk_errors_as_bad_input(self.root):
            begin_folder(self.root, self.recipe)
            finish_orphans(self.root, self.recipe, self.ranks.world_size)

    def _open_writer(self) -> None:
        self.writer = Writer(self.root, self.recipe, self.ranks.rank)

    def _look_again(self) -> None:
        """Set this rank's share of what is still missing: a shard may have been completed; unfinished ones count."""
        there = Store(self.root, self.recipe).keys() | log_keys(self.root / self.recipe.folder_name)
        size, rank = self.ranks.world_size, self.ranks.rank
        self.mine = [unit for number, unit in self._missing(there) if number % size == rank]

    def _score_missing(self) -> None:
        mine = self.mine
        total = sum(len(self.blocks.rows[unit.block]) for unit in mine)
        bar = tqdm(total=total, desc="Scoring with the reference", unit=" pairs", disable=not self.ranks.is_main)
        started = time.perf_counter()
        with self.writer, bar:
            for unit, record in self._records(mine, bar):
                self.writer.add(unit.key, record.tobytes(), self.numerics)
        self.scored_now, self.seconds = total, time.perf_counter() - started

    def _records(self, units: list[Unit], bar: tqdm) -> Iterator[tuple[Unit, np.ndarray]]:
        """Yield each unit with its errors, float32 [BLOCK, 2]."""

        def plans() -> Iterator[Callable[[], tuple[Unit, list[int], Batch]]]:
            for unit in units:
                rows = self.blocks.rows[unit.block]
                for first in range(0, len(rows), self.batch_size):
                    yield partial(load, unit, rows[first : first + self.batch_size])

        def load(unit: Unit, rows: list[int]) -> tuple[Unit, list[int], Batch]:
            return unit, rows, self._batch([(row, unit.draw) for row in rows])

        with ThreadPoolExecutor(2) as pool:
            record = np.full((BLOCK, 2), np.nan, np.float32)
            for unit, rows, batch in ahead(pool, plans(), 4):
                record[[row % BLOCK for row in rows]] = self._errors(batch, rows)
                bar.update(len(rows))
                if rows[-1] == self.blocks.rows[unit.block][-1]:
                    yield unit, record
                    record = np.full((BLOCK, 2), np.nan, np.float32)

    def _batch(self, asked: Sequence[tuple[int, int]]) -> Batch:
        """Load a batch of pairs, given as (row, draw)."""
        rows, draws = zip(*asked, strict=True)
        pairs = [self.blocks.pair_of(row) for row in rows]
        encoded = [EncodedPair(chosen_first(p.images, p.chosen), p.caption, 1.0, p.chosen) for p in pairs]
        batch = self.transform.batch(torch.tensor(rows), torch.tensor(draws), encoded)
        return batch.pin_memory() if self.ranks.device.type == "cuda" else batch

    @torch.no_grad()
    def _errors(self, batch: Batch, rows: Sequence[int]) -> np.ndarray:
        """A batch's errors, float32 [n, 2], in the order of the source's columns. Raises BadInput for NaN or inf."""
        batch = batch.to(self.ranks.device, non_blocking=True)
        conditioning = conditioning_of(self.family, batch, batch.conditioning)
        with dispatch.backend(self.settings.backend) if self.settings.backend != "auto" else nullcontext():
            family, seed = self.family, self.transform.seed
            predictions = predict(family, family.unet, NoReference(), batch, batch.latents, conditioning, seed)
            errors = pair_errors(*predictions).policy_error.view(2, -1).T.cpu().numpy().copy()
        if not np.isfinite(errors).all():
            row = rows[int(np.argmin(np.isfinite(errors).all(1)))]
            raise BadInput(
                f"row {row}: the reference's error is not finite in {self.settings.mixed_precision} precision;"
                " use --mixed_precision bf16 or no"
            )
        for i, row in enumerate(rows):
            if self.blocks.pair_of(row).chosen == 1:
                errors[i] = errors[i, ::-1].copy()
        return errors

    def _compare(self, cached: RefErrors) -> StartCheck:
        rows = [row for some in self.blocks.rows.values() for row in some]
        picked = random.Random(self.transform.seed).sample(range(len(self.blocks)), min(SAMPLE, len(self.blocks)))
        asked = [(rows[place % len(rows)], place // len(rows)) for place in sorted(picked)]
        as_trained = min(self.settings.batch_size, len(asked))
        otherwise = min(self.batch_size, len(asked))
        if otherwise == as_trained:
            otherwise = max(1, as_trained // 2)
        shapes = []
        for size in (as_trained, otherwise):
            some = [asked[first : first + size] for first in range(0, len(asked), size)]
            shapes.append(np.concatenate([self._errors(self._batch(part), [row for row, _ in part]) for part in some]))
        ids, draws = (torch.tensor(column) for column in zip(*asked, strict=True))
        there = cached.read(ids, draws, [0] * len(asked)).view(2, -1).T.numpy()
        floor = _margin_rms(shapes[0] - shapes[1], self.settings.beta)
        least = LEAST_FLOOR * self.settings.beta / 2 * float(np.abs(shapes[0]).mean())
        return StartCheck(_margin_rms(shapes[0] - there, self.settings.beta), max(floor, least))

    def _tell_of_other_facts(self, missing: set[bytes]) -> None:
        """Log in one line what differs, if these pairs were scored under another recipe."""
        nearest = None
        for file in self.root.glob("reference-*/recipe.json"):
            try:
                recipe = read_recipe(file)
                if recipe.folder_name == self.recipe.folder_name or not missing & Store(self.root, recipe).keys():
                    continue
            except (OSError, ValueError):  # includes BadInput: an unusable store is no help
                continue
            differences = recipe.differences(self.recipe.as_json())
            if nearest is None or len(differences) < len(nearest[1]):
                nearest = recipe, differences
        if nearest is not None:
            logger.info(
                "%s has reference errors of these pairs, but of another reference (%s): they are computed anew",
                nearest[0].folder_name,
                "; ".join(line.removeprefix("facts.") for line in nearest[1]),
            )


def _margin_rms(difference: np.ndarray, beta: float) -> float:  # float32 [n, 2]
    """The rms difference of margins that a difference of errors causes."""
    margins = beta / 2 * (difference[:, 0].astype(np.float64) - difference[:, 1])
    return math.sqrt(float(np.square(margins).mean()))


def _numerics(settings: ScoringSettings, device: torch.device) -> dict[str, str]:
    """The settings that change the rounding of errors but not their meaning."""
    kernels = dispatch.module_for("pair_errors", settings.backend, torch.zeros(1, device=device)).__name__
    numerics = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "kernels": kernels.split(".")[2],
        "attention": "auto" if settings.attention == "sdpa" else settings.attention,  # the same
        "tf32": "on" if device.type == "cuda" and settings.allow_tf32 else "off",
    }
    if settings.memory_order == "contiguous":  # earlier versions had channels_last only, and did not say so
        numerics["memory_order"] = settings.memory_order
    return numerics


@dataclass(frozen=True)
class AllReferenceErrors:
    """The reference's errors for the training pairs and for the held-out pairs."""

    train: ReferenceErrors
    validation: ReferenceErrors | None
    start: StartCheck | None  # None: not compared
