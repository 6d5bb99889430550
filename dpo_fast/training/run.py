"""Opening a run: everything a trainer works with, built and checked from cheap to expensive.

Settings, output folder, trackers and hub come first (moments), then the pairs (every label and caption, a sample of the
images), the model, the contents of a checkpoint, and the cache, if anything is missing from it. Anything the user can
fix raises BadInput here, before the first step.
"""

import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dpo_fast import output_folder
from dpo_fast.caching import build
from dpo_fast.caching.needed import NeededRows
from dpo_fast.caching.score_reference import ReferenceErrors, StartCheck
from dpo_fast.caching.settings import CacheSettings
from dpo_fast.choices.choose import Choices, Chosen
from dpo_fast.config import TrainConfig, public, to_yaml
from dpo_fast.data import (
    BadRow,
    Batch,
    PairDataset,
    PairSets,
    StreamedPairs,
)
from dpo_fast.errors import BadInput
from dpo_fast.forward import AdapterOff, CachedErrors, FrozenCopy, NoReference, Reference
from dpo_fast.models import (
    Family,
    add_lora,
    compile_unet,
    compiles,
    nonfinite_tensors,
    not_compiled,
    recompute_activations,
    reference_recipe_facts,
)
from dpo_fast.models.family import timesteps_within
from dpo_fast.models.fingerprints import unet_digest
from dpo_fast.models.load import family_of, timesteps_of
from dpo_fast.models.sampling import SampleSettings, base_samples
from dpo_fast.models.source import base_of
from dpo_fast.models.within_reach import check_within_reach
from dpo_fast.objectives import find_objective
from dpo_fast.parallel import Ranks, allow_tf32
from dpo_fast.training import checkpoint, choosing, hub, run_folder
from dpo_fast.training.advice import warnings_of
from dpo_fast.training.batches import (
    RunPairs,
    most_visits,
    needed_rows,
    needed_rows_of_stream,
    open_batches,
    open_pairs,
    steps_of,
)
from dpo_fast.training.costs import costs_of
from dpo_fast.training.cut_captions import cut_captions
from dpo_fast.training.exports import base_sha256, check_formats, needs_encoders
from dpo_fast.training.metrics import Extent
from dpo_fast.training.optim import MasterOptimizer, check_optimizer, rate_of
from dpo_fast.training.resume import (
    check_logs,
    check_saved,
    check_space,
    check_whether_done,
    logs_of,
    older_fingerprint,
    refuse_changes,
    saved_state,
)
from dpo_fast.training.work_ahead import (
    check_objective,
    check_time_ids,
    fill_cache,
    load_model,
    score_reference_errors,
)

