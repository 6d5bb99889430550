"""Run commands side by side, each in a process of its own: as many at once as there are slots.

A slot is what a process gets for itself, a GPU for one. A command that fails stops no other. When this process is
interrupted, the commands are told to end, and it waits until they have saved.
"""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.cli import say, unhurried
from dpo_fast.errors import printable
from dpo_fast.files import naming

POLL_SECONDS = 0.1
ENDING_SECONDS = 1800.0  # from an interruption until a command that has not ended is killed; it may be saving
KILLED_SECONDS = 10.0  # until a killed process is gone, if it ever is: one that waits for a dead disk is not
_END = 1 << 14  # bytes of a log in which its last words are looked for


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: Sequence[str]
    log: Path | None = None  # where its output is appended; None: it is this process's own


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],  # environment variables that a command gets in each slot
    *,
    started: Callable[[Job, int], None] = lambda job, slot: None,
    ended: Callable[[Job, int], None],  # with the exit status
    waiting: Callable[[Sequence[Job]], None] = lambda running: None,  # called every POLL_SECONDS
) -> None:
    """Run all jobs, in their order; each starts as soon as a slot is free.

    With several slots the processes are in sessions of their own: Ctrl-C reaches this process alone, which passes it
    on. Whatever ends this call early ends the jobs first. Raises OSError for a log or a process that cannot be made.
    """
    assert slots
    left, running = deque(jobs), {}
    try:
        while left or running:
            for slot, environment in enumerate(slots):
                if left and slot not in running:
                    job = left.popleft()
                    running[slot] = job, _start(job, environment, alone=len(slots) == 1)
                    started(job, slot)
            time.sleep(POLL_SECONDS)
            for slot, (job, process) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[slot]
                    ended(job, status)
            waiting([job for job, _ in running.values()])
    except BaseException as error:
        processes = [process for _, process in running.values()]
        # Ctrl-C in a terminal has reached a process that shares this one's session
        shared = len(slots) == 1 and isinstance(error, KeyboardInterrupt) and not str(error)
        _end(processes, tell=not shared)
        raise


def _start(job: Job, environment: Mapping[str, str], *, alone: bool) -> subprocess.Popen:
    with ExitStack() as files:
        streams: dict[str, object] = {} if alone else {"stdin": subprocess.DEVNULL}
        if job.log is not None:
            with naming(job.log):
                streams |= {"stdout": files.enter_context(job.log.open("ab")), "stderr": subprocess.STDOUT}
        return subprocess.Popen(job.command, env={**os.environ, **environment}, start_new_session=not alone, **streams)


def _end(processes: Sequence[subprocess.Popen], *, tell: bool) -> None:
    """Let processes save and end, and wait for them. tell: they do not know yet that they are to end."""
    unhurried()
    if tell:
        _tell(processes)
    limit = time.monotonic() + ENDING_SECONDS
    left = True
    while left and time.monotonic() < limit:
        try:
            time.sleep(POLL_SECONDS)
            left = any(process.poll() is None for process in processes)
        except KeyboardInterrupt:  # again: they end at once
            _tell(processes)
    for process in processes:
        if process.poll() is None:
            say(f"process {process.pid} has not ended within {ENDING_SECONDS:.0f} s and is killed")
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_SECONDS)


def _tell(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def ending(status: int) -> str:
    """How a process with this exit status ended, in words."""
    if status >= 0:
        return f"ended with {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def last_words(log: Path) -> str:
    """The last error in a log, or else its last line; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _END))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return printable((errors or lines or [""])[-1])[:300]
