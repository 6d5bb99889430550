"""The forward pass from a batch to the predictions of policy and reference, shared by training, held-out pairs, the
reference's errors and implicit rewards.

A reference is called once per micro-batch, before the policy, and returns what the pair kernels take as `ref`:
predictions [2B,C,h,w] in the compute dtype, errors [2B] in fp32, or None. It has the same module class, dtype and
weights as the policy at step 0, so the first margin is exactly zero.
"""

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpo_fast.data.batch import Batch
from dpo_fast.kernels import noise_pair
from dpo_fast.models.compiling import compile_unet
from dpo_fast.models.family import Conditioning, Family
from dpo_fast.models.lora import AdapterSwitch
from dpo_fast.models.memory_order import memory_format


class Reference(Protocol):
    """What provides the reference model's predictions or errors."""

    def __call__(
        self,
        batch: Batch,
        noisy_latents: Tensor,  # [2B,C,h,w], compute dtype
        conditioning: Conditioning,  # [B,...] each
    ) -> Tensor | None: ...


class AdapterOff:
    """LoRA: the policy itself without its adapters, which costs no memory."""

    def __init__(self, family: Family) -> None:
        self.family, self.unet = family, family.unet
        self.switch = AdapterSwitch(self.unet)

    @torch.no_grad()
    def __call__(self, batch: Batch, noisy_latents: Tensor, conditioning: Conditioning) -> Tensor:
        with self.switch.off():
            return self.family.denoise(self.unet, noisy_latents, batch.timesteps, conditioning)


class FrozenUNet:
    """A UNet separate from the policy's, never trained."""

    def __init__(self, family: Family, unet: nn.Module) -> None:
        self.family, self.unet = family, unet

    @torch.no_grad()
    def __call__(self, batch: Batch, noisy_latents: Tensor, conditioning: Conditioning) -> Tensor:
        return self.family.denoise(self.unet, noisy_latents, batch.timesteps, conditioning)


class FrozenCopy(FrozenUNet):
    """Full fine-tuning: a copy of the UNet with its present weights, compiled according to `mode`.

    Its parameters keep their requires_grad, though nothing here is differentiated: whether torch's matmul folds a batch
    into one product depends on it, and the two ways round differently.
    """

    def __init__(self, family: Family, mode: str = "off") -> None:
        super().__init__(family, copy.deepcopy(family.unet))  # a copy is not compiled, whatever the original is
        compile_unet(self.unet, mode)


class CachedErrors:
    """Precomputed reference errors, which come with the batch: no model, no forward pass."""

    def __call__(self, batch: Batch, noisy_latents: Tensor, conditioning: Conditioning) -> Tensor | None:
        return batch.ref_errors


class NoReference:
    """For objectives that need no reference (sft, mapo)."""

    def __call__(self, batch: Batch, noisy_latents: Tensor, conditioning: Conditioning) -> None:
        return None


class Predictions(NamedTuple):
    """The tensors that an objective compares."""

    policy: Tensor  # [2B,C,h,w], compute dtype
    ref: Tensor | None  # predictions [2B,C,h,w] in the compute dtype, or errors fp32 [2B]; None: no reference
    target: Tensor  # fp32: the noise [B,C,h,w] under epsilon prediction, the velocity [2B,C,h,w] under v-prediction


def predict(
    family: Family,
    unet: nn.Module,  # the policy's
    reference: Reference,
    batch: Batch,
    latents: Tensor,  # fp16 [2B,C,h,w]
    conditioning: Conditioning,  # from `conditioning_of`
    seed: int,
) -> Predictions:
    """Noise both images of each pair with one draw, then run the reference and the policy on the same inputs."""
    noisy, target = add_noise(family, latents, batch, seed)
    ref = reference(batch, noisy, conditioning)  # first: it keeps nothing for the backward pass
    return Predictions(family.denoise(unet, noisy, batch.timesteps, conditioning), ref, target)


def conditioning_of(family: Family, batch: Batch, encoded: Conditioning) -> Conditioning:
    """Return the conditioning of a batch's pairs, [B,...] each, from their `encoded` captions.

    Dropped captions are replaced by the model's empty prompt; for SDXL, time ids are added.
    """
    conditioning = dict(encoded)
    for name, empty in family.empty_prompt().items():
        dropped = batch.dropped.view(-1, *[1] * (empty.dim() - 1))
        conditioning[name] = torch.where(dropped, empty, conditioning[name])
    if family.needs_time_ids:
        conditioning["time_ids"] = batch.time_ids
    return conditioning


def add_noise(family: Family, latents: Tensor, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Return the noisy latents [2B,C,h,w] in the compute dtype and the fp32 target, for fp16 latents [2B,C,h,w].

    The noise is a function of (seed, pair id, draw), the same for both images of a pair.
    """
    schedule = family.schedule
    return noise_pair(
        latents.contiguous(memory_format=memory_format(family.unet)),  # values do not change
        schedule.sqrt_alpha_bar[batch.timesteps],
        schedule.sqrt_one_minus_alpha_bar[batch.timesteps],
        seed,
        batch.pair_id,
        batch.draw,
        prediction_type=schedule.prediction_type,
        dtype=family.dtype,
    )
