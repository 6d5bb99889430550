"""Attention kernels beside each other, on the shapes of training: time, TFLOP/s and error, forward and backward.

    python benchmarks/attention.py [--pairs 1 4] [--dtypes bf16 fp16 fp32] [--cases NAME ...] [--json FILE]

`auto` is what PyTorch chooses itself; the others are that kernel alone, left out where it cannot take the shape.
TFLOP/s counts two products forward and five backward, as flash kernels compute them. `error` is the largest one of
output and gradients against float64, relative to the largest value. The fastest row of a shape is marked.
"""

import argparse
import platform
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.kernels import error, interleaved
from dpo_fast.files import write_json
from dpo_fast.models import COMPUTE_DTYPES

KERNELS = {
    "auto": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# (heads, length of queries, length of keys, head size): self-attention of an image, and cross-attention to 77 tokens.
CASES = {
    "sdxl-1024 64x64": (10, 4096, 4096, 64),
    "sdxl-1024 32x32": (20, 1024, 1024, 64),
    "sdxl-1024 text": (10, 4096, 77, 64),
    "sdxl-512 32x32": (10, 1024, 1024, 64),
    "sdxl-512 16x16": (20, 256, 256, 64),
    "sd15-512 64x64": (8, 4096, 4096, 40),
    "sd15-512 32x32": (8, 1024, 1024, 80),
    "sd15-512 16x16": (8, 256, 256, 160),
    "sd15-512 text": (8, 4096, 77, 40),
}
DTYPES = {"fp32": COMPUTE_DTYPES["no"], "fp16": COMPUTE_DTYPES["fp16"], "bf16": COMPUTE_DTYPES["bf16"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1], help="pairs a call; each is two images")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16"], choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    device = arguments.device
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}")
    print(
        f"{'case':22}{'dtype':>6}{'pairs':>6}  {'kernel':11}{'forward ms':>11}{'TFLOP/s':>9}{'backward ms':>12}"
        f"{'TFLOP/s':>9}{'error':>9}"
    )
    rows = []
    for name in arguments.cases:
        for dtype in arguments.dtypes:
            for pairs in arguments.pairs:
                found = measure(CASES[name], pairs, DTYPES[dtype], device)
                best = min(found, key=lambda row: row["forward_ms"] + row["backward_ms"])
                for row in found:
                    print(
                        f"{name:22}{dtype:>6}{pairs:6}  {row['kernel']:11}{row['forward_ms']:11.3f}"
                        f"{row['forward_tflops']:9.2f}{row['backward_ms']:12.3f}{row['backward_tflops']:9.2f}"
                        f"{row['error']:9.1e}{' *' if row is best else ''}",
                        flush=True,
                    )
                rows += [{"case": name, "dtype": dtype, "pairs": pairs, **row} for row in found]
                if arguments.json:  # after every shape: a long run may be cut off
                    result = {"device": where, "torch": torch.__version__, "command": sys.argv, "rows": rows}
                    write_json(arguments.json, result)


def measure(shape: tuple[int, int, int, int], pairs: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Measure one shape; return a row for each kernel that supports it."""
    heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2 * pairs, length, heads, size, generator=generator).to(device, dtype).transpose(1, 2)
        for length in (queries, keys, keys, queries)  # in the memory layout of a UNet's projections
    )
    inputs = tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))
    truth = outputs(tuple(tensor[:1].detach().double().requires_grad_() for tensor in inputs), grad[:1].double(), None)
    kernels = {name: kernel for name, kernel in KERNELS.items() if takes(kernel, inputs)}
    forward = interleaved({n: lambda k=k: attend(inputs, k) for n, k in kernels.items()}, device)
    both = interleaved({n: lambda k=k: outputs(inputs, grad, k) for n, k in kernels.items()}, device)
    product = 2.0 * 2 * pairs * heads * queries * keys * size
    rows = []
    for name, kernel in kernels.items():
        backward = max(both[name] - forward[name], 1e-9)
        got = outputs(tuple(tensor[:1].detach().requires_grad_() for tensor in inputs), grad[:1], kernel)
        rows.append(
            {
                "kernel": name,
                "forward_ms": forward[name] * 1e3,
                "forward_tflops": 2 * product / forward[name] / 1e12,
                "backward_ms": backward * 1e3,
                "backward_tflops": 5 * product / backward / 1e12,
                "error": error(got, truth),
            }
        )
    return rows


def attend(inputs: tuple[Tensor, ...], kernel: SDPBackend | None) -> Tensor:
    with sdpa_kernel(kernel) if kernel else nullcontext():
        return F.scaled_dot_product_attention(*inputs)


def outputs(inputs: tuple[Tensor, ...], grad: Tensor, kernel: SDPBackend | None) -> tuple[Tensor, ...]:
    """Return the output and the gradients of query, key and value."""
    result = attend(inputs, kernel)
    return result, *torch.autograd.grad(result, inputs, grad)


def takes(kernel: SDPBackend | None, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the kernel supports these tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch explains at length why not
            outputs(tuple(tensor[:1].detach().requires_grad_() for tensor in inputs), inputs[0][:1].detach(), kernel)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
