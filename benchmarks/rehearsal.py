"""A full-size rehearsal: a model of public size with random weights goes through everything that a LoRA run does.

    python benchmarks/rehearsal.py --model sd15|sdxl|tiny [--resolution N] [--folder DIR] [--json FILE] [-- FLAGS]

Each phase is a process of its own: make the pipeline and two pairs, `--dry-run`, `dpo_fast.cache build`, one optimizer
step of `dpo_fast.train` (bf16, LoRA, from the cache) with a checkpoint and the export, the same command resumed to a
second step, the trained policy's prediction by our own code, and the same by diffusers, which loads the base model and
the exported LoRA. For each phase: seconds, peak resident memory (mapped files included, which the kernel may drop) and
peak anonymous memory (which it may not), both from samples every 50 ms. The training's memory is compared with what
`--dry-run` predicts. FLAGS go to every phase that takes flags of the training.

Exit status 1 where a phase fails or a check does not hold. Linux only: memory is read from /proc.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GIB = 2**30
SAMPLE_SECONDS = 0.05
MODELS = {  # case of the step benchmark, resolution in pixels, GiB of disk needed for weights in bf16
    "sd15": ("sd15-512-lora", 512, 3.0),
    "sdxl": ("sdxl-1024-lora", 512, 8.0),
    "tiny": ("mini-sdxl-1024-lora", 64, 0.5),
}
RANK = 8
SEED = 0
SETTLED = "dpo_fast: output:"  # the last line that training prints before its first step
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
# allowed rounding: the difference between two programs with the same base weights is one sample of it
DIFFERENCE_FACTOR, SMALLEST_DIFFERENCE = 2.0, 2.0**-8


class Sample(NamedTuple):
    """Memory of a process at one moment, in GiB."""

    at: float  # time.perf_counter()
    peak_resident: float  # since the process began
    anonymous: float


@dataclass
class Phase:
    """The measurements of one process; memory in GiB."""

    name: str
    command: str
    seconds: float = 0.0
    status: int = 0
    peak_resident: float = 0.0  # the kernel's own peak, VmHWM, at the last sample
    peak_anonymous: float = 0.0  # sampled, as are the rest
    loading_resident: float | None = None  # training only: the peaks before the first step ...
    loading_anonymous: float | None = None
    held: float | None = None  # ... anonymous memory when the first step begins
    step_anonymous: float | None = None  # ... and the peak from there on
    output: list[str] = field(default_factory=list, repr=False)


def main() -> int:
    """Rehearse one model and print the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=list(MODELS))
    parser.add_argument("--resolution", type=int, help="pixels; left out: sd15 512, sdxl 512, tiny 64")
    parser.add_argument("--stored", choices=["bf16", "fp16", "fp32"], default="bf16", help="dtype of the weight files")
    parser.add_argument("--folder", type=Path, help="where to make a folder to work in; left out: the temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the folder to work in as it is at the end")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    case, usual, needed = MODELS[arguments.model]
    resolution = arguments.resolution or usual
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=arguments.folder)).resolve()
    try:
        needed *= 2 if arguments.stored == "fp32" else 1
        free = shutil.disk_usage(folder).free / GIB
        if free < needed:
            parser.error(f"{folder} has {free:.1f} GiB free and {needed:.1f} are needed: name another --folder")
        result = rehearse(folder, case, resolution, arguments.stored, more)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    result = {"model": arguments.model, "resolution": resolution, "stored": arguments.stored, "flags": more, **result}
    if arguments.json:
        shown = ["--model", arguments.model, "--resolution", str(resolution), "--stored", arguments.stored]
        words = ["python", "benchmarks/rehearsal.py", *shown, *(["--", *more] if more else [])]
        settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("OMP_", "MALLOC_"))]
        command = " ".join([*sorted(settings), shlex.join(words)])
        machine = {"cores": os.cpu_count(), "memory_gib": _machine_memory(), "cpu": platform.machine()}
        packages = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        result = {"command": command, "machine": machine, "versions": packages, **result}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


