"""What all commands share: errors as one line and an exit status, signals, and output that never ends a run.

Everything that a command prints goes through `SteadyStream`, which escapes whatever a terminal would obey: names in
data and files, and the messages of exceptions, are untrusted.

Exit status: 0 done, 2 input that cannot be used (one line on stderr), 130 interrupted, 1 an internal error (with a
traceback), or something that never answers (one line).
"""

import _thread
import dataclasses
import difflib
import faulthandler
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from types import TracebackType
from typing import IO, NoReturn

from dpo_fast.errors import BadInput, Unresponsive, disk_error, printable, remedy
from dpo_fast.files import NO_HOME, has_home
from dpo_fast.version import version_line


def guarded(work: Callable[[], int], *, argv: Sequence[str] = (), kept: str, go_on: str) -> int:
    """Run `work` and return its exit status, or print what it raised in one line and return the status for that.

    argv: the command line; with `--version` in it, the version is printed instead. kept: what an interruption leaves.
    go_on: what to do once the disk can be written again.
    SIGTERM, SIGHUP and SIGUSR1 end `work` as Ctrl-C does, even if a library turns them into an error of its own. Output
    to a closed or full stream is dropped. Internal errors are raised again.
    """
    if sys.excepthook is sys.__excepthook__:  # Python calls it after the original streams are restored
        sys.excepthook = _print_traceback
    with steady_output():
        return _guarded(_show_version if "--version" in argv else work, kept, go_on)


def _show_version() -> int:
    print(version_line())
    return 0


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    SteadyStream(sys.stderr).write("".join(traceback.format_exception(kind, error, where)))


def _guarded(work: Callable[[], int], kept: str, go_on: str) -> int:
    try:
        with _interruptible():
            return work() if has_home() else refuse(NO_HOME)  # without one, libraries would create a folder named ~
    except BadInput as error:
        return refuse(str(error), any_rank=hasattr(error, "of_this_rank"))
    except UnicodeEncodeError as error:
        encoding, text = sys.getfilesystemencoding(), error.object[max(0, error.start - 40) : error.end + 40]
        if encoding in ("utf-8", "utf8"):
            raise
        return refuse(
            f"the name {text!a} cannot be written in this locale, whose encoding is {encoding}: set PYTHONUTF8=1, or"
            " LC_ALL=C.UTF-8"
        )
    except Unresponsive as error:
        refuse(str(error), any_rank=True)
        _unresponsive.set()
        return 1
    except KeyboardInterrupt as error:
        say(f"interrupted at once{f' by {error}' if str(error) else ''}; {kept}")
        _unresponsive.set()  # a thread may wait for what the interruption left undone
        return 130
    except Exception as error:
        if (disk := disk_error(error)) is None:
            raise
        where = f" ({' -> '.join(str(name) for name in (disk.filename, disk.filename2) if name)})"
        reason = disk.strerror + where * bool(disk.filename)
        line = f"{reason}: nothing half-written is left; {remedy(disk)}, then {go_on}"
        return refuse(line, any_rank=hasattr(error, "of_this_rank"))


_unresponsive = threading.Event()  # a thread or a worker of this process may never answer
LEAVING_SECONDS = 5.0
ENDING_SECONDS = 60.0  # from a signal, once Python answers it, until a process that has not ended is ended
AGAIN_SECONDS = 0.01  # until a signal is sent again


def leave(status: int) -> NoReturn:
    """End the process with `status`, without waiting forever for a thread or worker that never answers."""
    if _unresponsive.is_set():
        for worker in multiprocessing.active_children():
            worker.kill()
        end = threading.Timer(LEAVING_SECONDS, os._exit, [status])  # Python itself waits for threads at exit
        end.daemon = True
        end.start()
    sys.exit(status)


