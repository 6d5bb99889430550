"""Add each pair's noise to both of its images and compute the target (arXiv 2006.11239 eq. 4, 2202.00512).

    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target = eps                                            epsilon: one for both images
           = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0        v_prediction: one for each image

eps is a pure function of (seed, pair id, draw): Philox4x32-10 and Box-Muller, one block for four channels of one pixel
(reference.normal_noise). It is never written to memory on its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.kernels import dispatch
from dpo_fast.kernels.reference import memory_format


class NoisePair(NamedTuple):
    noisy: Tensor  # [2B, C, H, W], in the requested dtype
    target: Tensor  # float32, [B, C, H, W] for epsilon, [2B, C, H, W] for v_prediction


def noise_pair(
    latents: Tensor,  # [2B, C, H, W] any float dtype, chosen first: rows i and B + i are pair i
    sqrt_alpha_bar: Tensor,  # [B] float32, at each pair's timestep
    sqrt_one_minus_alpha_bar: Tensor,  # [B] float32
    seed: int,  # in [0, 2^64)
    pair_id: Tensor,  # [B] int64
    draw: Tensor,  # [B] int64 in [0, 2^28), not checked: a check would wait for the device
    *,
    prediction_type: str,  # "epsilon" or "v_prediction"
    dtype: torch.dtype,  # of the noisy latents
    backend: str = "auto",
) -> NoisePair:
    """Return the noisy latents and the training target of B pairs.

    Computed in float32; both outputs have the memory format of the latents (contiguous or channels_last), which does
    not change the values. Not differentiable: a backward through it raises. Raises ValueError for shapes, dtypes or
    devices that do not match, an unknown prediction_type and a seed out of range.
    """
    if latents.dim() != 4 or latents.shape[0] % 2 or 0 in latents.shape:
        raise ValueError(f"latents must be [2B, C, H, W], chosen first; got {list(latents.shape)}")
    if not latents.is_floating_point() or not dtype.is_floating_point:
        raise ValueError(f"latents and dtype must be floating point; got {latents.dtype} and {dtype}")
    pairs, blocks = latents.shape[0] // 2, -(-latents.shape[1] // 4) * latents.shape[2] * latents.shape[3]
    if blocks > 1 << 32:
        raise ValueError(f"latents of {blocks} noise blocks an image have more than the 2^32 that can be drawn")
    per_pair = (
        ("sqrt_alpha_bar", sqrt_alpha_bar, torch.float32),
        ("sqrt_one_minus_alpha_bar", sqrt_one_minus_alpha_bar, torch.float32),
        ("pair_id", pair_id, torch.int64),
        ("draw", draw, torch.int64),
    )
    for name, value, wanted in per_pair:
        if value.shape != (pairs,) or value.dtype != wanted or value.device != latents.device:
            raise ValueError(
                f"{name} must be {wanted} [{pairs}] on {latents.device}; "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {prediction_type!r} is not supported; choose epsilon or v_prediction")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed ({seed}) must lie in [0, 2^64)")
    signed_seed = seed if seed < 1 << 63 else seed - (1 << 64)  # an op's integers are int64
    latents = latents.contiguous(memory_format=memory_format(latents))
    return NoisePair(
        *_noise_pair(
            latents,
            sqrt_alpha_bar.contiguous(),
            sqrt_one_minus_alpha_bar.contiguous(),
            signed_seed,
            pair_id.contiguous(),
            draw.contiguous(),
            prediction_type,
            dtype,
            backend,
        )
    )


@torch.library.custom_op("dpo_fast::noise_pair", mutates_args=())
def _noise_pair(
    latents: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    pair_id: Tensor,
    draw: Tensor,
    prediction_type: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = dispatch.module_for("noise_pair", backend, latents)
    return kernels.noise_pair_fwd(
        latents, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, pair_id, draw, prediction_type, dtype
    )


@_noise_pair.register_fake
def _(latents, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, pair_id, draw, prediction_type, dtype, backend):
    images, *image_shape = latents.shape
    targets = images // 2 if prediction_type == "epsilon" else images
    layout, device = memory_format(latents), latents.device
    noisy = torch.empty((images, *image_shape), dtype=dtype, device=device, memory_format=layout)
    target = torch.empty((targets, *image_shape), dtype=torch.float32, device=device, memory_format=layout)
    return noisy, target
