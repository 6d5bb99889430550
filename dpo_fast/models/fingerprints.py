"""What cached latents, embeddings and reference errors depend on, as plain values, and short names of weights.

Equal values mean equal encodings, up to rounding.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dpo_fast.models.family import Family
from dpo_fast.models.tokenizers import tokenizer_digest

# A recipe holds the whole configuration of a component, but for what is known to change no value:
_NOT_OF_OUTPUTS = frozenset(
    (
        "sample_size",  # of the VAE and the UNet: the default resolution, which a run settles for itself
        "force_upcast",  # of the VAE: chooses its dtype, which the recipe has
        "initializer_factor",  # of text encoders: what untrained weights are drawn with
        "initializer_range",
        # of all configurations of transformers: origin, names of classes, and what a call returns
        "architectures",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_return_dict",
    )
)  # and whatever begins with an underscore: _class_name (recipes have the module's own), _diffusers_version,
# _name_or_path, and what the libraries note for themselves


def latents_recipe_facts(family: Family) -> dict[str, Any]:
    """Everything a cached latent depends on, except the image."""
    vae = family.pipeline.vae
    return {
        "vae": weights_digest(vae),
        "vae_config": _configuration(vae),
        "dtype": _precision(vae.dtype, family.device),
        "value": f"posterior mean, {'normalized and ' if family.latent_statistics else ''}scaled, fp16",
    }


def text_recipe_facts(family: Family) -> dict[str, Any]:
    """Everything a cached embedding depends on, except the caption."""
    facts: dict[str, Any] = {"dtype": _precision(family.dtype, family.device), "value": f"{family.text_kind}, fp16"}
    for suffix in ("", "_2"):
        encoder = getattr(family.pipeline, f"text_encoder{suffix}", None)
        if encoder is not None:
            facts[f"text_encoder{suffix}"] = weights_digest(encoder)
            facts[f"text_config{suffix}"] = _configuration(encoder)
            facts[f"tokenizer{suffix}"] = tokenizer_digest(getattr(family.pipeline, f"tokenizer{suffix}"))
    return facts


def unet_digest(family: Family) -> str:
    """A name for the UNet's weights in the dtype in which they are run. Call it before adapters are added."""
    return weights_digest(family.unet, family.dtype)


def reference_recipe_facts(family: Family, weights: str | None = None) -> dict[str, Any]:
    """Everything a reference error depends on, except latents, text and draws. Call it before adapters are added.

    `weights` is the `unet_digest` where it is known.
    """
    schedule, unet = family.schedule, family.unet
    zeros = bool(family.pipeline.config.get("force_zeros_for_empty_prompt", False))
    return {
        "reference": weights or unet_digest(family),
        "unet_config": _configuration(unet),
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


def _configuration(module: nn.Module) -> dict[str, Any]:
    """All settings of a model that may change what it gives, as JSON has them, by name, and its class.

    A setting that a version of the library adds changes the recipe, since its default is a part of what is computed.
    """
    config = module.config
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kept = {name: settings[name] for name in sorted(settings) if not name.startswith("_")}
    for name in _NOT_OF_OUTPUTS & kept.keys():
        del kept[name]
    return {"class": type(module).__name__, **json.loads(json.dumps(kept, default=str))}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """A dtype in words; fp32 on a GPU may be TF32."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")
