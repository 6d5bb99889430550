"""The base pipeline before training: Stable Diffusion's classes at their smallest, in pixel space."""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpo_fast.shapes.render import COLOURS, PLACES, RESOLUTION, SHAPES, SIZES

_WIDTH = 64  # of the text encoder
_TOKENS = 16  # start, thirteen words and commas, end, one to spare
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = sorted({"a", "on", "background", "at", "the", *COLOURS, *SHAPES, *SIZES, *PLACES})


def new_base() -> StableDiffusionPipeline:
    """Return the pipeline with a new UNet and text encoder, drawn from torch's global generator; the VAE is exact."""
    tokenizer = _tokenizer()
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION,
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            projection_dim=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Linear betas: almost no signal is left at the last step. With Stable Diffusion's betas a flat background would
    # still show there, and samples, which start from noise alone, would come out grey.
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        unet=unet,
        vae=pixel_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def pixel_vae() -> AutoencoderKL:
    """Return an autoencoder whose latents are the pixels (3 channels in [-1, 1]) to about one part in a million.

    Every residual branch is zero. All that remains between the two convolutions of each half is a group norm and a
    SiLU: with the channels x, -x, K, -K the norm sees mean 0 and standard deviation K/2 whatever x is, and
    silu(x) - silu(-x) = x.
    """
    big = 1024.0  # K
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=3,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    for half in (vae.encoder, vae.decoder):
        for channel in range(3):
            half.conv_in.weight[channel, channel, 1, 1] = 1
            half.conv_in.weight[3 + channel, channel, 1, 1] = -1
            half.conv_out.weight[channel, channel, 1, 1] = 1
            half.conv_out.weight[channel, 3 + channel, 1, 1] = -1
        half.conv_in.bias[6:] = torch.tensor([big, -big])
        half.conv_norm_out.weight.fill_(big / 2)
    vae.encoder.conv_out.bias[3:] = -30  # log variance: the posterior is practically its mean
    return vae


def _tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer with a token for each word of this world; any other word is spelled letter by letter."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), ",", ",</w>"]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        parts = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # join what earlier merges leave apart; ranked last, this changes no earlier word
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, _START, _END]))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            folder, model_max_length=_TOKENS, bos_token=_START, eos_token=_END, unk_token=_END, pad_token=_END
        )


def _merged(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Apply the merges of a byte pair encoding, in order of rank."""
    for left, right in merges:
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == (left, right):
                joined[-1] = left + right
            else:
                joined.append(part)
        parts = joined
    return parts
