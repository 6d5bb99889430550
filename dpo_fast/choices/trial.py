"""Run a plan's candidates in child processes, each within limits of time and memory."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PROGRAM = "from dpo_fast.choices.child import main; main()"
POLL_SECONDS = 0.05
KILL_SECONDS = 10.0  # a process that waits for a driver may not end at once
WORDS = {"disproved": "wrong", "unusable": "cannot be used", "failed": "failed", "skipped": "not tried"}
UNPROVABLE = "could not be proven"
NO_TIME = f"{WORDS['skipped']}: there was no time left for it"
WHILE_TIMED = "while the proven candidates were timed"


@dataclass(frozen=True)
class Limits:
    """What the candidates may take."""

    seconds: float = 300.0  # each, with imports and compilation
    memory_mib: float = 8192.0  # of the host, resident in the child, where /proc says how much that is
    all_seconds: float = math.inf  # after this time no further candidate is begun
    end_seconds: float = math.inf  # after this time nothing goes on, and nothing that was not timed by then is chosen


@dataclass(frozen=True)
class Evidence:
    """What proving and timing gave on one machine, as JSON values."""

    reasons: dict[str, str]  # candidate -> "" if it is proven, else why not
    rounds: dict[str, list[float]] = field(default_factory=dict)  # of baseline and proven: seconds of a call, by round
    first: dict[str, float] = field(default_factory=dict)  # seconds of the first call, which compiles

    @property
    def final(self) -> bool:
        """Whether another trial would say the same. Not where time or memory ran out: other processes may have taken
        them."""
        return all(
            name in self.rounds if not reason else not _of_the_moment(reason) for name, reason in self.reasons.items()
        )


def _of_the_moment(reason: str) -> bool:
    """Whether a verdict may be due to what else runs on the machine."""
    begins = (UNPROVABLE, WORDS["skipped"], "did not end within", "took more than", "ended the process by SIGKILL")
    lacks = any(word in reason.lower() for word in ("memory", "alloc"))
    return reason.startswith(begins) or (lacks and not reason.startswith((WORDS["disproved"], WORDS["unusable"])))


def judge(
    plan: str,  # a module's name
    baseline: str | None,  # timed beside the proven candidates; None: nothing is timed
    candidates: Sequence[str],
    arguments: dict[str, Any],  # JSON values for the plan
    limits: Limits,
    note: Callable[[str], None] = lambda doing: None,  # is told what begins: a candidate, or "timing"
) -> Evidence:
    """Prove the candidates, and time those that are proven in turn with the baseline.

    All of it happens in one process, unless a candidate is wrong, ends the process or exceeds a limit: then the rest
    follows in a new one. Candidates whose timing ends the process or exceeds a limit are all out: any may have done it.
    """
    verdicts: dict[str, str] = {}
    compiled: dict[str, float] = {}  # seconds of the first call, as a proof knows them
    began, end = time.monotonic(), time.monotonic() + limits.end_seconds
    while True:
        left = [name for name in candidates if name not in verdicts]
        proven = [name for name, reason in verdicts.items() if not reason]
        if not left and (baseline is None or not proven):
            return Evidence({name: verdicts[name] for name in candidates})
        request = {
            "plan": plan,
            "arguments": arguments,
            "candidates": left,
            "timed": [] if baseline is None else [baseline, *proven],
            "seconds": min(limits.all_seconds - (time.monotonic() - began), 1e9),
        }
        current, before, timing, times = None, len(verdicts), False, {}
        with _child(request, limits, end) as answers:
            for kind, name, value in answers:
                if kind == "unstartable":
                    return _unprovable(candidates, verdicts, value)
                if kind in ("began", "timing"):
                    current, timing = name, kind == "timing"
                    note(name or kind)
                elif kind == "timed":
                    times[name] = value
                elif kind == "proven":
                    verdicts[name], current = "", None
                    if value is not None:
                        compiled[name] = value
                elif kind != "ended":
                    verdicts[name], current = f"{WORDS[kind]}: {value}", None
                elif value == NO_TIME:
                    return Evidence({name: verdicts.get(name, NO_TIME) for name in candidates})
                elif timing and value:
                    times = {}
                    verdicts = {name: reason or f"{value} {WHILE_TIMED}" for name, reason in verdicts.items()}
                elif timing:
                    pass
                elif current is not None:
                    verdicts[current] = value or "ended with status 0"
                elif left and len(verdicts) == before:
                    return _unprovable(candidates, verdicts, value or "the process ended before its first answer")
        if timing or (not left and proven):
            reasons = {name: verdicts[name] for name in candidates}
            first = {name: max(found[0], compiled.get(name, 0.0)) for name, found in times.items()}
            return Evidence(reasons, {name: found[1] for name, found in times.items()}, first)


def _unprovable(candidates: Sequence[str], verdicts: dict[str, str], why: str) -> Evidence:
    return Evidence({name: verdicts.get(name, f"{UNPROVABLE}: {why}") for name in candidates})


@contextmanager
def _child(request: dict[str, Any], limits: Limits, end: float) -> Iterator[Iterator[tuple[str, str, Any]]]:
    """Start the child; yield its answers, the last one ("ended", "", why or ""). It is gone at the end of the block."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            with suppress(BrokenPipeError):  # stdin stays open: the child ends when it is closed
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            yield _answers(process, errors, limits, end)
        finally:
            _kill(process)


def _answers(
    process: subprocess.Popen, errors: IO[bytes], limits: Limits, end: float
) -> Iterator[tuple[str, str, Any]]:
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            line = lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if _resident_mib(process.pid) > limits.memory_mib:
                yield "ended", "", f"took more than {limits.memory_mib:.0f} MiB"
                return
            if time.monotonic() > end:
                yield "ended", "", NO_TIME
                return
            if time.monotonic() > deadline:
                yield "ended", "", f"did not end within {limits.seconds:g} s"
                return
            continue
        if line is None:
            break
        with suppress(ValueError):  # something printed as Python started
            kind, name, value = json.loads(line)
            yield kind, name, value
            deadline = time.monotonic() + limits.seconds
    try:
        status = process.wait(timeout=max(POLL_SECONDS, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        yield "ended", "", f"did not end within {limits.seconds:g} s"
        return
    yield "ended", "", _reason(status, errors)


def _reason(status: int, errors: IO[bytes]) -> str:
    """How a process ended, with the last line that it printed; "" if it ended as it should."""
    if not status:
        return ""
    how = f"ended with status {status}"
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        how = f"ended the process by {names.get(-status, f'signal {-status}')}"
    errors.seek(0)
    printed = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{how} ({printed[-1][:200]})" if printed else how


def _resident_mib(process: int) -> float:
    """The resident memory of a process; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:  # else its number may be another's by now
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=KILL_SECONDS)
    with suppress(OSError):
        process.stdin.close()