def rehearse(folder: Path, case: str, resolution: int, stored: str, more: list[str]) -> dict:
    """Run all phases in `folder`, printing each as it ends; return the numbers and checks up to the first failure."""
    run, phases, checks, summaries, read = folder / "run", {}, {}, {}, None
    commands = commands_of(folder, case, resolution, stored, more)
    print(f"{'phase':12}{'seconds':>9}{'resident':>10}{'anonymous':>11}  GiB at the peak", flush=True)
    for name, command in commands.items():
        print(f"{name} started at {time.strftime('%H:%M:%S')}", file=sys.stderr, flush=True)
        phase = phases[name] = measured(name, command, folder)
        print(f"{name:12}{phase.seconds:9.1f}{phase.peak_resident:10.2f}{phase.peak_anonymous:11.2f}", flush=True)
        checks[f"{name}: exit status 0"] = phase.status == 0
        if phase.status:
            print(f"{name} ended with {phase.status}:\n" + "\n".join(phase.output[-30:]), file=sys.stderr)
            break
        if name in ("train", "resume"):
            summaries[name] = json.loads((run / "summary.json").read_text())
            del summaries[name]["revisions"]  # of files in this run's own folder
        if name == "diffusers":
            read = json.loads((folder / "read.json").read_text())
    checks |= checks_of(summaries, read)
    if read:
        print(
            f"\ndiffusers' prediction from the result differs from the policy's by {read['difference']:.2e} of its rms,"
            f" from the base by {read['rounding']:.2e} (rounding); the LoRA changes it by {read['effect']:.2e}"
        )
    predicted = dry_run(phases["dry run"].output) if "dry run" in phases else {}
    memory = compared(phases, predicted, folder) if "resume" in phases else {}
    passed = all(checks.values()) and len(phases) == len(commands)
    for check, holds in checks.items():
        if not holds:
            print(f"failed: {check}", file=sys.stderr)
    if passed:
        print(f"all {len(checks)} checks hold")
    return {
        "passed": passed,
        "checks": checks,
        "phases": [{k: v for k, v in asdict(phase).items() if k != "output"} for phase in phases.values()],
        "predicted": predicted,
        "memory": memory,
        "read_back": read,
        "summaries": summaries,
    }


def commands_of(folder: Path, case: str, resolution: int, stored: str, more: list[str]) -> dict[str, list[str]]:
    """Return the command of each phase, in order."""
    parts = [sys.executable, "-m", "benchmarks.rehearsal_parts"]
    settings = [*flags(folder, resolution), *more]
    train, two = [sys.executable, "-m", "dpo_fast.train", *settings], ["--max_train_steps", "2"]
    return {
        "imports": [sys.executable, "-c", "import dpo_fast.training.run, dpo_fast.training.trainer"],
        "make": [*parts, "make", str(folder), case, str(resolution), stored],
        "dry run": [*train, *two, "--dry-run"],
        "cache": [sys.executable, "-m", "dpo_fast.cache", "build", *settings, *two],
        "train": [*train, "--max_train_steps", "1"],
        "resume": [*train, *two, "--resume_from_checkpoint", "latest"],
        "policy": [*parts, "policy", str(folder), str(resolution)],
        "diffusers": [*parts, "read", str(folder)],
    }


