"""What a run warns of before it starts: settings that are allowed, but seldom what was meant.

Every warning is one line that carries the values and a remedy. A dry run prints them, and a run logs them.
"""

from math import floor
from typing import NamedTuple

import torch

from dpo_fast.config import TrainConfig
from dpo_fast.files import free_bytes, human_bytes
from dpo_fast.parallel import Ranks
from dpo_fast.presets import PRESETS
from dpo_fast.statistics import interval95
from dpo_fast.training.batches import RunPairs, most_visits, steps_of
from dpo_fast.training.costs import Costs
from dpo_fast.training.memory_fit import MOST_OVER_TENSORS, cheapest_fit, fit_of, half_precision
from dpo_fast.training.optim import rate_of

# docs/training.md, "What it warns of", says where these numbers come from.
MANY_PASSES = 50
FEW_PASSES = 0.1
ENOUGH_VISITS = 32_000
RATE_FACTOR = 50.0
PUBLISHED_ACCURACY = 0.61
FEW_PAIRS_FOR_DRAWS = 10_000  # docs/reference_cache.md


class Visits(NamedTuple):
    """How often a run visits its pairs."""

    steps: int
    pairs: int | None  # to train on, or None if a stream does not say
    visited: int  # visits, of all pairs together
    exact: bool  # whether `pairs` is their number: of a stream it is at least that, since ties are still in it

    @property
    def passes(self) -> float | None:
        return None if self.pairs is None else self.visited / self.pairs


def visits_of(config: TrainConfig, pairs: RunPairs) -> Visits:
    """Return how often the run of a settled configuration visits its pairs."""
    steps = steps_of(config, pairs)
    if pairs.sets is not None:
        return Visits(steps, len(pairs.sets.train), steps * config.pairs_per_step, True)
    rows = pairs.source.length if pairs.source is not None else None
    return Visits(steps, rows or None, steps * config.pairs_per_step, False)


def warnings_of(config: TrainConfig, ranks: Ranks, pairs: RunPairs | None, costs: Costs, images: int = 0) -> list[str]:
    """Return what there is to warn of, for a settled configuration.

    pairs: None if they are not at hand. images: that an evaluation makes of each model.
    """
    visits = None if pairs is None else visits_of(config, pairs)
    steps = config.max_train_steps if visits is None else visits.steps
    held_out = 0 if pairs is None or pairs.sets is None else len(pairs.sets.validation)
    said = [
        visits and of_passes(config, visits),
        visits and of_draws(config, visits),
        steps and of_warm_up(config, steps),
        of_rate(config),
        of_rank(config, costs),
        held_out and of_held_out(config, held_out),
        of_precision(config, ranks.device),
        of_memory(config, ranks, costs),
        steps and of_disk(config, costs, steps, images),
    ]
    return [line for line in said if line]