# Counts of `Run.sets` that a stream learns while it is read, and that a checkpoint keeps.
COUNTS = ("rows", "ties_dropped", "unlabelled")
ENDED = "ended_early"  # a note: at which step `--stop_when_worse` ended the run, and which checkpoint is its result

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a trainer works with."""

    config: TrainConfig  # resolved: nothing that the result depends on is None
    ranks: Ranks
    sets: PairSets | StreamedPairs  # the counts of what was read: rows, ties_dropped, bad
    batches: Iterator[Batch]  # this rank's micro-batches from `step` on
    validation: PairDataset | None
    prompts: list[str]  # for the samples
    family: Family
    masters: MasterOptimizer
    reference: Reference
    fingerprints: dict[str, str]  # of the base model's weights and of the pairs
    step: int = 0  # optimizer steps done
    kl: torch.Tensor | None = None  # [] fp32, for kto: mean implicit reward of the previous step, at least 0
    notes: dict[str, object] = field(default_factory=dict)  # for summary.json, carried over when resuming
    logs: dict[str, Extent] = field(default_factory=dict)  # file -> its extent in the checkpoint
    bad_rows: dict[int, BadRow] = field(default_factory=dict)
    cached: build.Counts | None = None  # None: images and captions are encoded at every visit
    scored: ReferenceErrors | None = None  # None: the reference, if there is one, is run at every visit
    captions_cut: int | None = None  # pairs whose caption has more tokens than are encoded; None: unknown
    start: StartCheck | None = None  # how far the policy was from the scored errors before the first step
    sums: dict[str, torch.Tensor] | None = None  # over the pairs since the last line of metrics, when resuming
    base_sha256: str | None = None  # of the single file that it began with, if the result names it
    overoptimised_lines: int = 0  # consecutive lines that show over-optimisation
    chosen: Chosen = field(default_factory=lambda: Chosen(Choices()))  # what the choices that were "auto" rest on

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    @property
    def last_step(self) -> int:
        """The step after which the result is written: max_train_steps, unless the run was ended before."""
        return last_step(self.config, self.notes)

    @property
    def report_path(self) -> Path:
        return self.folder / output_folder.BAD_ROWS


def last_step(config: TrainConfig, notes: Mapping[str, Any]) -> int:
    """Return the step at which a run of these notes ends, which `--stop_when_worse` may have ended early."""
    ended = notes.get(ENDED) if config.stop_when_worse else None
    return config.max_train_steps if ended is None else min(config.max_train_steps, ended["at"])


def open_run(config: TrainConfig, ranks: Ranks) -> Run:
    """Open everything that `config` names. Every rank calls this.

    If others may write into the output folder, the main rank must hold it first (`settle`, `output_folder.hold`).
    Raises BadInput for anything the user can fix, and AlreadyDone if `auto` finds nothing left to do.
    """
    config = settle(config, ranks)
    try:
        return _open(config, ranks)
    except BaseException:
        if ranks.is_main:
            run_folder.release(config.output_dir)
        raise


@dataclass(frozen=True)
class Start:
    """Where a run begins: its settings, seed and all, and the checkpoint that it resumes."""

    config: TrainConfig
    files: dict  # of the checkpoint; both are empty for a fresh run
    saved: dict
    restarting: bool  # over what a run left that ended before its first checkpoint
    kept: frozenset[str]  # entries of the output folder that are caches


def find_start(config: TrainConfig, ranks: Ranks, *, writes: bool = True) -> Start:
    """Check what takes moments: choices, output folder, checkpoint and hub. Every rank calls this, after `settle`.

    writes: claim the folder. Otherwise nothing is written, and what a killed process left half-written stays. Raises
    BadInput.
    """
    resuming = config.resume_from_checkpoint is not None
    if not resuming:  # a checkpoint has its own choices
        config = choosing.with_file(config, ranks)
    choosing.check(config, ranks)
    check_objective(config, ranks)
    # a killed process may have left a checkpoint half-replaced, so claim the folder before looking for one
    claim = run_folder.claim if writes else run_folder.check_claim
    ranks.on_main(lambda: claim(config.output_dir, overwrite=config.overwrite, resuming=resuming))
    files, saved = saved_state(config, ranks)
    restarting = resuming and not saved
    kept = run_folder.kept_inside(config.output_dir, CacheSettings.of(config).root, config.cache_dir)
    if restarting:
        ranks.on_main(lambda: run_folder.check_unfinished(config.output_dir, config.logging_dir, kept))
    if saved:
        before = saved["config"]
        config = replace(
            config,
            seed=before["seed"] if config.seed is None else config.seed,
            resolution=config.resolution or before["resolution"],
        )
        config = choosing.resumed(config, before)
        choosing.check(config, ranks)
        refuse_changes(checkpoint.differences(saved["config"], public(config)))
        ranks.on_main(lambda: check_logs(config.output_dir, saved))
    else:
        if resuming:
            config = choosing.with_file(config, ranks)
            choosing.check(config, ranks)
        if config.seed is None:
            config = replace(config, seed=ranks.share(secrets.randbits(31)))
    if config.push_to_hub:
        ranks.on_main(lambda: hub.check_login(config.hub_token))  # fail now rather than after training
    return Start(config, files, saved, restarting, kept)


def check_without_weights(start: Start, ranks: Ranks, pairs: RunPairs | None) -> None:
    """Raise what opening the run would raise, as far as that shows without loading the model: BadInput for settings
    that do not go together, AlreadyDone. `pairs`: None if they are not at hand. Every rank calls this."""
    config, saved = start.config, start.saved
    choosing.workload_of(config, ranks)  # checks the UNet and the resolution
    check_time_ids(config, family_of(base_of(config)))
    if found := timesteps_of(base_of(config)):
        timesteps_within(*found, config.min_timestep, config.max_timestep)
    steps = config.max_train_steps if pairs is None else steps_of(config, pairs)
    if steps is not None:
        check_optimizer(config, steps)
    if saved and pairs is not None:
        config = replace(config, max_train_steps=steps)
        step = check_saved(config, {"pairs": pairs.identity}, saved)
        _check_draws(config, pairs, saved)
        check_whether_done(config, ranks, step, last_step(config, saved["notes"]))


def opened_model(
    config: TrainConfig, ranks: Ranks, pairs: RunPairs, *, resuming: bool = False, only_known: bool = False
) -> tuple[TrainConfig, Family, Chosen]:
    """Make the run's choices and load its model. Returns the configuration with resolution and steps filled in, the
    model, and the choices; `only_known` as in `choosing.chosen_for`. Every rank calls this. Raises BadInput."""
    config, chosen = choosing.chosen_for(config, ranks, pairs, resuming=resuming, only_known=only_known)
    config, family = load_model(config, ranks)
    config = replace(config, max_train_steps=steps_of(config, pairs))
    if bad := nonfinite_tensors(family.unet.named_parameters()):
        raise BadInput(
            f"{config.pretrained_model_name_or_path}: {len(bad)} tensors of the UNet are not finite, first {bad[0]};"
            " download the model again, or name another"
        )
    return config, family, chosen


def _open(config: TrainConfig, ranks: Ranks) -> Run:
    start = find_start(config, ranks)
    config, files, saved, restarting, kept = start.config, start.files, start.saved, start.restarting, start.kept
    pairs = open_pairs(config, ranks, config.output_dir / output_folder.BAD_ROWS)
    ranks.on_main(lambda: _advise(config, ranks, pairs))
    config, family, chosen = opened_model(config, ranks, pairs, resuming=bool(saved))
    check_formats(config, family)
    sha256 = ranks.from_main(lambda: base_sha256(config))  # now: at the end of a long run the file may be gone
    fingerprints = {"base weights": unet_digest(family), "pairs": pairs.identity}
    model = reference_recipe_facts(family, fingerprints["base weights"]) if config.cached_reference else None
    older = older_fingerprint(family.unet) if saved and "base model" in saved["fingerprints"] else {}
    masters, reference = make_trainable(config, ranks, family)

    step, kl = 0, torch.zeros((), device=ranks.device)
    if saved:
        step = check_saved(config, fingerprints | older, saved)
        _check_draws(config, pairs, saved)
        check_whether_done(config, ranks, step, last_step(config, saved["notes"]))
    ranks.on_main(lambda: check_space(config, family, masters))
    trains = step < last_step(config, saved["notes"] if saved else {})  # else only the result has to be written
    cached = None
    if config.cache and trains:
        cached = fill_cache(config, ranks, pairs, needed_rows(config, pairs), family, waiting=logger.warning)
    captions_cut = _known_cut_captions(config, saved)
    if captions_cut is None:
        captions_cut = ranks.from_main(lambda: _count_cut_captions(config, pairs, family))
    if cached and not config.run_validation:  # samples need the encoders
        family.free_encoders(keep=needs_encoders(config))
    scored = None
    if model and trains:
        with not_compiled():  # its batch shapes differ from training's
            scored = score_reference_errors(config, ranks, pairs, cached, family, model)  # while policy equals base
    batches, sets, validation, prompts = open_batches(config, ranks, pairs, cached, scored, family, step)
    if saved:
        if config.run_validation and trains:
            with not_compiled():  # while the policy equals the base, missing or damaged samples are redrawn
                ranks.on_main(
                    lambda: base_samples(family, prompts, sample_settings(config), fingerprints["base weights"])
                )
        _restore(masters, kl, files, saved)
    run = Run(config, ranks, sets, batches, validation, prompts, family, masters, reference, fingerprints, step, kl)
    run.base_sha256 = sha256
    run.cached = cached and cached.counts
    run.captions_cut = captions_cut
    if scored:
        run.scored, run.start = scored.train, scored.start
        if not compiles(config.compile):  # compiled, the first step measures it: scoring runs uncompiled
            run.notes["initial_margin_rms"] = scored.start.initial_margin_rms
    run.bad_rows = {bad.row: bad for bad in sets.bad}
    if saved:
        run.notes |= saved["notes"]
        if not config.stop_when_worse:
            run.notes.pop(ENDED, None)  # the run goes on
        run.sums, run.overoptimised_lines = files.get("metrics"), saved.get("overoptimised_lines", 0)
        if config.streaming and not trains:
            for name, count in saved.get("counts", {}).items():
                setattr(sets, name, count)
        run.logs = logs_of(saved)
        run.bad_rows |= {row[0]: BadRow(*row) for row in saved["bad_rows"]}
    run.notes["captions_cut"] = captions_cut
    run.chosen = chosen
    if chosen.outcomes:
        run.notes["choices"] = [outcome.as_json() for outcome in chosen.outcomes]
    ranks.on_main(lambda: _begin(config, restarting, kept))
    return run


def _advise(config: TrainConfig, ranks: Ranks, pairs: RunPairs) -> None:
    for line in warnings_of(config, ranks, pairs, costs_of(config, ranks.device.type)):
        logger.warning("warning: %s", line)


def _begin(config: TrainConfig, restarting: bool, kept: frozenset[str]) -> None:
    if restarting:
        run_folder.clear_unfinished(config.output_dir, config.logging_dir)
    run_folder.begin(config.output_dir, overwrite=config.overwrite, config_yaml=to_yaml(config), kept=kept)


def sample_settings(config: TrainConfig) -> SampleSettings:
    """How a run of the resolved `config` samples its prompts."""
    return SampleSettings(
        config.output_dir / "samples", config.seed, config.resolution, config.sampling_steps, config.sampling_guidance
    )


def settle(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Return the configuration with batch split and output folder resolved, the same on every rank.

    Settling it again changes nothing. Also sets PyTorch's TF32 flags. Raises BadInput if the batch split is impossible,
    and if a file of the model is neither on this machine nor to be had from the hub.
    """
    a_pass = config.train_batch_size * ranks.world_size
    pairs = config.pairs_per_step or a_pass * config.gradient_accumulation_steps
    if pairs % a_pass:
        raise BadInput(
            f"--pairs_per_step ({pairs}) must be a multiple of train_batch_size x processes"
            f" ({config.train_batch_size} x {ranks.world_size} = {a_pass})"
        )
    ranks.on_main(lambda: check_within_reach(base_of(config)))
    allow_tf32(config.allow_tf32)
    folder = config.output_dir or Path("runs", f"{config.preset or 'train'}-{datetime.now():%Y%m%d-%H%M%S}")
    return replace(
        config,
        pairs_per_step=pairs,
        gradient_accumulation_steps=pairs // a_pass,
        output_dir=ranks.share(folder),
    )


