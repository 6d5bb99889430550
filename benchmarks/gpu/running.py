"""Running a stage: its commands one after the other in a process group of their own, killed when the time is up.

Linux only: what a stage leaves running is looked for in /proc.
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

_MARK = "DPO_FAST_REPORT_STAGE"  # in the environment of all processes of a stage, those that left its group included
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One part of the report. Commands may have `{file}`, the JSON file that they write."""

    name: str
    commands: tuple[tuple[str, ...], ...]  # one after the other, up to the first that fails
    share: float  # of the time that is left: the most it may take
    read: Callable[[Path, str], object]  # results from its JSON file, which may be absent or partial, and its log
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  # why it cannot run on this machine


@dataclass(frozen=True)
class Outcome:
    """How the commands of a stage ended."""

    status: str  # ok, failed or timed out
    exit_status: int | None  # of the last command; None where it was killed
    seconds: float


def command_lines(stage: Stage, file: Path) -> list[list[str]]:
    """The commands of a stage with the place of its JSON file."""
    return [[word.replace("{file}", str(file)) for word in command] for command in stage.commands]


def run(stage: Stage, file: Path, log: Path, seconds: float, folder: Path) -> Outcome:
    """Run the commands of a stage in `folder` for at most `seconds`; their output is appended to `log`.

    Nothing of the stage runs when this returns or raises.
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
    """Kill what is left of the process, its group and whatever else has the mark, and wait until it is gone."""
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
    """Ids of the living processes whose environment has the mark."""
    wanted, pids = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended, or is another user's; of a zombie the environment is empty
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids
