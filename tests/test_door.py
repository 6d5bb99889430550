"""What all commands share: output that never ends a run, signals that end it with a line."""

import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_fast.door import SteadyStream, guarded, on_signals
from dpo_fast.errors import BadInput, Unresponsive
from tests.helpers.runs import environment

SCRIPT = """
import os, sys, time
from dpo_fast.door import guarded, say
def work():
    for number in range(300):
        print("result", "x" * 100)
        say("progress")
    os.write(int(sys.argv[1]), f"descriptors {sorted(os.stat(n) and n for n in (0, 1, 2))}".encode())
    return 0
sys.exit(guarded(work, kept="", go_on=""))
"""


def run_with(tmp_path, redirections: str) -> tuple[int, str]:
    """The exit status of the script under a shell's redirections, and what it wrote to a file at its end."""
    end = tmp_path / "end"
    handle = os.open(end, os.O_CREAT | os.O_WRONLY)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    try:
        done = subprocess.run(
            ["bash", "-c", f"exec {sys.executable} {script} {handle} {redirections}"],
            env=environment(),
            pass_fds=[handle],
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    finally:
        os.close(handle)
    return done.returncode, end.read_text()


@pytest.mark.parametrize("redirections", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "> >(true) 2> >(true)"])
def test_output_that_is_closed_or_full_ends_nothing(tmp_path, redirections):
    if "/dev/full" in redirections and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    assert run_with(tmp_path, redirections) == (0, "descriptors [0, 1, 2]")


def test_a_steady_stream_writes_what_it_can():
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    stream = SteadyStream(written)
    assert stream.write("plain ") == 6
    stream.write("caf\u00e9")
    assert written.buffer.getvalue() == b"plain caf\\xe9"
    assert stream.encoding == "ascii"
    written.close()
    assert stream.write("lost") == 4
    stream.flush()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_end_a_command_with_a_line(default_signals, capsys, name):
    def work() -> int:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(10)
        return 0

    before = signal.getsignal(getattr(signal, name))
    assert guarded(work, kept="kept", go_on="") == 130
    assert capsys.readouterr().err == f"dpo_fast: interrupted at once by {name}; kept\n"
    assert signal.getsignal(getattr(signal, name)) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals([signal.SIGHUP], lambda number, frame: pytest.fail("answered")):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BadInput("two\nlines"), 2, "dpo_fast: error: two lines\n"),
        (Unresponsive("rank 1 is gone"), 1, "dpo_fast: error: rank 1 is gone\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "dpo_fast: error: No space left on device (/x): "),
    ],
)
def test_errors_are_one_line(capsys, error, status, line):
    def work() -> int:
        raise error

    assert guarded(work, kept="", go_on="make room") == status
    text = capsys.readouterr().err
    assert text.startswith(line) and text.count("\n") == 1


STUCK = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from dpo_fast import door
from dpo_fast.errors import Unresponsive
door.LEAVING_SECONDS = 0.5
def work():
    ThreadPoolExecutor(1).submit(time.sleep, 600)
    raise Unresponsive("the disk does not answer")
door.leave(door.guarded(work, kept="", go_on=""))
"""


def test_a_thread_that_never_answers_does_not_hold_the_process(tmp_path):
    """Python waits for threads at its exit."""
    done = subprocess.run([sys.executable, "-c", STUCK], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "dpo_fast: error: the disk does not answer\n"


def test_an_error_of_one_rank_is_printed_by_it(capsys, monkeypatch):
    from dpo_fast.errors import mark_of_this_rank

    def work() -> int:
        raise error

    monkeypatch.setenv("RANK", "1")
    error = BadInput("record 3 is damaged")
    assert guarded(work, kept="", go_on="") == 2 and capsys.readouterr().err == ""  # the main rank says it
    mark_of_this_rank(error)
    assert guarded(work, kept="", go_on="") == 2
    assert capsys.readouterr().err == "dpo_fast, rank 1: error: record 3 is damaged\n"
