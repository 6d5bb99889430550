"""What the kernels share: the store's rounding, and where they are launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in `dtype`, to the nearest, ties to even. The interpreter's own cast to bfloat16 truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        upper = tl.where(x == x, upper, 0x7FC0)  # the sum could carry a nan's bits into the sign
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


def launching_for(*tensors: Tensor | None) -> AbstractContextManager:
    """The context to launch in: Triton takes the current device, not that of the tensors.

    Raises ValueError for what the kernels do not take.
    """
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise ValueError("backend 'triton' does not compute in float64; choose reference")
        if x is not None and not (x.is_cuda or INTERPRET):
            raise ValueError(
                f"backend 'triton' needs tensors on a CUDA device, got {x.device}; choose auto or reference"
            )
    return torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext()