def of_passes(config: TrainConfig, visits: Visits) -> str | None:
    """Warn of a run that passes far too often over its pairs, or sees hardly any of them."""
    if visits.passes is None:
        return None
    about = f"{visits.steps} steps of {config.pairs_per_step} pairs"
    count = f"{visits.pairs:,} pairs" if visits.exact else f"at most {visits.pairs:,} pairs"
    if visits.passes > MANY_PASSES:
        steps = floor(MANY_PASSES * visits.pairs / config.pairs_per_step)
        fewer = f"--max_train_steps {steps}" if steps else "a smaller --pairs_per_step and fewer --max_train_steps"
        return (
            f"{about} pass {visits.passes:,.0f} times over {count}: so often that the policy learns these pairs by"
            f" heart (the published recipes pass 5 times over theirs). Take more pairs, or {fewer}, and hold some out"
            " to see when to stop (--run_validation --validation_fraction 0.1)"
        )
    if visits.passes < FEW_PASSES and visits.visited < ENOUGH_VISITS:
        steps = -(-visits.pairs // config.pairs_per_step)
        return (
            f"{about} see only {visits.visited:,} of {count}: --max_train_steps {steps} sees each once; if so few are"
            f" meant, --max_train_samples reads no more than needed"
        )
    return None


def of_draws(config: TrainConfig, visits: Visits) -> str | None:
    """Warn of cached draws of the reference that recur too often for so few pairs."""
    if not config.cached_reference or visits.pairs is None:
        return None
    visited = min(visits.pairs, visits.visited)
    most = most_visits(config, visited, visits.steps)
    enough = -(-most // 2)
    if config.cached_reference >= enough or visited >= FEW_PAIRS_FOR_DRAWS:
        return None
    return (
        f"--cached_reference {config.cached_reference}: {visited} pairs are visited up to {most} times each, at the"
        f" same noises and timesteps again and again; so few pairs want at least {enough} draws, and with {most} no"
        " draw recurs"
    )


def of_warm_up(config: TrainConfig, steps: int) -> str | None:
    """Warn of a learning rate that has not warmed up when the run ends."""
    if config.lr_scheduler == "constant" or config.lr_warmup_steps < steps:
        return None
    reached = (steps - 1) / config.lr_warmup_steps
    return (
        f"--lr_warmup_steps {config.lr_warmup_steps}: the run ends after {steps} steps, within the warm-up, at"
        f" {reached:.0%} of its learning rate; --lr_warmup_steps {steps // 10} leaves most of the run at all of it"
    )


def of_rate(config: TrainConfig) -> str | None:
    """Warn of a scaled learning rate that is far from what every preset trains at."""
    rates = [_rate_of_preset(preset) for preset in PRESETS.values()]
    low, high, rate = min(rates), max(rates), rate_of(config)
    if not config.scale_lr or low / RATE_FACTOR <= rate <= high * RATE_FACTOR:
        return None
    return (
        f"--scale_lr multiplies --learning_rate {config.learning_rate:g} by the {config.pairs_per_step} pairs of a"
        f" step, which gives {rate:g}; the presets train at {low:g} to {high:g}. Give the rate itself, such as"
        f" --no_scale_lr --learning_rate {low:g}"
    )


def _rate_of_preset(preset: dict[str, object]) -> float:
    pairs = preset.get("pairs_per_step", 1)
    return preset["learning_rate"] * (pairs if preset.get("scale_lr") else 1)


def of_rank(config: TrainConfig, costs: Costs) -> str | None:
    """Warn of adapters of a higher rank than the weights that they change."""
    narrow = [rank for rank in costs.unet.ranks if rank < config.rank]
    if not narrow:
        return None
    return (
        f"--rank {config.rank}: {len(narrow)} of the {len(costs.unet.ranks)} adapted layers have room for a rank of"
        f" {min(narrow)} to {max(narrow)} only; what is above that costs memory and adds nothing:"
        f" --rank {min(narrow)} is enough for all of them"
    )


def of_held_out(config: TrainConfig, held_out: int) -> str | None:
    """Warn of so few held-out pairs that their accuracy cannot tell a good run from chance."""
    enough = pairs_that_tell(PUBLISHED_ACCURACY)
    if held_out >= enough:
        return None
    low, high = interval95(0.5, held_out)
    return (
        f"--validation_fraction {config.validation_fraction:g} holds out {held_out} pairs, whose accuracy is known to"
        f" +-{(high - low) / 2:.2f} only; {enough} tell {PUBLISHED_ACCURACY}, as published models have it, from chance:"
        " hold out more, or judge by the samples"
    )


def pairs_that_tell(accuracy: float) -> int:
    """Return how many held-out pairs it takes until the 95% interval around an accuracy leaves out one half."""
    return next(n for n in range(1, 10**6) if interval95(accuracy, n)[0] > 0.5)


def of_precision(config: TrainConfig, device: torch.device) -> str | None:
    """Warn of half precision on a CPU that has no fast code for it."""
    if device.type != "cpu" or config.mixed_precision == "no":
        return None
    fast = half_precision(device)
    if config.mixed_precision == fast:
        return None
    other = f", or {fast} to halve the memory," if fast else ""
    why = (
        "PyTorch has no fast code for the gradients of fp16 convolutions on a CPU"
        if config.mixed_precision == "fp16"
        else "PyTorch has no fast bf16 code for this CPU"
    )
    return (
        f"--mixed_precision {config.mixed_precision}: the training really computes in {config.mixed_precision} here,"
        f" and {why}: a step takes many times as long as in fp32; --mixed_precision no{other} is faster"
    )


def of_memory(config: TrainConfig, ranks: Ranks, costs: Costs) -> str | None:
    """Warn of a run that will probably not fit into the device's memory."""
    fit = fit_of(costs, ranks.device)
    if fit is None or fit.verdict == "fits":
        return None
    cheapest = cheapest_fit(config, ranks, costs)
    if cheapest is None:
        remedy = "no flag makes it fit: free memory, or take a larger device"
    else:
        remedy = f"{cheapest[0]} needs {human_bytes(cheapest[1])}"
    if fit.verdict == "tight":
        might = f"a step may take up to {MOST_OVER_TENSORS:g} times that; {remedy}"
        return f"memory is tight: the run needs at least {human_bytes(fit.needed)}, {fit}; {might}"
    return f"the run needs {human_bytes(fit.needed)} of memory, but only {fit}; {remedy}"


class DiskNeed(NamedTuple):
    """What a run writes into its output folder."""

    checkpoints: int  # at once, at most: an older one is deleted once its successor is whole
    bytes: float  # of these, and of the result


def disk_need(config: TrainConfig, costs: Costs, steps: int, images: int = 0) -> DiskNeed:
    """Return what a run of so many steps writes, with so many images of an evaluation of each model."""
    written = -(-steps // config.checkpointing_steps)
    kept = written if config.checkpoints_total_limit is None else min(written, config.checkpoints_total_limit + 1)
    return DiskNeed(kept, kept * costs.checkpoint + costs.result + evaluation_bytes(costs, images))


def evaluation_bytes(costs: Costs, images: int) -> int:
    """Return the bytes of so many images of each of two models, at most: PNGs are at most as large as their pixels."""
    return 6 * images * costs.resolution**2


def of_disk(config: TrainConfig, costs: Costs, steps: int, images: int = 0) -> str | None:
    """Warn of an output folder whose disk does not hold all that the run will write."""
    need, free = disk_need(config, costs, steps, images), free_bytes(config.output_dir)
    if need.bytes <= free:
        return None
    others = need.bytes - need.checkpoints * costs.checkpoint
    room = floor((free - others) / costs.checkpoint) if costs.checkpoint else need.checkpoints
    fewer = f"--checkpoints_total_limit {room - 1}" if room > 1 else "another --output_dir"
    what = ", the result and the evaluation's images" if images else " and the result"
    return (
        f"{config.output_dir}: {human_bytes(free)} are free, but {need.checkpoints} checkpoints{what} take"
        f" {human_bytes(need.bytes)}; {fewer} fits, or free some space"
    )
