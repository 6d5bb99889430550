"""The noise schedule in float64 and the timesteps worth training on.

diffusers keeps its schedules in float32 and casts them to the dtype of the latents in `add_noise`; in half precision
that is a different schedule. Here the cumulative product and the rescaling are float64, and what the kernels read is
rounded to float32 once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dpo_fast.errors import BadInput

PREDICTION_TYPES = ("epsilon", "v_prediction")

_REMEDY = "use a base model of SD1.5, SD2 or SDXL that is trained with epsilon or v-prediction"
_BETA_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt_alpha_bar[t] x_0 + sqrt_one_minus_alpha_bar[t] eps, for t in [0, T)."""

    alphas_cumprod: Tensor  # [T] float64, "abar" in formulas
    sqrt_alpha_bar: Tensor  # [T] float32
    sqrt_one_minus_alpha_bar: Tensor  # [T] float32
    prediction_type: str  # "epsilon" or "v_prediction"
    rescaled: bool = False  # to zero terminal SNR: abar of the last timestep is 0

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.numel()

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        return replace(
            self,
            alphas_cumprod=self.alphas_cumprod.to(device),
            sqrt_alpha_bar=self.sqrt_alpha_bar.to(device),
            sqrt_one_minus_alpha_bar=self.sqrt_one_minus_alpha_bar.to(device),
        )


def noise_schedule(
    scheduler_config: Mapping,  # of the pipeline's scheduler, whichever it is
    *,
    zero_terminal_snr: str,  # "on", "off", or "auto": on for Turbo and where the config says rescale_betas_zero_snr
    turbo: bool,
    prediction_type: str | None = None,  # None: as the config says
) -> NoiseSchedule:
    """Return the schedule that a model was trained with, from the config of any diffusers scheduler that has betas.

    Raises BadInput for a config of another kind of training (`check_discrete`), a beta_schedule that diffusers does not
    know, a prediction type other than epsilon and v_prediction, and any other zero_terminal_snr.
    """
    check_discrete(scheduler_config)
    prediction_type = prediction_type or scheduler_config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise BadInput(f"prediction_type {prediction_type!r} is not supported; choose {' or '.join(PREDICTION_TYPES)}")
    if zero_terminal_snr not in ("auto", "on", "off"):
        raise BadInput(f"zero_terminal_snr {zero_terminal_snr!r} is not known; choose auto, on or off")
    if zero_terminal_snr == "auto":
        rescale = turbo or bool(scheduler_config.get("rescale_betas_zero_snr", False))
    else:
        rescale = zero_terminal_snr == "on"

    abar = (1 - _betas(scheduler_config).double()).cumprod(0)
    if rescale:
        abar = _zero_terminal_snr(abar)
    return NoiseSchedule(abar, abar.sqrt().float(), (1 - abar).sqrt().float(), prediction_type, rescale)


def check_discrete(scheduler_config: Mapping) -> None:
    """Raise BadInput for a scheduler of models that are not trained at discrete noise levels given by betas.

    Those are EDM (Playground v2.5; CosXL, whose Euler scheduler has continuous timesteps), flow matching, and
    CogVideoX's shifted signal-to-noise ratio. Everything else in a config (spacing, Karras sigmas and their ends, the
    last sigma, clipping, the solver's order) only affects how a trained model is sampled.
    """
    if not isinstance(scheduler_config, Mapping):
        raise BadInput(f"the scheduler config is no object but a {type(scheduler_config).__name__}: copy it again")
    name, found = scheduler_config.get("_class_name", "the scheduler"), None
    if "sigma_data" in scheduler_config or str(name).startswith("EDM"):
        found = "EDM's continuous noise levels"
    elif scheduler_config.get("timestep_type", "discrete") == "continuous":
        found = "EDM's continuous noise levels (timestep_type continuous)"
    elif scheduler_config.get("use_flow_sigmas"):
        found = "flow matching (use_flow_sigmas)"
    elif scheduler_config.get("snr_shift_scale", 1.0) != 1.0:
        found = f"a shifted signal-to-noise ratio (snr_shift_scale {scheduler_config['snr_shift_scale']})"
    if found:
        raise BadInput(f"{name} says that the model was trained with {found}, which is not supported; {_REMEDY}")
    if scheduler_config.get("beta_schedule") is None and scheduler_config.get("trained_betas") is None:
        raise BadInput(f"the scheduler config has no betas (flow matching, EDM), which is not supported; {_REMEDY}")


def turbo_grid(num_train_timesteps: int, steps: int = 4) -> list[int]:
    """Return the timesteps SDXL-Turbo was distilled on, the ends of `steps` equal parts: 249, 499, 749, 999 of 1000."""
    return [num_train_timesteps * k // steps - 1 for k in range(1, steps + 1)]


def usable_timesteps(schedule: NoiseSchedule, grid: Sequence[int] | None) -> Tensor:
    """Return the timesteps that have a gradient, int64 [n] ascending on the CPU: all of them, or those of the grid.

    At abar = 0 both noisy images of a pair are pure noise. Under epsilon prediction they then have the same target and
    prediction, and margin and gradient are 0, so those timesteps are left out. Under v_prediction the targets differ,
    so they stay.
    """
    abar = schedule.alphas_cumprod.cpu()
    timesteps = torch.arange(abar.numel()) if grid is None else torch.tensor(sorted(set(grid)), dtype=torch.int64)
    if schedule.prediction_type == "epsilon":
        timesteps = timesteps[abar[timesteps] > 0]
    return timesteps


def _betas(scheduler_config: Mapping) -> Tensor:
    """Return the betas, float32 [T], as diffusers computes them: exactly the values the model was trained with."""
    settings = {key: scheduler_config[key] for key in _BETA_SETTINGS if key in scheduler_config}
    try:
        return DDPMScheduler(**settings).betas
    except NotImplementedError as error:
        raise BadInput(f"beta_schedule {settings['beta_schedule']!r} is not one diffusers knows: {error}") from error


def _zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the first stays and the last is exactly 0 (arXiv 2305.08891, algorithm 1)."""
    root = abar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))).square()
