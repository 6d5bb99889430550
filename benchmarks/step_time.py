"""Time of a training step, ours beside the public scripts and a tuned baseline, on provably the same work.

    python benchmarks/step_time.py --case CASE [--json FILE] [--plot PNG] [--profile] [--providers ...] [--steps N]

ours             dpo_fast's own Trainer.train_step, opened from flags as a user's run is, reading from its cache
ours-cached      the same with --cached_reference: no reference is held or run
tuned            what PyTorch and diffusers give an expert: cached latents, compiled blocks, channels_last, fused AdamW
peer-diffusers   what diffusers' scripts do each step (LoRA cases)
peer-salesforce  what the paper's authors' script does each step (full cases)

All get the same weights, latents, embeddings, noise and timesteps. Each row is held against an fp32 computation of the
same six first steps: errors of policy and reference, gradient norm, margins and loss at step 6. A row that differs by
more than its dtype rounds is an error, and the exit status 1. On a CPU the providers take turns, a step each, so that a
noisy machine disturbs them alike; on a GPU, where they would hold each other's memory, they run one after the other.

`launches` and `syncs` (of the host) are counted in one profiled step: on a GPU kernels and waits, on a CPU operators,
and reads of a value that would be waits. `peak GiB` is the allocator's on a GPU, the whole process's on a CPU.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step import counts, report
from benchmarks.step.cases import CASES, Case
from benchmarks.step.ceiling import matmul_ceiling
from benchmarks.step.proof import problems, weakness
from benchmarks.step.work import PROOF_STEPS, Settings
from benchmarks.step.worker import Failed, Worker

FOR_TUNING = {
    "lora": ("ours", "ours-cached", "tuned", "peer-diffusers"),
    "full": ("ours", "ours-cached", "tuned", "peer-salesforce"),
}
WARM_UP = 2  # steps after the proof's six
PROFILED = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw the rows and the floor to this PNG")
    parser.add_argument("--profile", action="store_true", help="also print time by class of operator")
    parser.add_argument("--providers", nargs="+", help="default: all that do the case's kind of tuning")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each provider")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch_size", type=int, help="pairs a forward pass of ours and tuned; default: the case's")
    parser.add_argument("--eager", action="store_true", help="leave the blocks of ours and tuned uncompiled")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    offered = FOR_TUNING[case.tuning]
    names = arguments.providers or list(offered)
    for name in names:
        if name not in offered:
            parser.error(f"--providers {name} does not train {case.name}: choose from {', '.join(offered)}")
    batch_size = arguments.batch_size or case.batch_size
    if case.pairs % batch_size:
        parser.error(f"--batch_size ({batch_size}) must divide the {case.pairs} pairs of a step of {case.name}")
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    settings = Settings(
        case.name,
        arguments.device,
        arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32"),
        batch_size,
        PROOF_STEPS + WARM_UP + arguments.steps + PROFILED,
        case.learning_rate,
        not arguments.eager,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="step_time-") as folder:
            result = run(Path(folder), settings, names, arguments.steps)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    print(report.table(result))
    if arguments.profile:
        print("\n" + report.profile_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(result), indent=2) + "\n")
    if arguments.plot:
        report.plot(result, arguments.plot)
    weak = [line for line in map(weakness, result.truth.values()) if line]
    for line in weak:
        print(f"no proof: {line}", file=sys.stderr)
    return 1 if weak or any(row.problems for row in result.rows) else 0


def run(folder: Path, settings: Settings, names: list[str], steps: int) -> report.Result:
    """Prepare, find the truth, then measure every provider."""
    case = CASES[settings.case]
    ask_once("truth", folder, "prepare", settings)
    needed = counts.known(case.name)
    ceiling = matmul_ceiling(settings.device, settings.torch_dtype)
    truth = {}
    for optimizer in sorted({optimizer_of(name, case) for name in names}):
        say(f"the fp32 truth, {optimizer}")
        truth[optimizer] = ask_once("truth", folder, "prove", optimizer=optimizer)[0]
    measured = together(folder, names, steps) if settings.device == "cpu" else one_by_one(folder, names, steps)
    rows = [
        report.Row(
            provider=name,
            pairs=case.pairs,
            flops=executed(name, case, needed),
            problems=problems(values["proof"], truth[optimizer_of(name, case)], settings.dtype),
            **values,
        )
        for name, values in measured.items()
    ]
    return report.Result(
        case=case.name,
        machine=machine(settings.device),
        versions=counts.versions() | {"torch": torch.__version__, "python": platform.python_version()},
        command=shlex.join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        ceiling=max(ceiling, matmul_ceiling(settings.device, settings.torch_dtype)),
        needed_flops=needed["flops"],
        truth=truth,
        rows=rows,
    )


def together(folder: Path, names: list[str], steps: int) -> dict[str, dict]:
    """Every provider's measurements, a step of each in turn."""
    workers: dict[str, Worker] = {}
    measured: dict[str, dict] = {}
    try:
        for name in names:  # opened and compiled one after the other
            workers[name] = Worker(name, folder)
            measured[name] = begin(workers[name])
        timed: dict[str, list] = {name: [] for name in names}
        for _ in range(steps):
            for name, worker in workers.items():
                timed[name] += worker.ask("steps", 1)
        for name, worker in workers.items():
            measured[name] |= end(worker, timed[name])
    finally:
        for worker in workers.values():
            worker.close()
    return measured


def one_by_one(folder: Path, names: list[str], steps: int) -> dict[str, dict]:
    """Every provider's measurements, each alone on the device."""
    measured = {}
    for name in names:
        worker = Worker(name, folder)
        try:
            measured[name] = begin(worker)
            measured[name] |= end(worker, worker.ask("steps", steps))
        finally:
            worker.close()
    return measured


def begin(worker: Worker) -> dict:
    """Open a provider, prove its work and warm it up."""
    say(f"{worker.name}: opening, six steps for the proof, {WARM_UP} more to warm up")
    opening = worker.ask("open")
    proof, seconds = worker.ask("prove")
    worker.ask("steps", WARM_UP)
    worker.ask("reset_memory")
    return {"opening": opening, "proof": proof, "warm_up": seconds}


def end(worker: Worker, timed: list[tuple[float, float]]) -> dict:
    """What the timed steps took, and one more under the profiler."""
    seconds, waited = zip(*timed, strict=True)
    peak = worker.ask("peak_memory")
    return {
        "seconds": list(seconds),
        "waited": list(waited),
        "peak_memory": peak,
        "profile": worker.ask("profile"),
    }


def ask_once(name: str, folder: Path, method: str, *arguments: object, **options: object) -> object:
    """One answer from a process that ends after it."""
    worker = Worker(name, folder, **options)
    try:
        if method != "prepare":
            worker.ask("open")
        return worker.ask(method, *arguments)
    finally:
        worker.close()


def optimizer_of(provider: str, case: Case) -> str:
    """What a provider updates with: the peers keep their script's."""
    return "adafactor" if provider == "peer-salesforce" and case.model.family == "sdxl" else "adamw"


def executed(provider: str, case: Case, needed: dict) -> float:
    """FLOPs a pair that a provider really computes: encoders in the step, forwards done again."""
    flops = needed["flops"]
    if provider == "ours-cached":
        flops -= needed["ref_flops"]
    if provider.startswith("peer-"):
        flops += 2 * needed["vae_flops"] + needed["text_flops"]
    if provider == "peer-diffusers" or (provider == "peer-salesforce" and case.model.family == "sdxl"):
        flops += needed["forward_flops"]  # gradient checkpointing
    return flops


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def say(line: str) -> None:
    print(f"step_time: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
