"""What a matrix product reaches here, on random data in the case's dtype: the ceiling that rows are a fraction of."""

import time

import torch

# Large enough to fill the machine, small enough to take moments.
_SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
_SECONDS = 2.0


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of the best of several square products."""
    best = 0.0
    for side in _SIDES[device]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = a @ b
        began = time.perf_counter()
        while time.perf_counter() - began < _SECONDS / len(_SIDES[device]):
            best = max(best, 2 * side**3 / _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) / 1e12)
    return best


def _seconds(call, device: str, count: int = 3) -> float:
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - started) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count
