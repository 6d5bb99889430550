"""One case: a reader's files, changed, are read, and what happens is judged.

A case holds if the reader returns or raises BadInput, BadImage, a disk's error, or an error that it documents; if it
opens nothing outside its folder; if it ends in time; and if it takes no more memory than the reader may.
"""

import base64
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import constants

import dpo_fast
from dpo_fast.checksums import digest
from dpo_fast.data.images import BadImage
from dpo_fast.errors import BadInput, Unresponsive, disk_error
from tests.fuzz.mutations import Changes, Special, changes
from tests.fuzz.readers import READERS, met

MEMORY = next((place for place in ("/dev/shm",) if os.access(place, os.W_OK)), None)  # many small files
CORPUS = Path(__file__).with_name("corpus")
CPU_SECONDS, SECONDS = 5, 120  # a case may take; the second counts waiting, on a machine with other work
ADDRESS_SPACE = 4 << 30  # bytes that a process may map beyond what it has
_NAMED = (BadInput, BadImage, Unresponsive)
_ROOT = str(Path(dpo_fast.__file__).parents[1])


class Hang(BaseException):
    """A case did not end in time."""


@dataclass
class Outcome:
    """What came of a case."""

    kind: str  # "read", or the name of the first error
    wrong: str | None  # what did not hold
    seconds: float  # of CPU
    peak_mib: float  # memory beyond what the process held before


class Runner:
    """Runs cases of one reader in this process, in a folder of its own. Close it."""

    def __init__(self, name: str) -> None:
        self.name, self.reader = name, READERS[name]
        self.place = Path(tempfile.mkdtemp(prefix="dpo_fast-fuzz-", dir=MEMORY))
        self.folder, self.outside = self.place / "inside", self.place / "outside"
        self.folder.mkdir()
        self.reader.write(self.folder)
        self.files = {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".lock")
        }
        self._fill_outside()
        self._datasets, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, self.place / "datasets"
        datasets.disable_progress_bars()
        self._watch = _Watch([path for path in (self.outside, *self.outside.rglob("*")) if path.is_dir()])

    def close(self) -> None:
        self._watch.close()
        datasets.config.HF_DATASETS_CACHE = self._datasets
        shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def strategy(self):
        """Changes to this reader's files."""
        return changes(self.files, tuple(self.files.values()), str(self.outside))

    def run(self, changed: Changes) -> Outcome:
        """Write the files, changed as they say, read them, and judge."""
        self._write(changed)
        links = [name for name, change in changed.items() if isinstance(change, Special) and change.kind == "link"]
        self._watch.clear()
        with _opened() as opened, _peak() as peak:
            kind, wrong, seconds = self._read(changed)
        if wrong is None and not any(not name.startswith(self.reader.confined) for name in links):
            touched = self._watch.clear() + [path for path in opened if not self._may_open(path)]
            if touched:
                wrong = f"opened outside the folder: {', '.join(sorted(set(touched)))[:300]}"
        if wrong is None and peak[0] > self.reader.peak_mib:
            wrong = f"took {peak[0]:.0f} MiB, more than {self.reader.peak_mib}"
        return Outcome(kind, wrong, seconds, peak[0])

    def _read(self, changed: Changes) -> tuple[str, str | None, float]:
        started = time.process_time()
        met.clear()
        try:
            with _deadline():
                self.reader.read(self.folder, list(changed))
            kind, wrong = met[0] if met else "read", None
        except Hang:
            kind, wrong = "Hang", "did not end in time: " + _where(sys.exc_info()[1])
        except (*_NAMED, *self.reader.named) as error:
            kind, wrong = type(error).__name__, None
        except Exception as error:
            kind = type(error).__name__
            wrong = (
                None
                if disk_error(error) is not None
                else f"{kind}: {' '.join(str(error).split())[:200]}; {_where(error)}"
            )
        return kind, wrong, time.process_time() - started

    def _write(self, changed: Changes) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.place / "datasets", ignore_errors=True)
        for name, content in (self.files | changed).items():
            path = self.folder / name
            if content == Special("missing"):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "folder":
                path.mkdir()
            elif content.kind == "fifo":
                os.mkfifo(path)
            elif content.kind == "link":
                path.symlink_to(content.target)

    def _fill_outside(self) -> None:
        """Files of the same names beside the folder, so that a way out leads somewhere."""
        for name, content in self.files.items():
            for path in (self.outside / name, self.outside / Path(name).name):
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.is_dir():
                    path.write_bytes(content)

    def _may_open(self, path: str) -> bool:
        allowed = (
            self.folder,
            constants.HF_HUB_CACHE,
            self.place / "datasets",
            sys.prefix,
            sys.base_prefix,
            _ROOT,
            "/proc",
            "/dev/null",
            "/usr",
        )
        return any(path == str(one) or path.startswith(f"{one}/") for one in allowed) or not path.startswith("/")


