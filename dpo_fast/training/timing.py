"""How long a run will take, from a few of its own optimizer steps, of which nothing is kept."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from dpo_fast.caching.manifest import Manifest, RememberedSource
from dpo_fast.caching.needed import NeededRows
from dpo_fast.config import TrainConfig
from dpo_fast.data import BadImage, RowsSource, StreamedSource, build_index
from dpo_fast.data.pairs import Usable, judge_streamed
from dpo_fast.data.sources import StreamedRow
from dpo_fast.errors import BadInput
from dpo_fast.kernels import dispatch
from dpo_fast.models import Family, reference_recipe_facts
from dpo_fast.parallel import Ranks
from dpo_fast.training.batches import RunPairs, open_batches, source_of
from dpo_fast.training.exports import needs_encoders
from dpo_fast.training.progress import peak_memory_gib
from dpo_fast.training.run import Run, make_trainable, opened_model
from dpo_fast.training.trainer import Trainer
from dpo_fast.training.work_ahead import fill_cache, score_reference_errors

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 2, 10, 60.0  # rounds that are timed: no more than LEAST_ROUNDS after SECONDS
SHORT, LONG = 1, 4  # passes: a step of more passes than LONG is timed as two shorter ones
MANY = 1 << 30  # steps: the batches never end


@dataclass(frozen=True)
class Timing:
    """What was timed. Every list has one value a round; seconds."""

    steps: list[float]  # of an optimizer step
    pairs: int  # of an optimizer step
    lengths: tuple[int, ...]  # passes of the steps that were timed
    passes: int  # of an optimizer step of the run
    image: float | None  # that one takes to be encoded for the cache; None: there is no cache
    caption: float | None
    peak_gib: float
    peak_of: str  # in words, what has that peak of memory
    choices: str  # how it computed, in words

    @property
    def at_most(self) -> bool:
        """Whether a step takes less than was timed, because the update was counted with every pass."""
        return len(self.lengths) == 1 and self.lengths[0] < self.passes

    def pair(self) -> tuple[float, float, float]:
        """Return the seconds that a pair takes: median, least, most."""
        return tuple(of(self.steps) / self.pairs for of in (statistics.median, min, max))


def time_run(config: TrainConfig, ranks: Ranks, pairs: RunPairs, *, resuming: bool) -> Timing:
    """Take some optimizer steps of a run on a few of its pairs, in a temporary folder. Every rank calls this.

    Nothing is proven first: the choices that are "auto" are those that are known already. Raises BadInput for whatever
    only loading the model shows.
    """
    made = ranks.on_main(lambda: tempfile.mkdtemp(prefix="dpo_fast-timed-"))
    folder = Path(ranks.share(made))
    try:
        if not all(ranks.gather(folder.is_dir())):
            raise BadInput(
                f"--dry-run timed: not every host sees the temporary folder {folder}; set TMPDIR to a folder that all"
                " of them share"
            )
        return _timed(config, ranks, pairs, folder, resuming)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _timed(config: TrainConfig, ranks: Ranks, pairs: RunPairs, folder: Path, resuming: bool) -> Timing:
    config, family, _ = opened_model(config, ranks, pairs, resuming=resuming, only_known=True)
    image, caption = _encoding_seconds(config, family) if config.cache else (None, None)
    model = reference_recipe_facts(family) if config.cached_reference else None
    masters, reference = make_trainable(config, ranks, family)
    few = _few(config, pairs, 2 * config.train_batch_size * ranks.world_size, Manifest(folder / "cache" / "pairs"))
    a_pass = config.train_batch_size * ranks.world_size
    shown = replace(  # what the few pairs are read by
        config,
        pairs_per_step=a_pass,
        latent_cache_dir=folder / "cache",
        output_dir=folder / "run",
        cached_reference=config.cached_reference and 1,
        max_train_steps=-(-len(few.sets.train) // a_pass),
        streaming=False,
        run_validation=False,
    )
    cached = scored = None
    if config.cache:
        cached = fill_cache(shown, ranks, few, NeededRows(rows=few.sets.train.pair_id.tolist()), family)
        if not config.run_validation:
            family.free_encoders(keep=needs_encoders(config))
    if model:
        scored = score_reference_errors(shown, ranks, few, cached, family, model)
    endless = replace(shown, max_train_steps=MANY)
    batches, sets, _, prompts = open_batches(endless, ranks, few, cached, scored, family, 0)
    kl = torch.zeros((), device=ranks.device)
    run = Run(config, ranks, sets, batches, None, prompts, family, masters, reference, {}, kl=kl)
    backend = dispatch.backend(config.backend) if config.backend != "auto" else nullcontext()
    try:
        with backend:
            steps, lengths = _steps(Trainer(run, []), config, ranks)
    finally:
        batches.close()
    return Timing(
        steps,
        config.pairs_per_step,
        lengths,
        config.gradient_accumulation_steps,
        image,
        caption,
        peak_memory_gib(ranks.device),
        "GPU" if ranks.device.type == "cuda" else "process, its libraries included",
        f"attention {config.attention}, memory order {config.memory_order}, compile {config.compile}, pair ops"
        f" {config.backend} (auto: the plain default)",
    )


def _steps(trainer: Trainer, config: TrainConfig, ranks: Ranks) -> tuple[list[float], tuple[int, ...]]:
    """Return the seconds of an optimizer step, a value a round, and the passes of the steps that were timed."""
    passes, began = config.gradient_accumulation_steps, time.perf_counter()
    with tqdm(total=MOST_ROUNDS + 2, desc="Timing steps", disable=not ranks.is_main, leave=False) as bar:

        def seconds(length: int) -> float:
            bar.update()
            return ranks.share(_seconds(trainer, length))

        seconds(SHORT)  # the first step compiles, and allocates what stays
        first = seconds(SHORT)
        lengths, found = (passes,) if passes <= LONG else (SHORT, LONG), []
        if first * sum(lengths) * LEAST_ROUNDS > SECONDS:
            lengths = (SHORT,)
        if lengths == (SHORT,):
            found = [step_seconds([first], lengths, passes)]
        bar.total = bar.n + len(lengths) * (MOST_ROUNDS - len(found))
        while len(found) < MOST_ROUNDS:
            late = time.perf_counter() - began > SECONDS
            if ranks.share(late and len(found) >= LEAST_ROUNDS):
                break
            found.append(step_seconds([seconds(length) for length in lengths], lengths, passes))
    return found, lengths


def step_seconds(timed: Sequence[float], lengths: Sequence[int], passes: int) -> float:
    """Return the seconds of an optimizer step of so many passes, from those of one or two steps of `lengths` passes.

    Two steps differ by passes alone, so what is left of the shorter one is its update. Of one shorter step the update
    counts with every pass.
    """
    if len(timed) == 1:
        return timed[0] * passes / lengths[0]
    a_pass = max(0.0, timed[1] - timed[0]) / (lengths[1] - lengths[0])
    return timed[0] + (passes - lengths[0]) * a_pass


def _seconds(trainer: Trainer, passes: int) -> float:
    trainer.config = replace(trainer.config, gradient_accumulation_steps=passes)
    _finish(trainer.ranks.device)
    started = time.perf_counter()
    trainer.train_step()
    _finish(trainer.ranks.device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _encoding_seconds(config: TrainConfig, family: Family) -> tuple[float, float]:
    """Return the seconds that an image and a caption take to be encoded, whatever they show."""
    images = 1 if family.device.type == "cpu" else config.vae_encode_batch_size  # a CPU encodes each alone
    pixels = torch.zeros(images, 3, config.resolution, config.resolution, dtype=torch.uint8)
    seconds = []
    for work, items in (
        (lambda: family.encode_images(pixels, config.vae_encode_batch_size), images),
        (lambda: family.encode_prompts([f"a caption, the {k}." for k in range(images)]), images),
    ):
        work()  # the first call allocates
        _finish(family.device)
        started = time.perf_counter()
        work()
        _finish(family.device)
        seconds.append((time.perf_counter() - started) / items)
    return seconds[0], seconds[1]


def _few(config: TrainConfig, pairs: RunPairs, count: int, manifest: Manifest) -> RunPairs:
    """Return the first `count` pairs that the run trains on, held in memory and with a manifest of their own."""
    source = pairs.source or source_of(config)
    if isinstance(source, StreamedSource):
        usable = (
            row for row in source.rows() if isinstance(judge_streamed(row, source.columns, config.soft_labels), Usable)
        )
        rows = list(islice(usable, count))
    else:
        captions, labels = source.captions(), source.labels()
        ids = pairs.sets.train.pair_id[:count].tolist()
        rows = [StreamedRow(row, captions[row], labels[row], _images(source, row)) for row in ids]
    few = RowsSource(f"the first {len(rows)} pairs of {source.description}", source.columns, rows)
    sets = build_index(few, seed=config.seed, soft_labels=config.soft_labels, max_bad_fraction=1.0, progress=False)
    return RunPairs(RememberedSource(few, manifest) if config.cache else few, sets, manifest if config.cache else None)


def _images(source, row: int) -> tuple:
    try:
        return source.image_bytes(row)
    except BadImage as error:
        return error, error
