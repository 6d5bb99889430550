"""`--dry-run`: what a run would train on and take, said before it starts. Nothing is trained and nothing is written.

The pairs are opened as the run opens them, what the model takes is counted from its configuration (`costs`), and a few
steps are timed if that is asked for (`timing`). What the run would refuse is refused with the same line.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from dpo_fast.caching.known import Known, known_of
from dpo_fast.caching.settings import CacheSettings
from dpo_fast.choices.machine import device_name
from dpo_fast.config import TrainConfig, to_yaml
from dpo_fast.data import NotFetched, not_fetched
from dpo_fast.errors import printable
from dpo_fast.files import free_bytes, human_bytes, human_seconds, nearest_folder
from dpo_fast.models.caption_limits import cut_off
from dpo_fast.models.read_tokenizers import caption_limits
from dpo_fast.models.source import base_of
from dpo_fast.parallel import Ranks
from dpo_fast.training import run_folder
from dpo_fast.training.advice import Visits, disk_need, evaluation_bytes, visits_of, warnings_of
from dpo_fast.training.batches import (
    RunPairs,
    needed_rows,
    needed_rows_of_stream,
    open_pairs,
    pairs_source,
)
from dpo_fast.training.costs import Costs, UNetFlops, costs_of, runs_reference, unet_flops
from dpo_fast.training.cut_captions import CutCaptions, cut_captions
from dpo_fast.training.memory_fit import Fit, fit_of
from dpo_fast.training.run import check_without_weights, find_start
from dpo_fast.training.timing import Timing, time_run

SHOWN = 3  # bad rows


class Line(NamedTuple):
    """A line of the plan: what it is about, a figure, and what the figure counts."""

    about: str
    figure: str
    text: str

    def __str__(self) -> str:
        return printable(f"{self.about:<8}{self.figure:>13}  {self.text}".rstrip())


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts. `str` gives sections of aligned lines, and the warnings."""

    config: TrainConfig  # settled
    machine: str
    world_size: int
    pairs: RunPairs | None  # None: they are not on this machine
    waiting: NotFetched | None  # what the hub says of them then
    visits: Visits | None
    cut: CutCaptions | None  # None: of pairs that are not a table
    known: Known | None  # what the cache holds; None: without one, and of pairs that are not a table
    costs: Costs
    flops: UNetFlops
    fit: Fit | None  # None: the device's memory is not known
    warnings: list[str]
    images: int  # that an evaluation makes of each model
    timing: Timing | str  # or why nothing was timed

    @classmethod
    def of(
        cls, config: TrainConfig, ranks: Ranks, pairs: RunPairs | None, waiting: NotFetched | None, images: int
    ) -> "Plan":
        """Count and look up what needs no weights. Raises BadInput for a disk that is too small."""
        costs = costs_of(config, ranks.device.type)
        run_folder.check_space(config.output_dir, costs.checkpoint + costs.result)
        visits = None if pairs is None else visits_of(config, pairs)
        table = pairs is not None and pairs.sets is not None
        return cls(
            config,
            device_name(ranks.device),
            ranks.world_size,
            pairs,
            waiting,
            visits,
            _cut(config, pairs) if table else None,
            _known(config, pairs, costs) if table and config.cache else None,
            costs,
            unet_flops(costs.configs.unet, config, costs.latent_size),
            fit_of(costs, ranks.device),
            warnings_of(config, ranks, pairs, costs, images),
            images=images,
            timing="--dry-run timed takes a few steps to find out",
        )

    @property
    def steps(self) -> int | None:
        return self.config.max_train_steps if self.visits is None else self.visits.steps

    @property
    def untimable(self) -> str | None:
        """Why no step can be timed; None if one can."""
        if self.pairs is None:
            return "the pairs are not on this machine yet"
        fits = self.fit is None or self.fit.verdict != "too large"
        return None if fits else "it does not fit into the memory"

    @property
    def missing(self) -> tuple[int, int] | None:
        """How many latents and how many captions' embeddings the cache may lack, at most; None if it is unknown."""
        if self.known is not None:
            return self.known.latents_needed - self.known.latents, self.known.captions - self.known.embeddings
        if self.visits is None or not self.config.cache:
            return None
        pairs = needed_rows_of_stream(self.config).pairs  # no table: its rows would be known
        pairs = pairs if self.visits.pairs is None else min(pairs, self.visits.pairs)
        return 2 * (1 + self.config.hflip) * pairs, pairs

    def __str__(self) -> str:
        sections = (_model, _pairs, _memory, _cache, _disk, _time)
        blocks = ["\n".join(map(str, section(self))) for section in sections]
        blocks.append("\n".join(printable(f"warning: {line}") for line in self.warnings) or "nothing to warn of")
        return "\n\n".join(blocks)


