"""The work before a run can train: loading the model, filling the cache, computing the reference's errors."""

import logging
from dataclasses import replace
from functools import partial

import torch

from dpo_fast.caching import build, score_reference
from dpo_fast.caching.needed import NeededRows
from dpo_fast.caching.score_reference import AllReferenceErrors, PairsOf, Scoring
from dpo_fast.caching.settings import CacheSettings, ScoringSettings
from dpo_fast.config import TrainConfig
from dpo_fast.data.stream import VALIDATION_DRAWS
from dpo_fast.errors import BadInput
from dpo_fast.models import COMPUTE_DTYPES, Family, load_family, merge_lora
from dpo_fast.models.family import check_resolution, timesteps_within
from dpo_fast.models.source import base_of
from dpo_fast.objectives import find_objective, try_out
from dpo_fast.parallel import Ranks
from dpo_fast.training.batches import (
    RunPairs,
    held_out_transform,
    most_visits,
    needed_rows_of_stream,
    source_of,
    train_stream,
    transform_of,
)

logger = logging.getLogger(__name__)


def load_model(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, Family]:
    """Load the model. Returns it after the configuration, which gets the model's resolution if it has none.

    Raises BadInput for settings that do not fit the model.
    """
    dtype = COMPUTE_DTYPES[config.mixed_precision]
    family = load_family(
        base_of(config),
        dtype=dtype,
        unet_dtype=torch.float32 if config.tuning == "full" else dtype,  # masters start from the fp32 weights
        device=ranks.device,
    )
    config = replace(config, resolution=config.resolution or family.default_resolution)
    check_resolution(config.resolution, family.resolution_multiple, config.pretrained_model_name_or_path)
    check_time_ids(config, type(family))
    limits = config.min_timestep, config.max_timestep
    family.timesteps = timesteps_within(family.timesteps, family.schedule, *limits)
    if config.init_lora:
        merge_lora(family.pipeline, config.init_lora, cache_dir=config.cache_dir, token=config.hub_token)
    if config.proportion_empty_prompts and any(map(_not_finite, family.empty_prompt().values())):
        raise family.text_not_finite("--proportion_empty_prompts: the empty caption")
    return config, family


def check_time_ids(config: TrainConfig, family: type[Family]) -> None:
    """Raise BadInput for size conditioning that models of a family do not have."""
    if config.time_ids == "real" and not family.needs_time_ids:
        raise BadInput(f"--time_ids real is for SDXL: {family.name} has no size conditioning; leave it out")


def _not_finite(tensor: torch.Tensor) -> bool:
    return not bool(tensor.isfinite().all())


def fill_cache(
    config: TrainConfig, ranks: Ranks, pairs: RunPairs, wanted: NeededRows, family: Family, **how: object
) -> build.Cached:
    """Encode what is missing of `wanted`; a stream is then read from the cache. `how`: keywords of `build.fill`."""
    reopen = partial(source_of, config)
    settings = CacheSettings.of(config)
    cached = build.fill(settings, ranks, pairs.source, pairs.manifest, wanted, family, reopen=reopen, **how)
    if config.streaming:
        pairs.manifest.reload()
        pairs.source = pairs.manifest.stream()
    return cached


def score_reference_errors(
    config: TrainConfig,
    ranks: Ranks,
    pairs: RunPairs,
    cached: build.Cached,
    family: Family,
    model: dict,
    *,
    repair: bool = False,
    everything: bool = False,  # all pairs at all draws, and no comparison with the policy
) -> AllReferenceErrors:
    """Compute the missing reference errors; the UNet must hold the reference's weights."""
    rows = _scored_rows(config, pairs, everything)
    draws = config.cached_reference
    if not everything:
        draws = min(draws, most_visits(config, len(rows[0]), config.max_train_steps))
    transform = transform_of(config, family)
    settings = ScoringSettings.of(config)
    work = Scoring(settings, ranks, family, model, cached, transform, rows, draws)
    waiting = None if everything else logger.warning
    train, validation = work.fill(repair=repair, waiting=waiting), None
    start = None if everything else work.check_start(train)
    if pairs.sets is not None and len(pairs.sets.validation) and config.run_validation:
        held_out = pairs.sets.validation
        rows = score_reference.pairs_of_table(pairs.source, held_out, held_out.pair_id.tolist())
        centred = held_out_transform(transform)
        work = Scoring(settings, ranks, family, model, cached, centred, rows, VALIDATION_DRAWS)
        validation = work.fill(repair=repair, waiting=waiting)
    return AllReferenceErrors(train, validation, start)


def _scored_rows(config: TrainConfig, pairs: RunPairs, everything: bool) -> PairsOf:
    """The pairs that training visits; with `everything` and no max_train_steps, all training pairs."""
    if pairs.sets is None:
        return score_reference.pairs_of_stream(config.soft_labels, pairs.manifest, needed_rows_of_stream(config))
    train = pairs.sets.train
    whole = everything and config.max_train_steps is None
    visited = train.pair_id if whole else train_stream(config, train).visited(config.max_train_steps)
    return score_reference.pairs_of_table(pairs.source, train, visited.tolist())


def check_objective(config: TrainConfig, ranks: Ranks) -> None:
    """Import and try out an objective of the user's own. Raises BadInput for one that cannot be trained with."""
    objective = find_objective(config.objective)
    if ":" in config.objective:
        kl = torch.zeros((), device=ranks.device)
        settings = objective.settings.of(beta=config.beta_dpo, label_smoothing=config.label_smoothing, kl=kl)
        ranks.on_all(lambda: try_out(objective, settings, ranks.device))
    if config.cached_reference and not objective.needs_reference:
        raise BadInput(f"--cached_reference: --objective {config.objective} has no reference; leave it out")
