"""Whether a run fits into the memory of its device, and which flags make it fit."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from dpo_fast.choices.machine import device_name, memory_of
from dpo_fast.config import TrainConfig
from dpo_fast.files import human_bytes
from dpo_fast.parallel import Ranks
from dpo_fast.training.costs import Costs, costs_of

# Memory that a step takes for every byte of its tensors, at most: measured on a CPU, where glibc keeps freed blocks
# (docs/rehearsal.md). A GPU's allocator keeps some too.
MOST_OVER_TENSORS = 1.2


class Fit(NamedTuple):
    """What a run needs of a device's memory, and what it may take; bytes."""

    needed: float
    free: float
    total: float
    where: str

    @property
    def verdict(self) -> str:
        """One of "fits", "tight" and "too large"."""
        if self.needed > self.free:
            return "too large"
        return "tight" if self.needed * MOST_OVER_TENSORS > self.free else "fits"

    def __str__(self) -> str:
        return f"{human_bytes(self.free)} of {human_bytes(self.total)} are free on {self.where}"


def fit_of(costs: Costs, device: torch.device) -> Fit | None:
    """Return how a run of these costs fits; None if the memory of the device is not known.

    The processes of a host share its memory; every GPU has its own.
    """
    memory = memory_of(device)
    if memory is None:
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    share = f", shared by {processes} processes" if processes > 1 else ""
    return Fit(processes * costs.needed, *memory, f"{device_name(device)}{share}")


def cheapest_fit(config: TrainConfig, ranks: Ranks, costs: Costs) -> tuple[str, float] | None:
    """Return the flags that make a run fit at the least cost, and the bytes that it then needs; None if none do.

    A smaller batch at the same pairs a step costs least and gives the same result. What is then given up is time (more
    and more recomputation), precision, and at last full tuning.
    """
    device, share = ranks.device, config.pairs_per_step // ranks.world_size
    for flags, changed in _concessions(config, device):
        sizes = [size for size in range(config.train_batch_size, 0, -1) if share % size == 0]
        for size in sizes:
            smaller = costs_of(replace(changed, train_batch_size=size), device.type, costs.configs)
            fit = fit_of(smaller, device)
            if fit.verdict == "fits":
                batch = [f"--train_batch_size {size} --pairs_per_step {config.pairs_per_step}"]
                return " ".join([*(batch if size < config.train_batch_size else []), *flags]), fit.needed
    return None


def _concessions(config: TrainConfig, device: torch.device) -> Iterator[tuple[list[str], TrainConfig]]:
    """Yield the configuration with no, one, two ... concessions, the cheapest first, and their flags."""
    flags: list[str] = []
    yield flags, config
    modes = {"none": ("selective", "full"), "selective": ("full",)}.get(config.gradient_checkpointing, ())
    for mode in modes:
        config = replace(config, gradient_checkpointing=mode)
        yield [f"--gradient_checkpointing {mode}"], config
    flags += [f"--gradient_checkpointing {modes[-1]}"] if modes else []
    half = half_precision(device)
    if config.mixed_precision == "no" and half is not None:
        flags, config = [*flags, f"--mixed_precision {half}"], replace(config, mixed_precision=half)
        yield flags, config
    if config.optimizer == "adamw":
        flags, config = [*flags, "--use_8bit_adam"], replace(config, optimizer="adamw8bit")
        yield flags, config
    if config.tuning == "full":
        yield [*flags, "--tuning lora"], replace(config, tuning="lora")


def half_precision(device: torch.device) -> str | None:
    """Return the half precision in which a device computes fast; None for a CPU for which PyTorch has no such code."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if supported else None