def build_cache(config: TrainConfig, ranks: Ranks) -> build.Counts:
    """Encode the images and captions that the run described by `config` will need; without a seed, those of all pairs.

    Shards whose files do not match their index are encoded again. Every rank calls this. Raises BadInput like
    `open_run`.
    """
    config = settle(config, ranks)
    everything = config.seed is None
    if everything:
        config = replace(config, seed=0, validation_fraction=0.0)
    pairs = open_pairs(config, ranks, None)
    config, family = load_model(config, ranks)
    if pairs.sets is None:
        wanted = needed_rows_of_stream(config)
    elif everything or config.max_train_steps is None:
        rows = torch.cat([pairs.sets.train.pair_id, pairs.sets.validation.pair_id])
        wanted = NeededRows(rows=sorted(rows.tolist()))
    else:
        wanted = needed_rows(config, pairs)
    return fill_cache(config, ranks, pairs, wanted, family, repair=True).counts


def build_reference(config: TrainConfig, ranks: Ranks) -> ReferenceErrors:
    """Compute the reference's errors that the run described by `config` will need, at all draws.

    Without max_train_steps these cover all its pairs. Missing latents and text embeddings are encoded first. Every rank
    calls this. Raises BadInput like `open_run`.
    """
    config = choosing.with_file(settle(config, ranks), ranks)
    config = replace(config, compile="off")  # scoring runs uncompiled
    choosing.check(config, ranks)
    check_objective(config, ranks)
    if config.cached_reference is None:
        raise BadInput("reference needs --draws K: how many times each pair is drawn")
    if config.seed is None:
        raise BadInput("reference needs --seed: the noise of a pair follows from it")
    pairs = open_pairs(config, ranks, None)
    config, _ = choosing.chosen_for(config, ranks, pairs, resuming=False)
    config, family = load_model(config, ranks)
    model = reference_recipe_facts(family)
    # as in training: even requires_grad changes how torch rounds
    family.unet.requires_grad_(config.tuning == "full").to(family.dtype)
    if pairs.sets is None or config.max_train_steps is not None:
        wanted = needed_rows(config, pairs)
    else:
        rows = torch.cat([pairs.sets.train.pair_id, pairs.sets.validation.pair_id])
        wanted = NeededRows(rows=sorted(rows.tolist()))
    cached = fill_cache(config, ranks, pairs, wanted, family, repair=True)
    family.free_encoders(keep=False)
    return score_reference_errors(config, ranks, pairs, cached, family, model, repair=True, everything=True).train


