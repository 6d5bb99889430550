"""What latents and prompt embeddings depend on, as plain values: equal values, equal encodings (up to rounding)."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from dpo_fast.models.family import Family

# What of a component's configuration changes its output beside its weights.
_VAE_CONFIG = ("scaling_factor", "shift_factor", "act_fn", "norm_num_groups", "latent_channels")
_UNET_CONFIG = (
    "act_fn",
    "addition_embed_type",
    "addition_time_embed_dim",
    "attention_head_dim",
    "center_input_sample",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "num_attention_heads",
    "resnet_out_scale_factor",
    "resnet_time_scale_shift",
    "upcast_attention",
)
_TEXT_CONFIG = (
    "hidden_act",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_norm_eps",
    "eos_token_id",
    "use_attention_mask",
)


def image_encoding(family: Family) -> dict[str, Any]:
    """Of `Family.encode_images`, but for the images."""
    vae = family.pipeline.vae
    return {
        "vae": weights_digest(vae),
        "vae_config": {name: vae.config.get(name) for name in _VAE_CONFIG},
        "dtype": _precision(vae.dtype, family.device),
        "value": "posterior mean, shifted and scaled, fp16",
    }


def text_encoding(family: Family) -> dict[str, Any]:
    """Of `Family.encode_prompts`, but for the prompts."""
    facts: dict[str, Any] = {"dtype": _precision(family.dtype, family.device), "value": f"{family.text_kind}, fp16"}
    for suffix in ("", "_2"):
        encoder = getattr(family.pipeline, f"text_encoder{suffix}", None)
        if encoder is not None:
            facts[f"text_encoder{suffix}"] = weights_digest(encoder)
            facts[f"text_config{suffix}"] = {name: getattr(encoder.config, name, None) for name in _TEXT_CONFIG}
            facts[f"tokenizer{suffix}"] = _tokenizer_digest(getattr(family.pipeline, f"tokenizer{suffix}"))
    return facts


def prediction(family: Family) -> dict[str, Any]:
    """Of the reference's predictions and targets, but for latents, text and draws. Ask before adapters are added."""
    schedule, unet = family.schedule, family.unet
    config = {name: unet.config.get(name) for name in _UNET_CONFIG}
    zeros = bool(family.pipeline.config.get("force_zeros_for_empty_prompt", False))
    return {
        "reference": weights_digest(unet, family.dtype),
        "unet_config": json.loads(json.dumps(config)),
        "dtype": str(family.dtype).removeprefix("torch."),
        "prediction_type": schedule.prediction_type,
        "schedule": _digest(schedule.alphas_cumprod.cpu().numpy().tobytes()),
        "timesteps": [int(family.timesteps[0]), int(family.timesteps[-1]), len(family.timesteps)],
        "timesteps_digest": _digest(family.timesteps.numpy().tobytes()),
        "timestep_grid": family.timestep_grid,
        "empty_prompt": "zeros" if zeros else "encoded",
    }


def weights_digest(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A hash of all weights, cast to `dtype`, and of their names, the same on every device."""
    whole = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().to(dtype or tensor.dtype).cpu().contiguous().reshape(-1)
        whole.update(f"{name} {tuple(tensor.shape)} {flat.dtype}\n".encode())
        whole.update(memoryview(flat.view(torch.uint8).numpy()))
    return whole.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """A dtype in words; fp32 on a GPU may be TF32."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")


def _tokenizer_digest(tokenizer) -> str:
    """A hash of all that turns a text into tokens: rules, merges, vocabulary, length, padding."""
    whole = getattr(tokenizer, "backend_tokenizer", None)
    if whole is not None:
        rules = json.loads(whole.to_str())
        for passing in ("version", "truncation", "padding"):  # the last two are set anew by every call
            rules.pop(passing, None)
    else:  # in Python: CLIP's before transformers 5
        rules = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.bpe_ranks.items(), key=lambda rank: rank[1])]
    parts = [rules, tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
