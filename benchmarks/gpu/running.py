"""Run a stage: its commands one after the other, each in its own process group, killed when time is up.

Linux only: processes that a stage leaves running are found through /proc.
"""

import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "DPO_FAST_REPORT_STAGE"  # set in the environment of all processes of a stage, even those outside its group
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One part of the report. In its commands, `{file}` stands for the JSON file that they write."""

    name: str
    commands: tuple[tuple[str, ...], ...]  # one after the other, up to the first that fails
    share: float  # the largest fraction of the remaining time it may take
    read: Callable[[Path, str], object]  # its results, from its JSON file (maybe absent or partial) and log
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  # why it cannot run on this machine


@dataclass(frozen=True)
class Outcome:
    """How the commands of a stage ended."""

    status: str  # ok, failed or timed out
    exit_status: int | None  # of the last command; None where it was killed
    seconds: float


def command_lines(stage: Stage, file: Path) -> list[list[str]]:
    """Return the commands of a stage with the path of its JSON file filled in."""
    return [[word.replace("{file}", str(file)) for word in command] for command in stage.commands]


def run(stage: Stage, file: Path, log: Path, seconds: float, folder: Path) -> Outcome:
    """Run the commands of a stage in `folder` for at most `seconds`; their output is appended to `log`.

    No process of the stage is left running when this returns or raises.
    """
    started = time.monotonic()
    mark = uuid.uuid4().hex
    environment = {**os.environ, **stage.environment, _MARK: mark}
    for command in command_lines(stage, file):
        with log.open("a", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"{error}\n")
                return Outcome("failed", None, time.monotonic() - started)
        try:
            status = process.wait(max(0.0, seconds - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            return Outcome("timed out", None, time.monotonic() - started)
        finally:
            _end(process, mark)
        if status:
            return Outcome("failed", status, time.monotonic() - started)
    return Outcome("ok", 0, time.monotonic() - started)


def _end(process: subprocess.Popen, mark: str) -> None:
    """Kill the process, its group and every other process with the mark; wait up to 5 s until they are gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while (alive := _marked(mark)) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))


def _marked(mark: str) -> list[int]:
    """Return the ids of the live processes whose environment has the mark."""
    wanted, pids = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended or is another user's; a zombie's environment is empty
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids
