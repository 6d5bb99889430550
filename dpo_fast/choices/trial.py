"""Run a plan's candidates in child processes, each within limits of time and memory."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PROGRAM = "from dpo_fast.choices.child import main; main()"
POLL_SECONDS = 0.05
KILL_SECONDS = 10.0  # a process that waits for a driver may not end at once
WORDS = {"disproved": "wrong", "unusable": "cannot be used", "failed": "failed"}


@dataclass(frozen=True)
class Limits:
    """What one candidate may take."""

    seconds: float = 300.0  # with imports and compilation
    memory_mib: float = 8192.0  # of the host, resident in the child, where /proc says how much that is


def prove(plan: str, candidates: Sequence[str], arguments: dict[str, Any], limits: Limits) -> dict[str, str]:
    """Return candidate -> "" if it is proven, else why not, in the order of `candidates`.

    plan: a module's name. arguments: JSON values for it. After a candidate that is wrong, ends the process or exceeds a
    limit, the others are proven in a new one.
    """
    verdicts: dict[str, str] = {}
    while left := [name for name in candidates if name not in verdicts]:
        current, before = None, len(verdicts)
        with _child({"task": "prove", "plan": plan, "candidates": left, "arguments": arguments}, limits) as answers:
            for kind, name, value in answers:
                if kind == "began":
                    current = name
                elif kind != "ended":
                    verdicts[name] = "" if kind == "proven" else f"{WORDS[kind]}: {value}"
                    current = None
                elif current is not None:
                    verdicts[current] = value or "ended with status 0"
                elif len(verdicts) == before:
                    reason = f"could not be proven: {value or 'the process ended before its first answer'}"
                    return {name: verdicts.get(name, reason) for name in candidates}
    return {name: verdicts[name] for name in candidates}


def times(plan: str, candidates: Sequence[str], arguments: dict[str, Any], limits: Limits) -> dict[str, list[float]]:
    """Return candidate -> seconds of its rounds, which take turns. Empty if the process did not come to its end."""
    found: dict[str, list[float]] = {}
    request = {"task": "times", "plan": plan, "candidates": list(candidates), "arguments": arguments}
    with _child(request, limits) as answers:
        for kind, name, value in answers:
            if kind == "timed":
                found[name] = value
            elif kind == "ended" and value:
                return {}
    return found


@contextmanager
def _child(request: dict[str, Any], limits: Limits) -> Iterator[Iterator[tuple[str, str, Any]]]:
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
            yield _answers(process, errors, limits)
        finally:
            _kill(process)


def _answers(process: subprocess.Popen, errors: IO[bytes], limits: Limits) -> Iterator[tuple[str, str, Any]]:
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
