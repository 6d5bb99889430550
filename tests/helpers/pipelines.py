"""Tiny pipelines of the real classes, for tests: a few hundred kilobytes, 64 x 64 pixels, 8 x 8 latents.

Every parameter is random, norms and biases included: a fresh model's norms (weight 1, bias 0) survive any cast, so they
would hide a policy and a reference that run in different precisions. Weights are scaled by their fan-in, so that
activations, latents and predictions all have about unit scale.

`python -m tests.helpers.pipelines sdxl FOLDER` writes one to try a command line with.
"""

import json
import sys
import tempfile
from itertools import islice, product
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpo_fast.models import Family, load_family
from dpo_fast.models.source import ModelSource

RESOLUTION = 64  # pixels; 8 x 8 latents
_TEXT_WIDTH, _TEXT_WIDTH_2 = 32, 48
_TIME_WIDTH = 8
_START, _END = "<|startoftext|>", "<|endoftext|>"
_BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make_sd15(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vae: dict | None = None,  # more of the VAE's configuration
    second: bool = False,
) -> Path:
    """Write a Stable Diffusion 1.5 pipeline with weights in `dtype` to `folder`; return `folder`.

    second: of Stable Diffusion 2.x instead, with OpenCLIP's text encoder and linear projections.
    """
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=second,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=_vae(scaling_factor=0.18215, **vae or {}),
        text_encoder=CLIPTextModel(_text_config(_TEXT_WIDTH, "gelu" if second else "quick_gelu")),
        tokenizer=tokenizer(pad_token=_END),
        scheduler=PNDMScheduler(
            **_BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder, dtype, seed)


def make_sdxl(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float32,
    force_zeros: bool = True,
    seed: int = 0,
    vae: dict | None = None,  # more of the VAE's configuration
) -> Path:
    """Write a Stable Diffusion XL pipeline with weights in `dtype` to `folder`; return `folder`."""
    scheduler = EulerDiscreteScheduler(**_BETAS, steps_offset=1, prediction_type=prediction_type)
    return _save(_sdxl(scheduler, force_zeros, vae), folder, dtype, seed)


def make_turbo(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write an SDXL pipeline with Turbo's scheduler and weights in `dtype` to `folder`; return `folder`."""
    scheduler = EulerAncestralDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="trailing")
    return _save(_sdxl(scheduler, force_zeros=True), folder, dtype, seed)


def sdxl_around(unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """A pipeline, in memory alone, with a UNet of any width and text encoders that need not fit it."""
    pipeline = _sdxl(EulerDiscreteScheduler(**_BETAS, steps_offset=1), force_zeros=True)
    pipeline.register_modules(unet=unet)
    return pipeline


def _sdxl(scheduler, force_zeros: bool, vae: dict | None = None) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=_TEXT_WIDTH + _TEXT_WIDTH_2,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_WIDTH,
        projection_class_embeddings_input_dim=_TEXT_WIDTH_2 + 6 * _TIME_WIDTH,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(scaling_factor=0.13025, **vae or {}),
        text_encoder=CLIPTextModel(_text_config(_TEXT_WIDTH, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(_TEXT_WIDTH_2, "gelu")),
        tokenizer=tokenizer(pad_token=_END),
        tokenizer_2=tokenizer(pad_token="!"),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def _vae(scaling_factor: float, **more) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
        scaling_factor=scaling_factor,
        **more,
    )


def _text_config(width: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=512,
        eos_token_id=513,
    )


def tokenizer(pad_token: str, vocabulary: int = 514) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer of `vocabulary` tokens: a token a letter, so prompts of more than 75 letters are cut.

    A vocabulary of more than 514 has merges of two letters, as many as fit, beginning with the printable ones.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable]
    symbols += [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's names for the bytes that do not print
    letters = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges = list(islice(product(symbols, letters), vocabulary - len(letters) - 2))
    tokens = [*letters, *(first + second for first, second in merges), _START, _END]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad_token)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Give every parameter another random value, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(part, nn.Embedding):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name == "bias":
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)


@torch.no_grad()
def _save(pipeline: DiffusionPipeline, folder: Path, dtype: torch.dtype, seed: int) -> Path:
    modules = [part for _, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)]
    for i, module in enumerate(modules):
        randomise(module, 1000 * seed + i)
    vae = pipeline.vae  # a trained VAE's raw latents have a standard deviation of 1 / scaling_factor
    vae.quant_conv.weight /= vae.config.scaling_factor
    vae.post_quant_conv.weight *= vae.config.scaling_factor
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return Path(folder)


def default_time_ids(resolution: int, n: int) -> torch.Tensor:
    """SDXL's micro-conditioning of an uncropped square image, fp32 [n,6]: original height and width, crop top and left,
    target height and width, in pixels."""
    row = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
    return row.repeat(n, 1)


def load_model(
    path: Path | str, *, dtype: torch.dtype, device: torch.device | str, unet_dtype: torch.dtype | None = None, **source
) -> Family:
    """`load_family` of the model at `path`; source: further fields of ModelSource."""
    source = {name: str(value) if isinstance(value, Path) else value for name, value in source.items()}
    return load_family(ModelSource(str(path), **source), dtype=dtype, device=device, unet_dtype=unet_dtype)


if __name__ == "__main__":
    makers = {"sd15": make_sd15, "sdxl": make_sdxl, "turbo": make_turbo}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        sys.exit(f"usage: python -m tests.helpers.pipelines {'|'.join(makers)} FOLDER")
    makers[sys.argv[1]](Path(sys.argv[2]))
