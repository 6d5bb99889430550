"""The attention kernels of a UNet: PyTorch's scaled_dot_product_attention or xformers."""

from importlib.util import find_spec

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from dpo_fast.errors import BadInput, missing_extra

ATTENTIONS = ("auto", "sdpa", "xformers")


def usable_attention() -> dict[str, str]:
    """Each kind of attention, and why it cannot be used here ("" if it can)."""
    if find_spec("xformers") is None:
        xformers = "not installed: pip install 'dpo_fast[gpu]'"
    else:
        xformers = "" if torch.cuda.is_available() else "needs a CUDA device"
    return {"sdpa": "", "xformers": xformers}


def set_attention(unet: UNet2DConditionModel, attention: str) -> None:
    """Make `unet`, on its device, use `attention`: "sdpa", "xformers" or "auto" (sdpa).

    Raises BadInput for another name, for xformers where it is not installed and for xformers off CUDA.
    """
    if attention not in ATTENTIONS:
        raise BadInput(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if attention != "xformers":
        unet.set_attn_processor(AttnProcessor2_0())
        return
    if find_spec("xformers") is None:
        raise missing_extra("xformers", "gpu", "attention xformers")
    if unet.device.type != "cuda":
        raise BadInput(f"attention xformers needs a CUDA device, not {unet.device}: use sdpa")
    unet.enable_xformers_memory_efficient_attention()
