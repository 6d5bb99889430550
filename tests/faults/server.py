"""Commands of dpo_fast in processes that start at once, with a fault at a chosen file system call or moment.

A server imports the heavy libraries once, with the library of shim.c preloaded, and forks a process for every run: it
has no threads of its own, so that a forked process is as good as a new one. One run at a time.
"""

import ctypes
import faulthandler
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "shim.c"

# As in shim.c.
MODES = ("count", "kill", "tear", "once", "always", "short")
KINDS = (
    "READ_OPEN", "WRITE_OPEN", "WRITE", "SYNC", "RENAME", "UNLINK", "MKDIR", "TRUNCATE", "LINK", "CHMOD", "UTIME",
    "LOCK", "READ", "LIST",
)  # fmt: skip
CHANGING = ("WRITE_OPEN", "WRITE", "SYNC", "RENAME", "UNLINK", "MKDIR", "TRUNCATE", "LINK", "CHMOD", "UTIME")

# A run of a few steps takes two seconds; one that takes longer than this waits for something.
LIMIT = 120.0  # seconds


@dataclass(frozen=True)
class Call:
    """A file system call below the root: which of them it was, counted from 1."""

    number: int
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.path}"


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call of one of `kinds` below the root of the run (see shim.c)."""

    mode: str = "count"
    at: int = 0
    error: int = 0  # errno
    kinds: tuple[str, ...] = CHANGING


@dataclass(frozen=True)
class Signal:
    """A signal after that many seconds."""

    number: int
    after: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int | None  # exit status, minus the signal that ended it, or None where it had to be ended by us
    seconds: float
    out: str
    err: str
    calls: tuple[Call, ...]  # of the fault's kinds, in their order


def compiler() -> str | None:
    """The C compiler, where there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build_shim(folder: Path) -> Path:
    """Compile shim.c into `folder`; the library's path. Raises RuntimeError with what the compiler says."""
    library = folder / "shim.so"
    command = [compiler(), "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SHIM.name} does not compile: {done.stderr}")
    return library


class Server:
    """Runs commands in forked processes, from this side. Close it at the end."""

    def __init__(self, folder: Path) -> None:
        """folder: for the library and what runs print."""
        self.folder = folder.resolve()
        self.library = build_shim(self.folder)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(self.library),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            "TOKENIZERS_PARALLELISM": "false",
            "DPO_FAST_CACHE": str(self.folder / "default-cache"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", self.library],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        module: str,
        argv: Sequence[object],
        folder: Path,
        *,
        fault: Fault | None = None,
        root: Path | None = None,
        signal: Signal | None = None,
    ) -> Outcome:
        """Run `python -m dpo_fast.<module> argv` with `folder` as its current folder.

        root: whose calls count; by default `folder`.
        """
        fault = fault or Fault()
        request = {
            "module": module,
            "argv": [str(word) for word in argv],
            "folder": str(folder),
            "root": str((root or folder).resolve()),
            "arm": [MODES.index(fault.mode), fault.at, fault.error, sum(1 << KINDS.index(k) for k in fault.kinds)],
            "signal": None if signal is None else [signal.number, signal.after],
            "streams": str(self.folder),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of faults ended with {self.process.wait()}")
        status, seconds = json.loads(answer)
        out, err, log = ((self.folder / name).read_text(errors="replace") for name in ("out", "err", "calls"))
        calls = (line.split(" ", 2) for line in log.splitlines())
        return Outcome(status, seconds, out, err, tuple(Call(int(number), *rest) for number, *rest in calls))

    def close(self) -> None:
        """End the server."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


# ---- the other side ----------------------------------------------------------------------------------------------


def _serve(library: Path) -> None:
    # what commands import when they run is imported before they are forked
    import_module("diffusers")
    import_module("transformers")
    for name in ("train", "cache", "relabel", "generate", "evaluate", "scorers.shapes"):
        import_module(f"dpo_fast.{name}")
    for name in ("training.run", "training.trainer", "caching.build", "caching.score_reference"):
        import_module(f"dpo_fast.{name}")
    for name in ("relabeling.pair_scores", "relabeling.labels"):
        import_module(f"dpo_fast.{name}")
    for name in ("run_evaluation", "comparison", "generation", "implicit"):
        import_module(f"dpo_fast.evaluation.{name}")
    for name in ("StableDiffusionPipeline", "AutoencoderKL", "UNet2DConditionModel", "PNDMScheduler"):
        getattr(import_module("diffusers"), name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(import_module("transformers"), name)
    # so that a short run has many shards and parts
    import_module("dpo_fast.store.writing").SHARD_BYTES = 2048
    import_module("dpo_fast.caching.build").PART_ROWS = 3
    import_module("dpo_fast.relabeling.pair_scores").PART_ROWS = 2
    sys.path[:] = [path for path in sys.path if os.path.isabs(path)]  # a run's folder holds no modules
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"the server of faults has {threads} threads; what it forks could wait for them for ever")
    shim = ctypes.CDLL(library)
    shim.faults_arm.argtypes = [
        ctypes.c_char_p,
        *[ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_uint],
        ctypes.c_int,
    ]
    # Ignored in a server that was started in the background; as a Python handler, hooks of a fork would swallow it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        process = os.fork()
        if not process:
            _become(request, shim)
        status = _wait(process, request["signal"])
        answers.write(json.dumps([status, time.monotonic() - started]) + "\n")
        answers.flush()


def _become(request: dict, shim: ctypes.CDLL) -> None:
    """Run the command in this process and end it as Python would."""
    os.setpgid(0, 0)
    streams = Path(request["streams"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.enable(2)
    log = os.open(streams / "calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.chdir(request["folder"])
    sys.argv = [request["module"], *request["argv"]]
    status = 1
    try:
        main = import_module(f"dpo_fast.{request['module']}").main
        mode, at, error, kinds = request["arm"]
        shim.faults_arm(os.fsencode(request["root"]), mode, at, error, kinds, log)
        status = main(request["argv"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    # what an interpreter does at its end, without the server's own exit handlers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(process: int, sent: list | None) -> int | None:
    """Send the signal at its moment and wait for the end; the status as subprocess has it, or None after LIMIT, when
    the process prints where its threads are (`faulthandler`)."""
    descriptor = os.pidfd_open(process)
    try:
        if sent is not None:
            number, after = sent
            if not select.select([descriptor], [], [], after)[0]:
                signal.pidfd_send_signal(descriptor, number)
        ended = select.select([descriptor], [], [], LIMIT)[0]
        if not ended:
            signal.pidfd_send_signal(descriptor, signal.SIGABRT)
            select.select([descriptor], [], [], 5.0)
            os.killpg(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status if ended else None
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
