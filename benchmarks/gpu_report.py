"""All evidence from a GPU in one command of at most ten minutes, without a network.

    python benchmarks/gpu_report.py OUT [--minutes N] [--stages NAME ...] [--device cpu] [--write]

Builds the extension, runs the GPU tests, the kernel benchmarks, compute-sanitizer, the step times of all cases and the
rest, most valuable first (`--list` names them). Each stage may take a part of the time that is left and is then killed
with all its processes; what fails is recorded and the rest goes on. OUT/<gpu>-<date>.json has everything: GPU, driver,
versions, commit, and of each stage its commands, status, seconds, the end of its log and its results. It is written
anew before and after every stage, so the command may be cut off at any moment. OUT/gpu_report.log has all output.

`--stages` runs only those that are named, and keeps the results of others that a file of the same name holds, if GPU
and commit are the same. `--device cpu` runs the same lines on small stand-ins on a machine without a GPU. `--write`
also puts the JSON into benchmarks/results/, from which `python -m benchmarks.fill` fills the tables of README and docs.

Exit status: 0 if every stage that can run here did and succeeded, 1 if not, 128 + n after signal n.
"""

import argparse
import json
import math
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu.running import Stage, command_lines, run
from benchmarks.gpu.stages import stages
from dpo_fast.env import PACKAGES
from dpo_fast.files import write_json
from dpo_fast.version import version_of

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 5.0  # a stage with less time is not started: PyTorch barely loads in that time
LOG_LINES = 60  # kept in the JSON for each stage
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


class Stopped(Exception):
    """A signal asked this command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi reports about the first GPU; for --device cpu, the processor."""

    name: str
    driver: str | None = None
    memory: str | None = None
    clock: str | None = None  # the SMs' highest
    architecture: str | None = None  # compute capability, such as 90


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small stand-ins")
    parser.add_argument("--commit", help="of this tree, where it has no .git")
    parser.add_argument("--write", action="store_true", help="also write the JSON into benchmarks/results/")
    parser.add_argument("--list", action="store_true", help="print the names of the stages and exit")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes ({arguments.minutes:g}) must be above 0")
    if arguments.write and arguments.device == "cpu":
        parser.error("--write is for the report of a GPU: leave out --device cpu")
    if arguments.out is None and not arguments.list:
        parser.error("name the folder OUT of the report")
    gpu = first_gpu() if arguments.device == "cuda" else Gpu(f"cpu {platform.machine()}")
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as work:
        every = stages(arguments.device, Path(work), gpu.architecture)
        names = [stage.name for stage in every]
        if arguments.list:
            print("\n".join(names))
            return 0
        for name in arguments.stages or ():
            if name not in names:
                parser.error(f"--stages {name!r} is not one of: {', '.join(names)}")
        chosen = [stage for stage in every if stage.name in (arguments.stages or names)]
        report = Report(arguments.out.resolve(), gpu, arguments.device, arguments.commit, arguments.write)
        return report.make(chosen, Path(work), 60 * arguments.minutes)


