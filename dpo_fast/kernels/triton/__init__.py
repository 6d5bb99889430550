"""The ops as Triton kernels, one module per op, with the signatures of dpo_fast/kernels/reference.py.

Inputs are dense, float16, bfloat16 or float32, on a CUDA device (on any device when Triton interprets). Every kernel is
compiled without fusing a*b + c, so that its results are bit-identical in every variant (layout, alignment, batch), and
uses arithmetic.py: noise, and gradients at given margins, are bit-identical to the native backend's.
"""

import torch

try:
    from triton import knobs
except ImportError as error:
    raise ImportError(f"Triton cannot be imported ({error}); pip install 'triton>=3.6' (Linux)") from error

if not (torch.cuda.is_available() or knobs.runtime.interpret):
    raise ImportError("Triton needs a CUDA device; without one set TRITON_INTERPRET=1 before Python starts (slow)")
