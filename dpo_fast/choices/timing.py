"""Time calls that take turns, so that a noisy machine disturbs all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

LEAST_ROUNDS, SECONDS = 4, 8.0


class Times(NamedTuple):
    """How long a candidate takes."""

    first: float  # seconds of the first call, which compiles and allocates
    rounds: list[float]  # seconds of one later call, a value a round


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,  # fewer, but at least LEAST_ROUNDS, where they take longer than SECONDS
    round_seconds: float,  # short calls are repeated until a round takes about as long
) -> dict[str, Times]:
    """Time every call in rounds, by events on CUDA, else by the clock."""
    first, repeats = {}, {}
    for name, call in calls.items():
        once = first[name] = seconds(call, 1, device)
        if once < SECONDS / LEAST_ROUNDS:  # else it is long enough, even if it compiled
            once = seconds(call, 1, device)
        repeats[name] = max(1, round(round_seconds / max(once, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > SECONDS:
            break
        for name, call in calls.items():
            found[name].append(seconds(call, repeats[name], device))
    return {name: Times(first[name], found[name]) for name in calls}


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call, the mean of `repeats`."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def open_device(name: str) -> torch.device:
    """Return a device, made the current one. Raises RuntimeError if it cannot be used, because it is exclusive to
    another process, for one."""
    device = torch.device(name)
    if device.type == "cuda":
        # without a launcher a run's device has no index, which set_device refuses; it is then the first
        torch.cuda.set_device(0 if device.index is None else device.index)
        torch.zeros(1, device=device).item()
    return device
