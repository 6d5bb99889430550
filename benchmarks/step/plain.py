"""What the providers that are not ours share: weights from disk, injected tensors, the loss.

Plain PyTorch, diffusers, transformers and peft: nothing here, and nothing in a provider built on it, imports dpo_fast.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.step.cases import CASES, RANK, TOKENS, scheduler_config
from benchmarks.step.work import BETA, Settings, Work

LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 1e-2


@dataclass
class Seen:
    """What an optimizer step over P pairs computed."""

    policy_error: Tensor  # [2P], chosen first: mean squared error of each image
    ref_error: Tensor  # [2P]
    margin: Tensor  # [P]
    grad_norm: Tensor  # [], before clipping

    @staticmethod
    def joined(parts: "list[Seen]") -> "Seen":
        """Join what a step's micro-batches computed, in their order."""

        def images(name: str) -> Tensor:
            return torch.cat([getattr(part, name).detach().float().chunk(2)[side] for side in (0, 1) for part in parts])

        margin = torch.cat([part.margin.detach().float() for part in parts])
        return Seen(images("policy_error"), images("ref_error"), margin, parts[-1].grad_norm)


class Plain:
    """A provider's models and data. Subclasses define `step`, which sets `seen`."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings.read(folder)
        self.case = CASES[self.settings.case]
        self.folder, self.device, self.dtype = folder, torch.device(self.settings.device), self.settings.torch_dtype
        self.work = Work(folder)
        self.index = 0  # the step whose data comes next
        self.waited = 0.0  # seconds spent waiting for data
        self.seen: Seen | None = None
        # Two details of the public scripts are left out because they change the result but not the time: the
        # reference's error is not reduced in half precision, and the loss scale does not start where it overflows.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**8, enabled=self.dtype == torch.float16)
        self.scheduler = DDPMScheduler(
            **{name: value for name, value in scheduler_config(self.case).items() if name != "steps_offset"},
            rescale_betas_zero_snr=self.case.turbo,
        )

    def observed_step(self) -> Seen:
        """Run a step and return what it computed."""
        self.step()
        return self.seen

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet on the device, in training mode."""
        path = self.folder / "model" / "unet"
        return UNet2DConditionModel.from_pretrained(path).to(self.device, dtype).train()

    def add_lora(self, unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
        """Add peft's adapters with the run's initial weights, in fp32; return the parameters to train."""
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
        trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        for name, parameter in trained.items():
            parameter.data = self.work.lora[name].to(self.device, torch.float32, copy=True)
        return list(trained.values())

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        path = self.folder / "model" / "vae"
        return AutoencoderKL.from_pretrained(path).to(self.device, dtype).requires_grad_(False)

    def text_encoders(self, dtype: torch.dtype) -> list[torch.nn.Module]:
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)[: len(self.case.model.text)]
        folders = [self.folder / "model" / f"text_encoder{suffix}" for suffix in ("", "_2")]
        return [
            kind.from_pretrained(path).to(self.device, dtype).requires_grad_(False)
            for kind, path in zip(kinds, folders, strict=False)
        ]

    def tokenizers(self) -> list[CLIPTokenizer]:
        suffixes = ("", "_2")[: len(self.case.model.text)]
        return [CLIPTokenizer.from_pretrained(self.folder / "model" / f"tokenizer{suffix}") for suffix in suffixes]

    def autocast(self):
        """Return the context in which accelerate runs a prepared model's forward."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def injected(self, pairs: slice = slice(None)) -> dict[str, Tensor]:
        """Return the current step's tensors on the device, cut to `pairs`; chosen images still come first."""
        step = self.work.step(self.index)
        chosen, rejected = step["latents"].chunk(2)
        parts = {name: tensor[pairs] for name, tensor in step.items() if name != "latents"}
        parts["latents"] = torch.cat((chosen[pairs], rejected[pairs]))
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in parts.items()}

    def predict(self, unet: torch.nn.Module, noisy: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Return the UNet's prediction for both images of the pairs, fp32 [2P,4,h,w]."""
        added = None
        if "time_ids" in given:
            added = {
                "time_ids": given["time_ids"].repeat(2, 1),
                "text_embeds": given["pooled_prompt_embeds"].repeat(2, 1).to(noisy.dtype),
            }
        embeds = given["prompt_embeds"].repeat(2, 1, 1).to(noisy.dtype)
        with self.autocast():
            prediction = unet(noisy, given["timesteps"].repeat(2), embeds, added_cond_kwargs=added).sample
        return prediction.float()

    def noisy(self, given: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the noised latents and the target, both [2P,4,h,w] in `dtype`; a pair's images share the target."""
        noise = given["noise"].repeat(2, 1, 1, 1).to(dtype)
        return self.scheduler.add_noise(given["latents"].to(dtype), noise, given["timesteps"].repeat(2)), noise


def errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each image, fp32 [2P]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def dpo(policy_error: Tensor, ref_error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss [] and margin [P] of Diffusion-DPO (arXiv 2311.12908 eq. 14)."""
    delta = policy_error - ref_error
    chosen, rejected = delta.chunk(2)
    margin = -0.5 * BETA * (chosen - rejected)
    return -F.logsigmoid(margin).mean(), margin


def embedded(encoders: list[torch.nn.Module], tokens: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Return what the text encoders give: prompt_embeds [N,77,D], and for SDXL pooled [N,D2]."""
    tokens = [ids.to(device) for ids in tokens]
    return sdxl_prompt(encoders, tokens) if len(tokens) == 2 else (encoders[0](tokens[0])[0],)


def sdxl_prompt(encoders: list[torch.nn.Module], tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return prompt_embeds [N,77,D] and pooled [N,D2] of SDXL's two encoders."""
    hidden = []
    for encoder, ids in zip(encoders, tokens, strict=True):
        out = encoder(ids, output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
    return torch.cat(hidden, dim=-1), out[0]


def tokenized(tokenizers: list[CLIPTokenizer], captions: list[str]) -> list[Tensor]:
    """Return token ids, int64 [N,77], for each tokenizer."""
    return [
        t(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
        for t in tokenizers
    ]