def flags(folder: Path, resolution: int) -> list[str]:
    """Return the flags of the training, except its number of steps."""
    values = {
        "pretrained_model_name_or_path": folder / "model",
        "dataset_name": folder / "pairs.parquet",
        "latent_cache_dir": folder / "cache",
        "output_dir": folder / "run",
        "resolution": resolution,
        "mixed_precision": "bf16",
        "tuning": "lora",
        "rank": RANK,
        "train_batch_size": 1,
        "learning_rate": 1e-3,  # so large that two steps show in the prediction
        "checkpointing_steps": 1,
        "log_every": 1,
        "dataloader_num_workers": 0,
        "seed": SEED,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def checks_of(summaries: dict[str, dict], read: dict[str, float] | None) -> dict[str, bool]:
    """Check the summaries of the first and the resumed training, and what diffusers read back."""
    checks = {}
    if "train" in summaries:
        first = summaries["train"]
        checks["train: the first margin is exactly 0"] = first["initial_margin_rms"] == 0.0
        checks["train: the first loss is ln 2"] = math.isclose(first["loss_first"], math.log(2), rel_tol=1e-6)
    if "resume" in summaries:
        second = summaries["resume"]
        checks["resume: two steps are done, none skipped"] = (second["steps"], second["skipped_updates"]) == (2, 0)
        checks["resume: the second loss differs from the first"] = second["loss_last"] != second["loss_first"]
    if read:
        allowed = max(DIFFERENCE_FACTOR * read["rounding"], SMALLEST_DIFFERENCE)
        checks["diffusers: the result predicts as the policy does"] = read["difference"] <= allowed
        checks["diffusers: the result differs from the base"] = read["effect"] > 2 * allowed
    return checks


def measured(name: str, command: list[str], folder: Path) -> Phase:
    """Run a command to its end and measure it."""
    words = ["python" if word == sys.executable else word.replace(str(folder), "FOLDER") for word in command]
    phase = Phase(name, shlex.join(words))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    samples, settled = [], []
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def read_lines() -> None:
        for line in process.stdout:
            if line.startswith(SETTLED):
                settled.append(time.perf_counter())
            phase.output.append(line.rstrip())

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            if now := memory_of(process.pid):
                samples.append(now)

    ended = threading.Event()
    threads = [threading.Thread(target=work, daemon=True) for work in (read_lines, sample)]
    for thread in threads:
        thread.start()
    phase.status = process.wait()
    phase.seconds = time.perf_counter() - started
    ended.set()
    for thread in threads:
        thread.join()
    process.stdout.close()
    phase.peak_resident = samples[-1].peak_resident if samples else 0.0
    phase.peak_anonymous = max((sample.anonymous for sample in samples), default=0.0)
    if settled:
        before = [sample for sample in samples if sample.at < settled[0]]
        after = [sample for sample in samples if sample.at >= settled[0]]
        if before and after:
            phase.loading_resident = before[-1].peak_resident
            phase.loading_anonymous = max(sample.anonymous for sample in before)
            phase.held = before[-1].anonymous
            phase.step_anonymous = max(sample.anonymous for sample in after)
    return phase


def memory_of(pid: int) -> Sample | None:
    """Return the memory of a process now; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = [re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for name in ("VmHWM", "RssAnon")]
    return Sample(time.perf_counter(), *(int(size[1]) * 1024 / GIB for size in sizes)) if all(sizes) else None


def dry_run(output: list[str]) -> dict[str, float]:
    """Return the GiB that `--dry-run` printed, by name, and the TFLOP per step."""
    units = {"MiB": 1 / 1024, "GiB": 1.0}
    lines = [re.match(r"memory +([\d.]+) ([MG]iB)  (.*)$", line) for line in output]
    predicted = {line[3]: float(line[1]) * units[line[2]] for line in lines if line}
    flops = re.search(r"^step +([\d.]+)  TFLOP", "\n".join(output), re.MULTILINE)
    return predicted | ({"TFLOP a step": float(flops[1])} if flops else {})


def compared(phases: dict[str, Phase], predicted: dict[str, float], folder: Path) -> dict[str, dict[str, float]]:
    """Print and return the training's memory beside what is expected, in GiB.

    `--dry-run` counts tensors, as a GPU's allocator does. A process also has its libraries; while it loads, the VAE in
    fp32 and the text encoders, which are dropped once everything is cached; and the freed blocks that glibc keeps (few
    with MALLOC_MMAP_THRESHOLD_=1048576 in the environment).
    """
    libraries = phases["imports"].peak_anonymous
    activations = next((size for name, size in predicted.items() if name.startswith("activations")), 0.0)
    tensors = next((size for name, size in predicted.items() if name.startswith("in all")), 0.0)
    encoders = sum(_as_loaded(path, "bf16") for path in folder.glob("model/text_encoder*"))
    encoders += _as_loaded(folder / "model" / "vae", "fp32")
    train = phases["train"]
    rows = {
        "loading: libraries, UNet, VAE, text encoders": (
            libraries + predicted["UNet weights"] + encoders,
            train.loading_anonymous,
        ),
        "held before the first step": (libraries + predicted["UNet weights"], train.held),
        "added by the step": (tensors - predicted["UNet weights"], train.step_anonymous - train.held),
        "of it, activations by --dry-run": (activations, None),
        "in the step, libraries left out": (tensors, train.step_anonymous - libraries),
    }
    print(f"\n{'anonymous memory, GiB':48}{'expected':>10}{'measured':>10}{'ratio':>8}")
    for name, (expected, size) in rows.items():
        shown = "" if size is None else f"{size:10.2f}{size / expected:8.2f}"
        print(f"{name:48}{expected:10.2f}{shown}")
    return {name: {"expected": expected, "measured": size} for name, (expected, size) in rows.items()}


def _as_loaded(component: Path, dtype: str) -> float:
    """Return the GiB of a component's weights in `dtype`."""
    width = {"bf16": 2, "fp32": 4}[dtype]
    total = 0
    for path in component.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total * width / GIB


def _machine_memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


if __name__ == "__main__":
    sys.exit(main())