_ENDING = tuple(  # signals that end a command; not every system has SIGHUP and SIGUSR1
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block a signal of _ENDING raises KeyboardInterrupt, with the signal's name unless it is Ctrl-C's.

    Some libraries turn that into an error of their own (safetensors: the file cannot be loaded). An error that comes
    after the signal is raised as the KeyboardInterrupt that it was. Python itself drops one that is raised in a
    finalizer; then the signal is sent again. If it is raised while a lock is being acquired, the lock may stay held
    for ever: ENDING_SECONDS after Python has handled a signal the process prints where its threads are and ends, which
    is as safe as a kill. `unhurried` cancels that limit.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    came: list[KeyboardInterrupt] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(KeyboardInterrupt("" if number == signal.SIGINT else signal.Signals(number).name))
        came[-1].number = number
        if len(came) == 1:
            with suppress(RuntimeError):  # no thread can be started
                faulthandler.dump_traceback_later(ENDING_SECONDS, exit=True, file=2)
        raise came[-1]

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_value in came:
            came.remove(unraisable.exc_value)
            unhurried()
            # by a thread, or it would be raised in this hook; threading's own need locks that may be taken here
            _thread.start_new_thread(_send_again, (unraisable.exc_value.number,))
        else:
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        with on_signals(_ENDING, interrupt):
            yield
    except Exception as error:
        if came:
            raise came[0] from error
        raise
    finally:
        unhurried()
        sys.unraisablehook = hook


def unhurried() -> None:
    """Cancel the time limit of an interruption, for work that must wait until something else has saved and ended."""
    faulthandler.cancel_dump_traceback_later()


def _send_again(number: int) -> None:
    time.sleep(AGAIN_SECONDS)
    if os.name == "posix":
        os.kill(os.getpid(), number)
    else:  # there os.kill would end the process
        signal.raise_signal(number)


@contextmanager
def on_signals(numbers: Iterable[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within the block `handler` handles these signals, except those that the process was started to ignore (nohup).

    Only the main thread can set handlers; in other threads (a notebook's worker, for example) nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    answered = [number for number, old in before.items() if old is not signal.SIG_IGN]
    unhurried()  # a signal that was lost before must not end what handles them here
    try:
        for number in answered:
            signal.signal(number, handler)
        yield
    finally:
        with _blocked(answered):  # or one that comes now would leave the others unrestored
            for number in answered:
                signal.signal(number, before[number] or signal.SIG_DFL)  # None: it was not set from Python


@contextmanager
def _blocked(numbers: Iterable[int]) -> Iterator[None]:
    """Within the block signals wait, where the system can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def acknowledge(message: str) -> None:
    """Write a line to stderr from a signal handler, where `print` is unsafe: it may be in the middle of a line."""
    with suppress(OSError):
        os.write(2, f"\ndpo_fast: {printable(message)}\n".encode())


class SteadyStream:
    """A text stream that drops what it cannot write: a closed terminal or a full log disk must not end a run.

    Whatever a terminal would obey is escaped (`printable`), except what text and progress bars need: line breaks, tabs,
    carriage returns at the beginning or end of a write, and a write that only moves the cursor up.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        shown = _shown(text)
        try:
            self._stream.write(shown)
        except UnicodeEncodeError:  # a terminal or log in ASCII
            self._stream.write(shown.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):  # ValueError: closed
            pass
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


_UP = "\x1b[A"  # moves the cursor up a line, as tqdm writes it


def _shown(text: str) -> str:
    if text and text == _UP * (len(text) // len(_UP)):
        return text
    inner = text.strip("\r")
    begin = len(text) - len(text.lstrip("\r"))
    return text[:begin] + printable(inner.replace("\r\n", "\n"), keep="\n\t") + text[begin + len(inner) :]


@contextmanager
def steady_output() -> Iterator[None]:
    """Within the block stdout and stderr are `SteadyStream`s; missing ones are replaced by the null device."""
    for number in (0, 1, 2):  # if closed, the next file opened gets its number, and a library's messages
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdout, sys.stderr
    streams = [SteadyStream(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _give_up_if_broken(stream)


def _give_up_if_broken(stream: IO[str] | None) -> None:
    """Redirect a broken stream to the null device; otherwise Python fails at exit, when it flushes the stream."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as null:
            os.dup2(null.fileno(), stream.fileno())
            stream.flush()


def refuse(message: str, any_rank: bool = False) -> int:
    """Print in one line what cannot be used; return the exit status for that, 2."""
    say("error: " + " ".join(message.split()), any_rank)
    return 2


def say(message: str, any_rank: bool = False) -> None:
    """Print a line to stderr, on the main rank only unless `any_rank`."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or any_rank:
        where = "dpo_fast" if rank == "0" else f"dpo_fast, rank {rank}"
        print(f"{where}: {printable(message)}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a command's result to stdout, on the main rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


class _OneLine(logging.Formatter):
    """Formats a record on one line: a name with a line break in it must not look like another message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def show_log() -> None:
    """Show the package's log (which kernels run, for example) on the main rank."""
    logger = logging.getLogger("dpo_fast")
    if os.environ.get("RANK", "0") == "0" and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine("dpo_fast: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


@contextmanager
def one_line_errors(flags: type) -> Iterator[None]:
    """Turn tyro's boxed error and exit into a one-line BadInput; `--help` prints and exits as usual.

    flags: the dataclass that is parsed, whose field names are suggested for an unknown flag.
    """
    captured = io.StringIO()
    try:
        with redirect_stderr(captured):
            yield
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise BadInput(_one_line(captured.getvalue(), flags)) from None


def _one_line(box: str, flags: type) -> str:
    """Return the message of tyro's error box without its frame; for an unknown flag, with the nearest known one."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    framed = any(line.startswith("╭") for line in lines)
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    if not framed:  # a terminal without such characters: a title, a rule and then the message
        lines = lines[_rule(lines) + 1 :] or lines
    rule = _rule(lines)
    message = " ".join(lines[:rule])
    unknown = re.match(r"Unrecognized options: --([\w-]+)", message)
    return message + (did_you_mean(unknown[1], flags) if unknown else "") + "; --help lists every flag"


def _rule(lines: list[str]) -> int:
    """The place of the first line that is a rule, or after the last line."""
    return next((i for i, line in enumerate(lines) if set(line) <= {"─", "-"}), len(lines))


def did_you_mean(name: str, flags: type) -> str:
    """Suggest the flags nearest to an unknown one: those that contain it, or the one with the closest spelling."""
    name, names = name.replace("-", "_"), [field.name for field in dataclasses.fields(flags)]
    containing = sorted((known for known in names if name in known), key=len)
    near = containing[:2] or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {' or '.join(f'--{known}' for known in near)}?)" if near else ""
