"""The numbers of a run: summed on the device, read at log lines only, written to metrics.jsonl and to the trackers.

Every value is a mean over the pairs since the last line, over all ranks. A pair whose image could not be decoded has
weight 0 and counts nowhere.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dpo_fast.files import regular_file, write_text

TIMESTEP_BUCKETS = 10  # of the schedule's length each: [0, T/10), ...

_SUMS = ("pairs", "loss", "margin", "margin_squared", "correct", "chosen_delta", "rejected_delta")


class PairSums:
    """Sums over pairs on the device. `add` launches a few small kernels and never waits for them."""

    def __init__(self, device: torch.device, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.sums = torch.zeros(len(_SUMS), device=device)
        self.by_timestep = torch.zeros(2, TIMESTEP_BUCKETS, device=device)  # pairs, correct

    @torch.no_grad()
    def add(
        self,
        loss: torch.Tensor,  # [] the mean over B pairs, weights applied
        margin: torch.Tensor | None,  # [B]; None for objectives without one
        error_delta: torch.Tensor | None,  # [2B] policy minus reference error
        timesteps: torch.Tensor,  # [B]
        weight: torch.Tensor,  # [B], 0 or 1
    ) -> None:
        """Add one micro-batch."""
        pairs = weight.sum()
        rows = [pairs, loss.detach() * weight.numel()]
        if margin is not None:
            correct = ((margin > 0).float() + 0.5 * (margin == 0).float()) * weight
            chosen, rejected = (error_delta.view(2, -1) * weight).sum(1).unbind()
            rows += [(margin * weight).sum(), (margin.square() * weight).sum(), correct.sum(), chosen, rejected]
            bucket = timesteps * TIMESTEP_BUCKETS // self.num_train_timesteps
            self.by_timestep.index_add_(1, bucket, torch.stack([weight, correct]))
        else:
            rows += [torch.full_like(pairs, math.nan)] * 5
        self.sums += torch.stack(rows)

    def read(self, reduce: Callable[[list[torch.Tensor]], None]) -> dict[str, object]:
        """Sum over ranks by `reduce` (in place), wait for the device, return the means and start again from zero."""
        reduce([self.sums, self.by_timestep])
        totals = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        pairs, correct = self.by_timestep.tolist()
        self.sums.zero_()
        self.by_timestep.zero_()
        n = totals["pairs"]

        def mean(name: str) -> float | None:
            value = totals[name] / n if n else math.nan
            return value if math.isfinite(value) else None

        squared = mean("margin_squared")
        return {
            "loss": mean("loss"),
            "margin": mean("margin"),
            "margin_rms": None if squared is None else math.sqrt(squared),
            "implicit_accuracy": mean("correct"),
            "chosen_error_delta": mean("chosen_delta"),
            "rejected_error_delta": mean("rejected_delta"),
            "implicit_accuracy_by_timestep": [c / p if p else None for c, p in zip(correct, pairs, strict=True)],
        }


def overoptimised(line: dict[str, object]) -> bool:
    """The signature of over-optimisation: accuracy rises while the policy is worse than the reference on both images.

    The margin then grows by spoiling the rejected image faster than the chosen one, not by improving either.
    """
    accuracy, chosen, rejected = (line[k] for k in ("implicit_accuracy", "chosen_error_delta", "rejected_error_delta"))
    return None not in (accuracy, chosen, rejected) and accuracy > 0.6 and chosen > 0 and rejected > 0


def interval95(share: float, n: int) -> list[float]:
    """The 95% interval [low, high] of a share of n independent cases: E. B. Wilson, JASA 22 (1927), 209."""
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


class Clock:
    """Wall time of training steps: what they take in all, and what of it is waiting for data."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from now, `step` steps being done."""
        self.step, self.started, self.waited = step, time.perf_counter(), 0.0

    def read(self, step: int) -> tuple[float, float]:
        """Seconds a step since the restart, and the fraction of it spent in `waiting`."""
        elapsed = time.perf_counter() - self.started
        return elapsed / (step - self.step), self.waited / elapsed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block does not count."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started


class MetricsFile:
    """One JSON object a line, flushed at once. Resuming drops the lines after the checkpoint's step."""

    def __init__(self, path: Path, keep_through_step: int = 0) -> None:
        if path != Path(os.devnull):
            regular_file(path)
        if path.is_file():
            kept = []
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:  # the line a killed process was writing
                    break
                if line["step"] <= keep_through_step:
                    kept.append(text + "\n")
            write_text(path, "".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, object]) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def for_trackers(line: dict[str, object]) -> dict[str, float]:
    """The line as flat scalars for TensorBoard, wandb and their like."""
    flat = {k: v for k, v in line.items() if isinstance(v, (int, float))}
    for index, value in enumerate(line.get("implicit_accuracy_by_timestep", [])):
        if value is not None:
            flat[f"implicit_accuracy_by_timestep/{index * 100 // TIMESTEP_BUCKETS}%"] = value
    return flat
