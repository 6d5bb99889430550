"""Run a plan's candidates in child processes, each within limits of time and memory."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = "from dpo_fast.choices.child import main; main()"
POLL_SECONDS = 0.05
WORDS = {"disproved": "wrong", "unusable": "cannot be used", "failed": "failed"}


@dataclass(frozen=True)
class Limits:
    """What one candidate may take."""

    seconds: float = 60.0
    memory_mib: float = 8192.0  # resident in the child, where /proc says how much that is


def prove(plan: str, candidates: Sequence[str], arguments: dict[str, Any], limits: Limits) -> dict[str, str]:
    """Return candidate -> "" if it is proven, else why not, in the order of `candidates`.

    plan: a module's name. arguments: JSON values for it. After a candidate that ends the process or exceeds a limit,
    the others are proven in a new one.
    """
    verdicts: dict[str, str] = {}
    while left := [name for name in candidates if name not in verdicts]:
        current = None
        with _child({"task": "prove", "plan": plan, "candidates": left, "arguments": arguments}, limits) as answers:
            for kind, name, value in answers:
                if kind == "began":
                    current = name
                elif kind == "ended":  # the process; `value` says how
                    if current is not None:
                        verdicts[current] = value
                    elif value:
                        return verdicts | dict.fromkeys(left, f"could not be proven: {value}")
                else:
                    verdicts[name] = "" if kind == "proven" else f"{WORDS[kind]}: {value}"
                    current = None
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
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
        text=True,
        encoding="utf-8",
    )
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        yield _answers(process, limits)
    finally:
        _kill(process)


def _answers(process: subprocess.Popen, limits: Limits) -> Iterator[tuple[str, str, Any]]:
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
            memory = _resident_mib(process.pid)
            if memory > limits.memory_mib:
                yield "ended", "", f"took more than {limits.memory_mib:.0f} MiB"
                return
            if time.monotonic() > deadline:
                yield "ended", "", f"did not end within {limits.seconds:g} s"
                return
            continue
        if line is None:
            break
        yield tuple(json.loads(line))
        deadline = time.monotonic() + limits.seconds
    status = process.wait()
    reason = f"ended the process by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    yield "ended", "", reason * bool(status)


def _resident_mib(process: int) -> float:
    """The resident memory of a process; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0


def _kill(process: subprocess.Popen) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()
    process.stdout.close()
