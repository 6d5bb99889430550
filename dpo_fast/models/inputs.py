"""What a UNet is given, as its configuration says."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def pooled_width(unet: Mapping[str, Any]) -> int:
    """Return the width of the pooled text embedding that a UNet takes, as SDXL's do; 0 for one that takes none."""
    if unet.get("addition_embed_type") != "text_time":
        return 0
    return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]


def of_one_image(unet: Mapping[str, Any], side: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments of a UNet's forward pass over one image of side x side latents, on the meta device:
    to count with, not to compute."""
    with torch.device("meta"):
        inputs: dict[str, Any] = dict(
            sample=torch.zeros(1, unet["in_channels"], side, side, dtype=dtype),
            timestep=torch.zeros(1, dtype=torch.int64),
            encoder_hidden_states=torch.zeros(1, tokens, unet["cross_attention_dim"], dtype=dtype),
        )
        if pooled := pooled_width(unet):
            added: dict[str, Tensor] = dict(
                text_embeds=torch.zeros(1, pooled, dtype=dtype), time_ids=torch.zeros(1, 6, dtype=dtype)
            )
            inputs["added_cond_kwargs"] = added
        return inputs
