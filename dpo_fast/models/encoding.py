"""What latents and prompt embeddings depend on, as plain values: equal values, equal encodings (up to rounding)."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from dpo_fast.models.family import Family

# What of a component's configuration changes its output beside its weights.
_VAE_CONFIG = ("scaling_factor", "shift_factor", "act_fn", "norm_num_groups", "latent_channels")
_TEXT_CONFIG = ("hidden_act", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "eos_token_id")


def image_encoding(family: Family) -> dict[str, Any]:
    """Of `Family.encode_images`, but for the images."""
    vae = family.pipeline.vae
    return {
        "vae": weights_digest(vae),
        "vae_config": {name: vae.config.get(name) for name in _VAE_CONFIG},
        "dtype": str(vae.dtype).removeprefix("torch."),
        "value": "posterior mean, shifted and scaled, fp16",
    }


def text_encoding(family: Family) -> dict[str, Any]:
    """Of `Family.encode_prompts`, but for the prompts."""
    facts: dict[str, Any] = {"dtype": str(family.dtype).removeprefix("torch."), "value": f"{family.text_kind}, fp16"}
    for suffix in ("", "_2"):
        encoder = getattr(family.pipeline, f"text_encoder{suffix}", None)
        if encoder is not None:
            facts[f"text_encoder{suffix}"] = weights_digest(encoder)
            facts[f"text_config{suffix}"] = {name: getattr(encoder.config, name, None) for name in _TEXT_CONFIG}
            facts[f"tokenizer{suffix}"] = _tokenizer_digest(getattr(family.pipeline, f"tokenizer{suffix}"))
    return facts


def weights_digest(module: nn.Module) -> str:
    """A hash of all weights and their names, the same on every device."""
    whole = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        whole.update(memoryview(flat.view(torch.uint8).numpy()))
    return whole.hexdigest()


def _tokenizer_digest(tokenizer) -> str:
    parts = [
        sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]),
        tokenizer.model_max_length,
        tokenizer.pad_token_id,
        tokenizer.padding_side,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
