"""From a batch to what the UNet is given: the same for training, for scoring with the reference, and for validation."""

import torch

from dpo_fast.data.batch import Batch
from dpo_fast.kernels import noise_pair
from dpo_fast.models.family import Conditioning, Family


def conditioning_of(family: Family, batch: Batch, encoded: Conditioning) -> Conditioning:
    """What a batch's pairs are conditioned on, [B,...] each, from their `encoded` captions.

    A dropped caption is the model's empty prompt; SDXL's time ids join.
    """
    conditioning = dict(encoded)
    for name, empty in family.empty_prompt().items():
        dropped = batch.dropped.view(-1, *[1] * (empty.dim() - 1))
        conditioning[name] = torch.where(dropped, empty, conditioning[name])
    if family.needs_time_ids:
        conditioning["time_ids"] = batch.time_ids
    return conditioning


def add_noise(
    family: Family, latents: torch.Tensor, batch: Batch, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:  # latents fp16 [2B,C,h,w]
    """Noisy latents [2B,C,h,w] in the compute dtype and the fp32 target, drawn by (seed, pair id, draw)."""
    schedule = family.schedule
    return noise_pair(
        latents.contiguous(memory_format=torch.channels_last),  # as the UNet's weights; the values are the same
        schedule.sqrt_alpha_bar[batch.timesteps],
        schedule.sqrt_one_minus_alpha_bar[batch.timesteps],
        seed,
        batch.pair_id,
        batch.draw,
        prediction_type=schedule.prediction_type,
        dtype=family.dtype,
    )