def dry_run(config: TrainConfig, ranks: Ranks, images: int = 0) -> None:
    """Print the plan of the run of a settled configuration. Every rank calls this, the main rank prints.

    images: that an evaluation at the end makes of each model. Raises what opening the run would raise, as far as it
    shows before the model is loaded: BadInput, and AlreadyDone.
    """
    start = find_start(config, ranks, writes=False)
    waiting = ranks.from_main(lambda: not_fetched(pairs_source(start.config)))
    pairs = None if waiting else open_pairs(start.config, ranks, None)
    check_without_weights(start, ranks, pairs)
    plan = ranks.on_main(lambda: Plan.of(start.config, ranks, pairs, waiting, images))
    if config.dry_run == "timed":
        why = ranks.from_main(lambda: plan.untimable)
        timing = why or time_run(start.config, ranks, pairs, resuming=bool(start.saved))
        plan = plan and replace(plan, timing=timing)
    if ranks.is_main:
        shown = dict(resolution=plan.costs.resolution, max_train_steps=plan.steps, seed=config.seed)
        print(f"{to_yaml(replace(start.config, **shown))}\n{plan}", flush=True)


def _cut(config: TrainConfig, pairs: RunPairs) -> CutCaptions:
    return cut_captions(config, pairs, partial(cut_off, caption_limits(base_of(config))))


def _known(config: TrainConfig, pairs: RunPairs, costs: Costs) -> Known:
    rows = needed_rows(replace(config, max_train_steps=visits_of(config, pairs).steps), pairs).rows
    texts = pairs.source.captions()
    root, captions = CacheSettings.of(config).root, (texts[row] for row in rows)
    of_run = dict(resolution=costs.resolution, hflip=config.hflip, max_token_length=config.max_token_length)
    return known_of(root, pairs.manifest, rows, captions, **of_run)


# ---- sections ------------------------------------------------------------------------------------------------------


def _model(plan: Plan) -> list[Line]:
    config, costs, pairs = plan.config, plan.costs, plan.config.pairs_per_step
    forwards = 1 + runs_reference(config)
    flops = 2 * pairs * (forwards * plan.flops.forward + plan.flops.backward)
    work = ["policy forward and backward"]
    work += ["reference forward"] if forwards > 1 else []
    work += ["recomputation"] if config.gradient_checkpointing != "none" else []
    precision = "fp32" if config.mixed_precision == "no" else f"{config.mixed_precision} with fp32 masters"
    split = f"{plan.world_size} x {config.train_batch_size} x {config.gradient_accumulation_steps}"
    about = f"{config.tuning}, {precision}, on {plan.world_size} x {plan.machine}"
    return [
        Line("model", costs.configs.family.name, about),
        Line("model", f"{costs.unet.parameters:,}", "parameters in the UNet"),
        Line("model", f"{costs.unet.trained:,}", "parameters trained"),
        Line("step", f"{pairs:,}", f"pairs at {costs.resolution} x {costs.resolution}: {split} (ranks, batch, passes)"),
        Line("step", f"{flops / 1e12:.3f}", f"TFLOP in the UNet: {', '.join(work)}"),
    ]


def _pairs(plan: Plan) -> list[Line]:
    if plan.pairs is None:
        return _unfetched(plan.config, plan.waiting)
    visits, least = plan.visits, "" if plan.visits.exact else "at least "
    passes = "" if visits.passes is None else f": {least}{visits.passes:,.2f} passes over the pairs"
    visited = Line("visits", f"{visits.visited:,}", f"in {visits.steps:,} steps{passes}")
    if plan.pairs.sets is None:
        source = plan.pairs.source or plan.pairs.manifest.stream()
        rows = f"{visits.pairs:,}" if visits.pairs else "unknown"
        return [
            Line("pairs", rows, f"rows in {source.description}"),
            Line("pairs", "unknown", "ties, bad rows and captions: of a stream they show when it is read"),
            visited,
        ]
    sets = plan.pairs.sets
    captions = len({*sets.train.captions, *sets.validation.captions})
    bad = "; ".join(f"row {row}: {column} {reason}" for row, column, reason in sets.bad[:SHOWN])
    counts = (
        (sets.ties_dropped, "ties dropped"),
        (sets.unlabelled, "dropped without a label"),
        (sets.contradicted, "dropped because as many rows say the opposite"),
        (sets.shared_with_validation, "dropped for sharing an image with held-out pairs"),
        (sets.duplicates, "repeat an earlier row, and are kept"),
        (len(sets.bad), f"bad: {bad}{'; ...' if len(sets.bad) > SHOWN else ''}"),
        (len(sets.validation), "held out to measure the accuracy"),
    )
    return [
        Line("pairs", f"{sets.rows:,}", f"rows in {plan.pairs.source.description}"),
        Line("pairs", f"{len(sets.train):,}", "to train on"),
        *(Line("pairs", f"{count:,}", text) for count, text in counts if count),
        Line("pairs", f"{captions:,}", "different captions"),
        *([Line("pairs", f"{plan.cut.cut:,}", f"captions are {plan.cut.what}")] if plan.cut.cut else []),
        visited,
    ]