class Report:
    """The JSON file of a report, with everything known so far."""

    def __init__(self, out: Path, gpu: Gpu, device: str, commit: str | None = None, write: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        now = datetime.now(timezone.utc)
        name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        file = f"{name}-{now:%Y-%m-%d}.json"
        self.files = [out / file] + ([ROOT / "benchmarks" / "results" / file] if write else [])
        self.log = out / "gpu_report.log"
        self.value: dict[str, object] = {
            "device": device,
            "gpu": gpu.name,
            "driver": gpu.driver,
            "memory": gpu.memory,
            "highest_sm_clock": gpu.clock,
            "started": f"{now:%Y-%m-%d %H:%M:%S} UTC",
            "finished": False,
            **commit_of(commit),
            "command": shlex.join(["python", "benchmarks/gpu_report.py", *map(_shown, sys.argv[1:])]),
            "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        }
        self.records: dict[str, dict] = {}  # the stages of this run
        self.earlier = self._earlier()  # stages that ran earlier on this GPU at this commit

    def make(self, chosen: list[Stage], work: Path, seconds: float) -> int:
        """Run the stages within `seconds`; return the exit status."""
        began = time.monotonic()
        self.value["limit_seconds"] = seconds
        self.log.write_text("", encoding="utf-8")
        records = self.records
        for stage in chosen:
            commands = [
                shlex.join(map(_shown, line)) for line in command_lines(stage, Path(f"{_file_name(stage)}.json"))
            ]
            records[stage.name] = {"status": "not reached", "commands": commands}
        self.write()
        handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        stopped = 0
        try:
            for stage in chosen:
                left = seconds - (time.monotonic() - began)
                if left * stage.share >= LEAST_SECONDS or stage.missing:
                    self.run(stage, work, left * stage.share)
        except Stopped as error:
            stopped = 128 + error.number
            print(f"gpu_report: stopped by {error}", flush=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for name, record in records.items():
            if record["status"] == "not reached":
                print(f"{name:28}not reached", flush=True)
        self.value["finished"] = not stopped
        self.value["seconds"] = time.monotonic() - began
        self.write()
        bad = [name for name, record in records.items() if record["status"] not in ("ok", "missing")]
        states = [record["status"] for record in records.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        print(f"{counts}: {self.files[0]}", flush=True)
        return stopped or (1 if bad else 0)

    def run(self, stage: Stage, work: Path, limit: float) -> None:
        """Run one stage and record it."""
        record = self.records[stage.name]
        if stage.missing:
            record |= {"status": "missing", "why": stage.missing}
            print(f"{stage.name:28}missing: {stage.missing}", flush=True)
            self.write()
            return
        record |= {"status": "running", "limit_seconds": limit}
        self.write()
        file = work / f"{_file_name(stage)}.json"
        before = self.log.stat().st_size
        started = time.monotonic()
        try:
            outcome = run(_with_environment(stage), file, self.log, limit, ROOT)
            record |= {"status": outcome.status, "exit_status": outcome.exit_status, "seconds": outcome.seconds}
        except Stopped:
            record |= {"status": "interrupted", "seconds": time.monotonic() - started}
            raise
        finally:
            log = self.log.read_bytes()[before:].decode("utf-8", "replace")
            lines = [line.rsplit("\r", 1)[-1] for line in log.rstrip("\n").split("\n")]  # a progress bar's last state
            record["log"] = [_shown(line) for line in lines[-LOG_LINES:]]
            try:
                record["results"] = stage.read(file, log)
            except (ValueError, KeyError, OSError) as error:  # cut off while it was written
                record |= {"results": None, "unreadable": str(error)}
            self.write()
            print(f"{stage.name:28}{record['status']:12}{record['seconds']:8.1f} s of {limit:.0f}", flush=True)

    def write(self) -> None:
        """Write all that is known, atomically."""
        new = {name: record for name, record in self.records.items() if record["status"] != "not reached"}
        for file in self.files:
            write_json(file, _plain(self.value | {"stages": self.records | self.earlier | new}))

    def _earlier(self) -> dict[str, dict]:
        """Return the stages in a file that this report will replace, if GPU, commit and device are the same."""
        for file in self.files:
            try:
                value = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            same = all(value.get(name) == self.value[name] for name in ("gpu", "commit", "device"))
            if same and self.value["commit"]:
                return {name: record for name, record in value["stages"].items() if record["status"] != "not reached"}
        return {}


def first_gpu() -> Gpu:
    """Return the GPU that the stages run on; only the name "unknown gpu" if nvidia-smi cannot tell."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        name, driver, memory, clock, capability = (part.strip() for part in output.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return Gpu("unknown gpu")
    return Gpu(name, driver, memory, clock, capability.replace(".", ""))


def commit_of(given: str | None) -> dict[str, object]:
    """Return the commit of this tree, and whether any tracked file is changed."""

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": given or git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def _file_name(stage: Stage) -> str:
    return stage.name.replace(" ", "-")


def _with_environment(stage: Stage) -> Stage:
    return replace(stage, environment=ENVIRONMENT | stage.environment)


def _shown(word: str) -> str:
    """Return a word of a command or log without the paths of this machine."""
    word = word.replace(sys.executable, "python").replace(str(ROOT), ".")
    return word.replace(tempfile.gettempdir(), "TMP")


def _plain(value: object) -> object:
    """Return `value` as it goes into the file: without this machine's paths, and None for non-finite numbers."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str):
        return _shown(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
