"""A UNet's attention: PyTorch's scaled_dot_product_attention, in its own or a given kernel order, or xformers."""

from importlib.util import find_spec

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_fast.errors import BadInput, missing_extra

# The order in which scaled_dot_product_attention tries its kernels. Inputs that one does not support (fp32; head sizes
# above 128 or 256) fall through to the next; the last supports everything.
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
    "efficient": [
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ],
}
ATTENTIONS = ("auto", "sdpa", *ORDERS, "xformers")


class OrderedAttention(AttnProcessor2_0):
    """Attention that tries the kernels of scaled_dot_product_attention in a given order.

    The order is set inside the call, so that it applies to policy, reference and recomputation alike and is traced into
    a compiled block.
    """

    def __init__(self, order: list[SDPBackend]) -> None:
        super().__init__()
        self.order = order

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        with sdpa_kernel(self.order, set_priority=True):
            return super().__call__(*args, **kwargs)


def usable_attention() -> dict[str, str]:
    """Return each kind of attention with the reason why it cannot be used here ("" if it can)."""
    off_cuda = "" if torch.cuda.is_available() else "needs a CUDA device"
    xformers = off_cuda if find_spec("xformers") else "not installed: pip install 'dpo_fast[gpu]'"
    return {"sdpa": "", **dict.fromkeys(ORDERS, off_cuda), "xformers": xformers}


def set_attention(unet: UNet2DConditionModel, attention: str) -> None:
    """Make `unet` use `attention`. The UNet must already be on its device.

    "sdpa": PyTorch's scaled_dot_product_attention, which chooses a kernel itself. "auto": the same, unless a run has
    replaced it by what is proven and fastest on its machine. "cudnn", "flash", "efficient": the same, trying that
    kernel first. "xformers": the memory-efficient attention of xformers.

    Raises BadInput for an unknown name, for xformers if it is not installed, and for a CUDA kernel on another device.
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
