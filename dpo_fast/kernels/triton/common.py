"""Where the kernels are launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

INTERPRET = knobs.runtime.interpret


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
