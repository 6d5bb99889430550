"""The scheduler that a model is sampled and saved with: it has the schedule that the model was trained with.

Zero terminal SNR requires three things of a sampler (arXiv 2305.08891): the rescaled betas; a first step at the last
timestep, which only trailing spacing takes for every number of steps; and v-prediction, since the noise that
epsilon-prediction finds in pure noise says nothing about the image. For epsilon-prediction the rescaled betas are kept
but the spacing is leading, so that the last timestep, which was not trained (`usable_timesteps`), is never visited. At
that timestep, x_0 would be (x - eps) / 0 in DDIM, and Euler, for which diffusers sets sigma to 4096 there, would
multiply any error in eps by 4096.

SDXL-Turbo keeps the scheduler that it was published with, whatever schedule it is trained with: it samples in one to
four steps, starting at the last timestep with a sigma of 14.6, and predicts epsilon.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from dpo_fast.schedule import NoiseSchedule


@dataclass(frozen=True)
class Sampler:
    """A scheduler class, and the settings in which its config differs from that of the scheduler it replaces."""

    kind: type[SchedulerMixin]
    changes: dict[str, Any]  # JSON values

    def of(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """Return `scheduler` itself if nothing changes, else a new one that keeps the rest of its config."""
        if self.kind is type(scheduler) and not self.changes:
            return scheduler
        return self.kind.from_config(scheduler.config, **self.changes)

    def __str__(self) -> str:
        return ", ".join((self.kind.__name__, *(f"{name} {value}" for name, value in self.changes.items())))


def sampler_for(scheduler: SchedulerMixin, schedule: NoiseSchedule, *, turbo: bool) -> Sampler:
    """Return the sampler of a model that came with `scheduler` and was trained with `schedule`.

    If the schedule has zero terminal SNR, a scheduler class that does not support it (PNDM, Heun, LMS) is replaced by
    DDIM.
    """
    kind, config, changes = type(scheduler), scheduler.config, {}
    if config.get("prediction_type", "epsilon") != schedule.prediction_type:
        changes["prediction_type"] = schedule.prediction_type
    epsilon = schedule.prediction_type == "epsilon"
    heeds = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters  # others ignore it
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
