"""The reference model of Diffusion-DPO, in the forms the trainer can hold it in.

A reference is called once a micro-batch, before the policy, and gives what the pair kernels take as `ref`:
predictions [2B,C,H,W] in the compute dtype, or errors [2B] in fp32, or None. It is the same module class, dtype and
weights as the policy at step 0, which makes the first margin exactly zero.
"""

import copy
from typing import Protocol

import torch
from torch import nn

from dpo_fast.data.batch import Batch
from dpo_fast.models.compiling import compile_unet
from dpo_fast.models.family import Family
from dpo_fast.models.lora import AdapterSwitch


class Reference(Protocol):
    """What the trainer asks of a reference."""

    def __call__(
        self,
        batch: Batch,
        noisy_latents: torch.Tensor,  # [2B,C,H,W], compute dtype
        conditioning: dict[str, torch.Tensor],  # [B,...] each
    ) -> torch.Tensor | None: ...


class AdapterOff:
    """LoRA: the policy itself without its adapters. Costs no memory."""

    def __init__(self, family: Family) -> None:
        self.family, self.unet = family, family.unet
        self.switch = AdapterSwitch(self.unet)

    @torch.no_grad()
    def __call__(self, batch, noisy_latents, conditioning):
        with self.switch.off():
            return self.family.denoise(self.unet, noisy_latents, batch.timesteps, conditioning)


class FrozenCopy:
    """Full fine-tuning: a copy of the UNet as it is now, never trained; compiled as `mode` says.

    Its parameters keep their requires_grad, though nothing here is differentiated: torch's matmul folds a batch into
    one product or not depending on it, and the two round differently.
    """

    def __init__(self, family: Family, mode: str = "off") -> None:
        self.family = family
        self.unet: nn.Module = copy.deepcopy(family.unet)  # a copy is not compiled, whatever the original is
        compile_unet(self.unet, mode)

    @torch.no_grad()
    def __call__(self, batch, noisy_latents, conditioning):
        return self.family.denoise(self.unet, noisy_latents, batch.timesteps, conditioning)


class CachedErrors:
    """Errors that were computed beforehand, which a batch brings along: no model, no forward pass."""

    def __call__(self, batch, noisy_latents, conditioning):
        return batch.ref_errors


class NoReference:
    """Objectives that need none (sft, mapo)."""

    def __call__(self, batch, noisy_latents, conditioning):
        return None
