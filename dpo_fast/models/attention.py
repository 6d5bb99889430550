"""The attention of a UNet: PyTorch's scaled_dot_product_attention, with its own or our order of kernels; xformers."""

from importlib.util import find_spec

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_fast.errors import BadInput, missing_extra

# Which kernel of scaled_dot_product_attention is tried first. What it cannot take (fp32; head sizes above 128 or 256)
# goes to the next, and the last takes everything.
ORDERS = {
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "flash": [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}
ATTENTIONS = ("auto", "sdpa", *ORDERS, "xformers")


class OrderedAttention(AttnProcessor2_0):
    """Attention that tries the kernels of scaled_dot_product_attention in an order of its own.

    The order is set in the call itself, so that it holds for policy, reference and recomputation alike, and is traced
    into a compiled block.
    """

    def __init__(self, order: list[SDPBackend]) -> None:
        super().__init__()
        self.order = order

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        with sdpa_kernel(self.order, set_priority=True):
            return super().__call__(*args, **kwargs)


def usable_attention() -> dict[str, str]:
    """Each kind of attention, and why it cannot be used here ("" if it can)."""
    off_cuda = "" if torch.cuda.is_available() else "needs a CUDA device"
    xformers = off_cuda if find_spec("xformers") else "not installed: pip install 'dpo_fast[gpu]'"
    return {"sdpa": "", **dict.fromkeys(ORDERS, off_cuda), "xformers": xformers}


def set_attention(unet: UNet2DConditionModel, attention: str) -> None:
    """Make `unet`, on its device, use `attention`.

    "sdpa": PyTorch's scaled_dot_product_attention, which chooses a kernel itself. "auto": the same, as long as no other
    choice has been measured to be faster. "cudnn", "flash": the same with that kernel first, where it can be used
    (experimental: neither has been run on a GPU yet). "xformers": memory-efficient attention of xformers.

    Raises BadInput for another name, for xformers where it is not installed and for a CUDA kernel off CUDA.
    """
    if attention not in ATTENTIONS:
        raise BadInput(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if attention in ("auto", "sdpa"):
        unet.set_attn_processor(AttnProcessor2_0())
        return
    if attention == "xformers" and find_spec("xformers") is None:
        raise missing_extra("xformers", "gpu", "attention xformers")
    if unet.device.type != "cuda":
        raise BadInput(f"attention {attention} needs a CUDA device, not {unet.device}: use sdpa")
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(OrderedAttention(ORDERS[attention]))
