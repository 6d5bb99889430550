"""The context in which kernels are launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

INTERPRET = knobs.runtime.interpret


def launching_for(*tensors: Tensor | None) -> AbstractContextManager:
    """Return the context to launch in: Triton uses the current device, not that of the tensors.

    Raises ValueError for float64 tensors and, unless Triton interprets, for tensors that are not on a CUDA device.
    """
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise ValueError("backend 'triton' does not compute in float64; choose reference")
        if x is not None and not (x.is_cuda or INTERPRET):
            raise ValueError(
                f"backend 'triton' needs tensors on a CUDA device, got {x.device}; choose auto or reference"
            )
    return torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext()
