"""Training metrics: summed on the device, read only when a line is logged, written to metrics.jsonl and the trackers.

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
from typing import NamedTuple

import torch
import xxhash

from dpo_fast.checksums import Damaged
from dpo_fast.files import atomic_file, naming, parse_json, read_bytes, regular_file

TIMESTEP_BUCKETS = 10  # equal parts of the schedule: [0, T/10), ...

_SUMS = ("pairs", "loss", "margin", "margin_squared", "correct", "chosen_delta", "rejected_delta")


class PairSums:
    """Sums over pairs on the device. `add` launches a few small kernels and never waits for them."""

    def __init__(self, device: torch.device, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.sums = torch.zeros(len(_SUMS), device=device)
        self.by_timestep = torch.zeros(2, TIMESTEP_BUCKETS, device=device)  # pairs, correct
        self._pairs_read = False

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

    def had_pairs(self) -> bool:
        """Whether a pair of weight 1 was added: on this rank, or on any before a `read`. Waits for the device."""
        return self._pairs_read or self.sums[0].item() > 0

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of this rank's sums."""
        return {"sums": self.sums.clone(), "by_timestep": self.by_timestep.clone()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; the tensors may be on the CPU."""
        self.sums.copy_(state["sums"])
        self.by_timestep.copy_(state["by_timestep"])

    def read(self, reduce: Callable[[list[torch.Tensor]], None]) -> dict[str, object]:
        """Sum over ranks with `reduce` (in place), wait for the device, return the means and reset the sums to zero."""
        reduce([self.sums, self.by_timestep])
        totals = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        pairs, correct = self.by_timestep.tolist()
        self.sums.zero_()
        self.by_timestep.zero_()
        n = totals["pairs"]
        self._pairs_read |= n > 0

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
    """Whether a line shows over-optimisation: high accuracy, but a policy worse than the reference on both images.

    The margin then grows by degrading the rejected image faster than the chosen one, not by improving either.
    """
    accuracy, chosen, rejected = (line[k] for k in ("implicit_accuracy", "chosen_error_delta", "rejected_error_delta"))
    return None not in (accuracy, chosen, rejected) and accuracy > 0.6 and chosen > 0 and rejected > 0


class Clock:
    """Wall time of training steps: the total, and the part spent waiting for data."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start counting now, after `step` steps."""
        self.step, self.started, self.waited = step, time.perf_counter(), 0.0

    def read(self, step: int) -> tuple[float, float]:
        """Return the seconds per step since the restart and the fraction of them spent in `waiting`."""
        elapsed = time.perf_counter() - self.started
        return elapsed / (step - self.step), self.waited / elapsed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started


LOGS = ("metrics.jsonl", "validation.jsonl")  # the logs of a run


class Extent(NamedTuple):
    """The extent of a log when a checkpoint was written, as stored in the checkpoint."""

    size: int  # bytes
    digest: str  # of these bytes, XXH3, 128 bits


class MetricsFile:
    """A log with one JSON object per line, flushed after each. Resuming drops the lines after the checkpoint's step.

    Raises Damaged like `kept_lines`.
    """

    def __init__(self, path: Path, keep_through_step: int = 0, extent: Extent | None = None) -> None:
        kept, self.path = b"", path
        if path != Path(os.devnull):
            regular_file(path)
        if path.is_file():
            kept = kept_lines(path, keep_through_step, extent) if keep_through_step else b""
            with atomic_file(path) as temporary:
                temporary.write_bytes(kept)
        self.file = path.open("ab")
        self._size, self._digest = len(kept), xxhash.xxh3_128(kept)

    def write(self, line: dict[str, object]) -> None:
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with naming(self.path):
            self.file.write(data)
            self.file.flush()
        self._size += len(data)
        self._digest.update(data)

    def extent(self) -> Extent | None:
        """Flush the log to disk and return its extent; None if no log is kept."""
        if not self.path.is_file():
            return None
        with naming(self.path):
            os.fsync(self.file.fileno())
        return Extent(self._size, self._digest.hexdigest())

    def close(self) -> None:
        with naming(self.path):
            self.file.close()


def kept_lines(path: Path, through_step: int, extent: Extent | None) -> bytes:
    """Return the lines of a log up to a checkpoint's step: the bytes that `extent` covers.

    Checkpoints of earlier versions have no extent; then the lines are selected by their steps, and a last line that was
    cut off is dropped. Raises Damaged for lines that are not what was written.
    """
    data = read_bytes(path)
    if extent is not None:
        data = data[: extent.size]
        if xxhash.xxh3_128_hexdigest(data) == extent.digest:
            return data
    kept, before, reason = b"", 0, None
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        step = _step_of(line)
        if step is None and extent is None and not line.endswith(b"\n"):  # a killed process was writing it
            break
        if step is None or step <= before:
            reason = f"line {number} is not an object with a later step than the line before"
            break
        before = step
        kept += line if step <= through_step else b""
    if extent is None and reason is None:
        return kept
    reason = reason or f"its first {extent.size} bytes are not those that were there at step {through_step}"
    raise Damaged(
        f"{path} is damaged ({reason}): put it back from a copy, or move it away, and the run goes on with a new one"
    )


def _step_of(line: bytes) -> int | None:
    """The step of a log line; None if the line has no valid step."""
    try:
        step = parse_json(line)["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if type(step) is int and step > 0 else None


def for_trackers(line: dict[str, object]) -> dict[str, float]:
    """Return the line as flat scalars for TensorBoard, wandb and similar trackers."""
    flat = {k: v for k, v in line.items() if isinstance(v, (int, float))}
    for index, value in enumerate(line.get("implicit_accuracy_by_timestep", [])):
        if value is not None:
            flat[f"implicit_accuracy_by_timestep/{index * 100 // TIMESTEP_BUCKETS}%"] = value
    return flat
