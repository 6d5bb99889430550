"""What all commands share: output that never ends a run, signals that end it with a line."""

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import time
import unicodedata

import pytest
from tqdm import tqdm

from dpo_fast import cli
from dpo_fast.cli import SteadyStream, guarded, on_signals, say, show_log
from dpo_fast.errors import BadInput, Unresponsive, printable
from tests.helpers.runs import environment

SCRIPT = """
import os, sys, time
from dpo_fast.cli import guarded, say
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


@pytest.mark.parametrize(("name", "by"), [("SIGTERM", " by SIGTERM"), ("SIGINT", "")])
@pytest.mark.parametrize("then", [ValueError("the file cannot be loaded"), BadInput("convert it"), OSError(5, "I/O")])
def test_an_interruption_that_a_library_makes_an_error_of_its_own_is_still_one(capsys, name, by, then):
    """safetensors does: its error says that the file cannot be loaded."""

    def work() -> int:
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(10)
        except BaseException:
            raise then from None
        return 0

    assert guarded(work, kept="kept", go_on="") == 130
    assert capsys.readouterr().err == f"dpo_fast: interrupted at once{by}; kept\n"


def test_an_interruption_in_a_finalizer_is_not_lost(capsys):
    class Ending:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    def work() -> int:
        Ending()
        time.sleep(10)
        return 0

    before = sys.unraisablehook
    assert guarded(work, kept="kept", go_on="") == 130
    assert capsys.readouterr().err == "dpo_fast: interrupted at once by SIGTERM; kept\n"
    assert sys.unraisablehook is before


def ended(script: str) -> subprocess.CompletedProcess:
    """What came of a script in a process of its own."""
    return subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60)


def test_an_interruption_that_ends_nothing_ends_the_process():
    script = """
import signal, threading
from dpo_fast import cli
cli.ENDING_SECONDS = 0.5
def work():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        threading.Event().wait()
cli.leave(cli.guarded(work, kept="", go_on=""))
"""
    done = ended(script)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in work" in done.stderr


def test_what_waits_rightly_may_take_its_time():
    script = """
import signal, time
from dpo_fast import cli
cli.ENDING_SECONDS = 0.3
def work():
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        cli.unhurried()
        time.sleep(1.0)
        raise
cli.leave(cli.guarded(work, kept="kept", go_on=""))
"""
    done = ended(script)
    assert (done.returncode, done.stderr) == (130, "dpo_fast: interrupted at once by SIGTERM; kept\n")


def test_a_signal_is_answered_from_the_first_call(monkeypatch, capsys):
    def has_home() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return True

    monkeypatch.setattr(cli, "has_home", has_home)
    assert guarded(lambda: 0, kept="kept", go_on="") == 130
    assert capsys.readouterr().err == "dpo_fast: interrupted at once by SIGTERM; kept\n"


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
from dpo_fast import cli
from dpo_fast.errors import Unresponsive
cli.LEAVING_SECONDS = 0.5
def work():
    ThreadPoolExecutor(1).submit(time.sleep, 600)
    raise Unresponsive("the disk does not answer")
cli.leave(cli.guarded(work, kept="", go_on=""))
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


# What a name may carry: window titles, clipboards (OSC 52), cursor moves, C1 forms of them, a carriage return that
# writes over the line, overrides of direction, separators of lines, halves of surrogate pairs.
HOSTILE = [
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJm\x1b\\",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x1b\x1b[0m[2J",
    "a\rb",
    "a\x08b",
    "\x0e",
    "\u202eexe.",
    "\u2066a\u2069",
    "\u200fa",
    "a\u2028b",
    "\ufeff",
    "\x7f",
    "\ud83d",
    "\0",
]
LEGITIMATE = (
    "\u4e2d\u6587, caf\u00e9, cafe\u0301, \u05e9\u05dc\u05d5\u05dd, \U0001f468\u200d\U0001f469\u200d\U0001f467,"
    " \u2764\ufe0f, \u0645\u06cc\u200c\u062e"
)


def obeyed(text: str) -> list[str]:
    """What a terminal would obey in a text, lines and tabs aside."""
    bidirectional = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return [
        c for c in text
        if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
        or unicodedata.bidirectional(c) in bidirectional
        or c in "\u200e\u200f\ufeff"
    ]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_that_a_terminal_obeys_is_printed(text, capsys):
    assert obeyed(text)

    def work() -> int:
        print("column", text, "x")
        sys.stdout.writelines([f"column {text} x"])
        say(f"column {text} x")
        with tqdm(total=1, desc=f"scoring {text} x", file=sys.stderr) as bar:
            bar.set_postfix_str(f"{text} x")
        raise BadInput(f"column {text} x")

    assert guarded(work, kept="", go_on="") == 2
    out, err = capsys.readouterr()
    bars = [line for part in err.split("\n") for line in part.split("\r")]  # a bar writes over itself
    assert not obeyed(out) and not any(map(obeyed, bars)) and out and err


def test_every_character_of_unicode_is_shown_or_escaped():
    shown = printable("".join(map(chr, range(sys.maxunicode + 1))))
    assert not obeyed(shown) and "\n" not in shown and "\t" not in shown
    assert shown.encode()


def test_names_of_all_scripts_stay_as_they_are(capsys):
    assert printable(LEGITIMATE) == LEGITIMATE
    assert guarded(lambda: print(LEGITIMATE) or 0, kept="", go_on="") == 0
    assert capsys.readouterr().out == LEGITIMATE + "\n"


def test_colours_are_dropped_and_bars_stay_beside_each_other():
    written = io.StringIO()
    stream = SteadyStream(written)
    stream.write("\x1b[1mbold\x1b[0m")
    assert written.getvalue() == "bold"
    with tqdm(total=2, file=stream, position=1, mininterval=0, ascii=True):
        pass
    assert "\x1b[A" in written.getvalue() and "\r" in written.getvalue() and "\\x1b" not in written.getvalue()


def test_a_line_break_in_a_name_begins_no_line_of_ours(capsys):
    logger = logging.getLogger("dpo_fast")
    before, logger.handlers, level = logger.handlers, [], logger.level
    try:

        def work() -> int:
            show_log()
            logger.warning("%s is damaged", "a.png\ndpo_fast: error: \x1b[2Jdisk full")
            say("note a\ndpo_fast: error: b")
            return 0

        assert guarded(work, kept="", go_on="") == 0
    finally:
        logger.handlers = before
        logger.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "dpo_fast: a.png\\ndpo_fast: error: \\x1b[2Jdisk full is damaged", "dpo_fast: note a\\ndpo_fast: error: b"
    ]  # fmt: skip


def test_a_traceback_is_printed_without_what_its_message_carries():
    script = r"""
from dpo_fast.cli import guarded, leave
def work():
    raise RuntimeError("row \x1b]0;title\x07 \u202e is odd")
leave(guarded(work, kept="", go_on=""))
"""
    done = ended(script)
    assert done.returncode == 1 and not obeyed(done.stderr)
    assert "Traceback" in done.stderr and r"RuntimeError: row \x1b]0;title\x07 \u202e is odd" in done.stderr