def _known_cut_captions(config: TrainConfig, saved: dict | None) -> int | None:
    """The result of `_count_cut_captions` in the checkpoint; None if there is none or max_train_steps, which decides
    how many pairs of a stream are counted, has changed."""
    if not saved or saved["config"]["max_train_steps"] != config.max_train_steps:
        return None
    return saved["notes"].get("captions_cut")


def _count_cut_captions(config: TrainConfig, pairs: RunPairs, family: Family) -> int | None:
    """Count and log the pairs whose captions are cut off; None for a stream whose rows are not known."""
    found = cut_captions(config, pairs, family.cut_off)
    if found is not None and found.cut:
        logger.warning("%d of %d captions are %s", found.cut, found.captions, found.what)
    return found and found.cut


def make_trainable(config: TrainConfig, ranks: Ranks, family: Family) -> tuple[MasterOptimizer, Reference]:
    """Set up adapters or the full UNet with fp32 masters, and the reference; the order makes the first margin 0."""
    unet = family.unet
    if config.tuning == "lora":
        add_lora(unet, config.rank, config.lora_alpha or config.rank, config.lora_targets, seed=config.seed)
    else:
        unet.requires_grad_(True)
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    ranks.broadcast_([parameter.detach() for parameter in trained.values()])
    masters = MasterOptimizer(trained, family.dtype, config, lr=rate_of(config), steps=config.max_train_steps)
    recompute_activations(unet, config.gradient_checkpointing)
    compile_unet(unet, config.compile)
    reference: Reference = NoReference()
    if config.cached_reference:
        reference = CachedErrors()
    elif find_objective(config.objective).needs_reference:
        reference = AdapterOff(family) if config.tuning == "lora" else FrozenCopy(family, config.compile)
    return masters, reference


def _restore(masters: MasterOptimizer, kl: torch.Tensor, files: dict, saved: dict) -> None:
    """Load a checkpoint's state."""
    kl.copy_(files["counters"]["kl"])
    masters.load_state(files, saved["optimizer_values"])


def _check_draws(config: TrainConfig, pairs: RunPairs, saved: dict) -> None:
    """Raise BadInput if the changed number of draws would have given the pairs trained so far different noise."""
    before, now = saved["config"].get("cached_reference"), config.cached_reference
    if before == now:
        return
    done = None if pairs.sets is None else most_visits(config, len(pairs.sets.train), saved["step"])
    if done is None or min(draws for draws in (before, now) if draws) < done:
        raise BadInput(
            f"--resume_from_checkpoint: --cached_reference was {before} and is {now}, with which the pairs trained so"
            f" far would have had other noise; give {before} again"
            if before
            else f"--resume_from_checkpoint: the run had no cached reference, and {now} draws would have repeated"
            " noise by now; leave --cached_reference out, or give more draws"
        )
