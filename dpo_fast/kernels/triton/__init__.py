"""The ops as Triton kernels, one module an op, with the signatures of dpo_fast/kernels/reference.py.

Inputs are dense, float16, bfloat16 or float32, on a CUDA device (on any where Triton interprets). Every kernel is
compiled without contraction of a*b + c, so that its bits do not depend on the variant (layout, alignment, batch), and
computes by arithmetic.py: noise, and gradients at given margins, have the bits of the native backend.
"""

import torch

try:
    from triton import knobs
except ImportError as error:
    raise ImportError(f"Triton cannot be imported ({error}); pip install 'triton>=3.6' (Linux)") from error

if not (torch.cuda.is_available() or knobs.runtime.interpret):
    raise ImportError("Triton needs a CUDA device; without one set TRITON_INTERPRET=1 before Python starts (slow)")