def _unfetched(config: TrainConfig, waiting: NotFetched) -> list[Line]:
    rows = "unknown" if waiting.rows is None else f"{waiting.rows:,}"
    sizes = ((waiting.download, "to download"), (waiting.size, "on this disk once it is unpacked"))
    return [
        Line("pairs", rows, f"rows in {config.dataset_name} on the hub, which a run downloads first"),
        *(Line("pairs", human_bytes(size), text) for size, text in sizes if size),
        Line("pairs", "unknown", "ties, bad rows, captions and passes, until it is on this machine"),
    ]


def _memory(plan: Plan) -> list[Line]:
    about, parts, timing = "memory", plan.costs.memory, plan.timing
    left_out = "" if "VAE and text encoders" in parts else ", without VAE and text encoders"
    lines = [
        *(Line(about, human_bytes(size), part) for part, size in parts.items()),
        Line(about, human_bytes(sum(parts.values())), f"in all{left_out}"),
        Line(about, human_bytes(plan.costs.loading), "while the model is loaded"),
    ]
    if isinstance(timing, Timing):
        lines.append(Line(about, f"{timing.peak_gib:.2f} GiB", f"measured: the peak of the {timing.peak_of}"))
    fit = plan.fit
    return [*lines, Line(about, "unknown", "what is free") if fit is None else Line(about, fit.verdict, str(fit))]


def _cache(plan: Plan) -> list[Line]:
    config, costs, known, about = plan.config, plan.costs, plan.known, "cache"
    if not config.cache:
        return [Line(about, "none", "images and captions are encoded at every visit")]
    lines = [Line(about, f"{costs.latent:,}", f"bytes a latent, and {costs.prompt:,} a caption's embeddings")]
    if known is not None:
        images = f"different images in {known.rows:,} pairs"
        images += f"; those of {known.needed - known.rows:,} more are not known yet" * (known.rows < known.needed)
        lines += [
            Line(about, f"{known.images:,}", images),
            Line(about, f"{known.latents:,}", f"of {known.latents_needed:,} latents are there, if of this VAE"),
            Line(about, f"{known.embeddings:,}", f"of {known.captions:,} embeddings are there, if of these encoders"),
        ]
    if plan.missing is not None:
        latents, captions = plan.missing
        size = human_bytes(latents * costs.latent + captions * costs.prompt)
        lines.append(Line(about, size, f"to be added at most: {latents:,} latents, {captions:,} embeddings"))
        if config.cached_reference:
            pairs = captions if known is None else known.needed
            size = human_bytes(8 * pairs * config.cached_reference)
            lines.append(
                Line(about, size, f"the reference's errors at {config.cached_reference} draws a pair, at most")
            )
    root = CacheSettings.of(config).root
    return [*lines, Line(about, human_bytes(free_bytes(root)), f"free at {root}")]


def _disk(plan: Plan) -> list[Line]:
    config, costs, about = plan.config, plan.costs, "disk"
    lines = [
        Line(about, human_bytes(costs.checkpoint), "a checkpoint"),
        Line(about, human_bytes(costs.result), "the result"),
    ]
    if plan.images:
        lines.append(Line(about, human_bytes(evaluation_bytes(costs, plan.images)), "the evaluation's images, at most"))
    if plan.steps is not None:
        need = disk_need(config, costs, plan.steps, plan.images)
        limit = config.checkpoints_total_limit
        kept = "all that are made" if limit is None else f"at most {limit} kept, and one in the making"
        lines.append(Line(about, human_bytes(need.bytes), f"in all; checkpoints: {need.checkpoints}, {kept}"))
    shared = config.cache and _disk_of(CacheSettings.of(config).root) == _disk_of(config.output_dir)
    at = f"free at {config.output_dir}" + ", on the disk of the cache" * shared
    return [*lines, Line(about, human_bytes(free_bytes(config.output_dir)), at)]


def _disk_of(folder: os.PathLike) -> int:
    return os.stat(nearest_folder(folder)).st_dev


def _time(plan: Plan) -> list[Line]:
    about, timing = "time", plan.timing
    if isinstance(timing, str):
        return [Line(about, "unknown", f"not timed: {timing}")]
    middle, least, most = timing.pair()
    run, shortest, longest = (human_seconds(plan.steps * timing.pairs * seconds) for seconds in (middle, least, most))
    bound = "at most " * timing.at_most
    ms = f"ms a pair, {bound}the median of {len(timing.steps)} steps ({1e3 * least:,.1f} to {1e3 * most:,.1f})"
    whole = f"{bound}for {plan.steps:,} steps ({shortest} to {longest}), without samples, checkpoints and evaluation"
    lines = [
        Line(about, f"{1e3 * middle:,.1f}", ms),
        Line(about, f"{1 / middle:,.2f}", "pairs a second"),
        Line(about, run, whole),
        Line(about, "", f"computed with {timing.choices}"),
    ]
    if timing.image is not None:
        latents, captions = plan.missing
        image, caption = f"{1e3 * timing.image:,.1f} ms each", f"{1e3 * timing.caption:,.1f} ms"
        work = f"before that at most, to encode {latents:,} images ({image}) and {captions:,} captions ({caption})"
        lines.append(Line(about, human_seconds(latents * timing.image + captions * timing.caption), work))
    return lines
