"""Cache keys: everything that cached latents, embeddings and reference errors depend on, as plain values.

Equal values mean equal encodings, up to rounding. Weights are represented by digests.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dpo_fast.models.family import Family
from dpo_fast.models.text_chunks import CHUNK
from dpo_fast.models.tokenizers import tokenizer_digest

# A recipe holds a component's complete configuration, except for settings that are known not to affect its outputs:
_NOT_OF_OUTPUTS = frozenset(
    (
        "sample_size",  # VAE and UNet: the default resolution; a run chooses its own
        "force_upcast",  # VAE: decides its dtype, which is in the recipe
        "initializer_factor",  # text encoders: how untrained weights are drawn
        "initializer_range",
        # every configuration of transformers: origin, class names, and what a call returns
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
)  # and names that begin with an underscore: _class_name (recipes have the module's own), _diffusers_version,
# _name_or_path, and the libraries' internal notes


def latents_recipe_facts(family: Family) -> dict[str, Any]:
    """Return everything that a cached latent depends on, except the image."""
    vae = family.pipeline.vae
    return {
        "vae": weights_digest(vae),
        "vae_config": _configuration(vae),
        "dtype": _precision(vae.dtype, family.device),
        "value": f"posterior mean, {'normalized and ' if family.latent_statistics else ''}scaled, fp16",
    }


def text_recipe_facts(family: Family) -> dict[str, Any]:
    """Return everything that a cached embedding depends on, except the caption."""
    facts: dict[str, Any] = {"dtype": _precision(family.dtype, family.device), "value": f"{family.text_kind}, fp16"}
    facts |= {name: value for name, value in token_facts(family.max_token_length).items() if value is not None}
    for suffix in ("", "_2"):
        encoder = getattr(family.pipeline, f"text_encoder{suffix}", None)
        if encoder is not None:
            facts[f"text_encoder{suffix}"] = weights_digest(encoder)
            facts[f"text_config{suffix}"] = _configuration(encoder)
            facts[f"tokenizer{suffix}"] = tokenizer_digest(getattr(family.pipeline, f"tokenizer{suffix}"))
    return facts


def token_facts(max_token_length: int) -> dict[str, int | None]:
    """Return what a text recipe says of the length of captions: None, that it says nothing, for the usual 75 tokens, so
    that caches that are older than the choice still match."""
    return {"max_token_length": None if max_token_length == CHUNK else max_token_length}


def unet_digest(family: Family) -> str:
    """Return a digest of the UNet's weights in the compute dtype. Call it before adapters are added."""
    return weights_digest(family.unet, family.dtype)


def reference_recipe_facts(family: Family, weights: str | None = None) -> dict[str, Any]:
    """Return everything that a reference error depends on, except latents, text and draws.

    Call it before adapters are added. `weights` is the `unet_digest`, if already known.
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
    """Return a hash of all weights (cast to `dtype`, if given) and their names, the same on every device."""
    whole = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().to(dtype or tensor.dtype).cpu().contiguous().reshape(-1)
        whole.update(f"{name} {tuple(tensor.shape)} {flat.dtype}\n".encode())
        whole.update(memoryview(flat.view(torch.uint8).numpy()))
    return whole.hexdigest()


def _configuration(module: nn.Module) -> dict[str, Any]:
    """Return a model's class and all its settings that may affect its outputs, as JSON values sorted by name.

    A setting that a new library version adds changes the recipe, since its default is part of the computation.
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
    """Return the name of a dtype, or "tf32" for fp32 on a GPU where TF32 is allowed."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")