def _where(error: BaseException) -> str:
    """The last line of dpo_fast that an error passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dpo_fast/" in frame.filename]
    if not frames:
        return "outside dpo_fast"
    return f"{frames[-1].filename.rpartition('/dpo_fast/')[2]}:{frames[-1].lineno} {frames[-1].name}"


@contextmanager
def _deadline() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise Hang

    before = [(number, signal.signal(number, end)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before:
            signal.signal(number, handler)


# ---- what is opened ----------------------------------------------------------------------------------------------

_record: list[str] | None = None
_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    if event == "open" and _record is not None and isinstance(arguments[0], (str, bytes)):
        _record.append(os.path.abspath(os.fsdecode(arguments[0])))


@contextmanager
def _opened() -> Iterator[list[str]]:
    """The paths that Python opens in the block; libraries in other languages are seen by `_Watch`."""
    global _record, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for good: it cannot be taken away
        _hooked = True
    _record = found = []
    try:
        yield found
    finally:
        _record = None


class _Watch:
    """Linux's inotify on folders: which files in them any library opens."""

    _OPENED = 0x20

    def __init__(self, folders: list[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot be had")
        for folder in folders:
            if self._libc.inotify_add_watch(self._handle, os.fsencode(folder), self._OPENED) < 0:
                raise OSError(ctypes.get_errno(), "inotify cannot be had", str(folder))

    def clear(self) -> list[str]:
        """The names opened since the last call."""
        found, data = [], b""
        with suppress(BlockingIOError):
            while True:
                data += os.read(self._handle, 65536)
        while data:
            size = int.from_bytes(data[12:16], sys.byteorder)
            found.append(data[16 : 16 + size].rstrip(b"\0").decode(errors="replace") or "the folder")
            data = data[16 + size :]
        return found

    def close(self) -> None:
        os.close(self._handle)


# ---- memory ------------------------------------------------------------------------------------------------------


def limit_memory() -> None:
    """Let this process map ADDRESS_SPACE bytes more than it has."""
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))


def _status(name: str) -> int:
    """A number of bytes in /proc/self/status."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


@contextmanager
def _peak() -> Iterator[list[float]]:
    """MiB that the process held at most in the block beyond what it held before."""
    found = [0.0]
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    try:
        yield found
    finally:
        found[0] = max(0, _status("VmHWM") - before) / 2**20


# ---- the corpus --------------------------------------------------------------------------------------------------


def to_json(name: str, changed: Changes, wrong: str) -> str:
    """A case as text."""

    def value(change: bytes | Special) -> object:
        if isinstance(change, Special):
            return list(change)
        return base64.b64encode(zlib.compress(change, 9)).decode()

    files = {file: value(change) for file, change in changed.items()}
    return json.dumps({"reader": name, "was": wrong, "files": files}, indent=1) + "\n"


def from_json(text: str) -> tuple[str, Changes]:
    """The reader and the changes of a case of `to_json`."""
    case = json.loads(text)
    files: Mapping[str, object] = case["files"]
    return case["reader"], {
        file: Special(*change) if isinstance(change, list) else zlib.decompress(base64.b64decode(change))
        for file, change in files.items()
    }


def save(folder: Path, name: str, changed: Changes, wrong: str) -> Path:
    """Write a case to `folder`, under a name that follows from it."""
    text = to_json(name, changed, wrong)
    file = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{digest(text.encode())}.json"
    file.write_text(text, encoding="utf-8")
    return file
