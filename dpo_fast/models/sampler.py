"""The scheduler that a model is sampled with and saved with: it has the schedule that was trained.

Zero terminal SNR needs three things of a sampler (arXiv 2305.08891): the rescaled betas; a first step at the last
timestep, which only the trailing spacing takes for every number of steps; and v-prediction, since the noise that
epsilon-prediction finds in pure noise says nothing about the image. For epsilon-prediction the rescaled betas are kept,
but the last timestep, which was not trained (`usable_timesteps`), is never visited: the spacing is leading. There x_0
would be (x - eps) / 0 in DDIM, and in Euler, where diffusers puts sigma 4096, any error of eps times 4096.

SDXL-Turbo keeps the scheduler that it was published with, whatever schedule it is trained at: its sampler starts at the
last timestep, with a sigma of 14.6, in one of one to four steps, and predicts epsilon.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from dpo_fast.schedule import NoiseSchedule


@dataclass(frozen=True)
class Sampler:
    """A scheduler class, and what its config says otherwise than the config of the scheduler that it replaces."""

    kind: type[SchedulerMixin]
    changes: dict[str, Any]  # JSON values

    def of(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """`scheduler` itself where nothing is changed, else a new one with the rest of its config."""
        if self.kind is type(scheduler) and not self.changes:
            return scheduler
        return self.kind.from_config(scheduler.config, **self.changes)

    def __str__(self) -> str:
        return ", ".join((self.kind.__name__, *(f"{name} {value}" for name, value in self.changes.items())))


def sampler_for(scheduler: SchedulerMixin, schedule: NoiseSchedule, *, turbo: bool) -> Sampler:
    """What a model that was trained with `schedule` is sampled with, if `scheduler` is what it came with.

    A scheduler whose class has no zero terminal SNR (PNDM, Heun, LMS) gives way to DDIM.
    """
    kind, config, changes = type(scheduler), scheduler.config, {}
    if config.get("prediction_type", "epsilon") != schedule.prediction_type:
        changes["prediction_type"] = schedule.prediction_type
    epsilon = schedule.prediction_type == "epsilon"
    heeds = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters  # others carry it along unread
    rescaled = heeds and bool(config.get("rescale_betas_zero_snr", False))
    if schedule.rescaled == rescaled or (turbo and epsilon):
        return Sampler(kind, changes)
    changes["rescale_betas_zero_snr"] = schedule.rescaled
    if schedule.rescaled:
        spacing = "leading" if epsilon else "trailing"
        if config.get("timestep_spacing") != spacing:
            changes["timestep_spacing"] = spacing
        if not heeds:
            kind = DDIMScheduler
            changes["clip_sample"] = False  # the default is for pixels
    return Sampler(kind, changes)
