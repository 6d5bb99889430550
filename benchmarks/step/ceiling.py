"""What a matrix product and a copy reach here, on random data: the ceilings that measurements are a fraction of.

python -m benchmarks.step.ceiling [--dtypes fp32 fp16 bf16] [--json FILE]
"""

import argparse
import time
from pathlib import Path

import torch

from dpo_fast.choices.timing import seconds
from dpo_fast.files import write_json

# Large enough to fill the machine, small enough to take moments.
_SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
_SECONDS = 2.0
CALLS = 3  # timed together
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of the best of several square matrix products."""
    best = 0.0
    for side in _SIDES[device]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = a @ b
        began = time.perf_counter()
        while time.perf_counter() - began < _SECONDS / len(_SIDES[device]):
            product = seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), CALLS, torch.device(device))
            best = max(best, 2 * side**3 / product / 1e12)
        del a, b, out
    if device == "cuda":
        torch.cuda.empty_cache()  # the providers' processes need the memory
    return best


def copy_ceiling(device: str) -> float:
    """Return the GB/s, reads plus writes, of copying 256 MiB."""
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), CALLS, torch.device(device)) for _ in range(10))
    return 2 * source.nbytes / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES), help="of the products")
    parser.add_argument("--json", type=Path, help="also write them to this file, each when it is measured")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measurements = {"copy_gb_per_s": lambda: copy_ceiling(device)}
    for name in arguments.dtypes:
        measurements[f"{name}_tflops"] = lambda dtype=_DTYPES[name]: matmul_ceiling(device, dtype)
    result = {}
    for name, measure in measurements.items():
        result[name] = measure()
        print(f"{name} {result[name]:.4g}", flush=True)
        if arguments.json:
            write_json(arguments.json, result)


if __name__ == "__main__":
    main()
