"""Time of a training step, ours beside the public scripts and a tuned baseline, on provably the same work.

    python benchmarks/step_time.py [--case CASE ...] [--json FILE] [--plot PNG] [--profile] [--providers NAME ...]

Without --case: on a CPU all mini cases, on a GPU SDXL and Turbo, LoRA and full, as far as the free memory allows by the
prediction that `--dry-run` prints.

ours             dpo_fast's own Trainer.train_step, opened from flags as a user's run is, reading from its cache
ours-cached      the same with --cached_reference: no reference is held or run
ours-chosen      the same as a long run with default flags chooses on this machine (only where --providers names it)
tuned            what PyTorch and diffusers give an expert: cached latents, compiled blocks, channels_last, fused AdamW
peer-diffusers   what diffusers' scripts do each step (LoRA cases)
peer-salesforce  what the paper's authors' script does each step (full cases)

All get the same weights, latents, embeddings, noise and timesteps. Each row is held against an fp32 computation of the
same six first steps: errors of policy and reference, gradient norm, margins and loss at step 6. A row that differs by
more than its dtype rounds is an error, and the exit status 1. On a CPU the providers take turns, a step each, so that a
noisy machine disturbs them alike; on a GPU, where they would hold each other's memory, they run one after the other.

The JSON of one case is an object with its `rows`; of several it is {"cases": {name: that object}, "left_out": {name:
reason}}. It is written again after every provider, so that what was measured before an interruption is in it;
`unmeasured` names the providers still to come, `failed` is the error of a case that could not be finished.

`launches` and `syncs` (of the host) are counted in one profiled step: on a GPU kernels and waits, on a CPU operators,
and reads of a value that would be waits. `peak GiB` is the allocator's on a GPU, the whole process's on a CPU.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step import counts, report
from benchmarks.step.cases import CASES, Case
from benchmarks.step.ceiling import matmul_ceiling
from benchmarks.step.memory import fitting
from benchmarks.step.proof import problems, weakness
from benchmarks.step.work import PROOF_STEPS, Settings
from benchmarks.step.worker import Failed, Worker
from dpo_fast.choices.machine import device_name
from dpo_fast.files import write_json

FOR_TUNING = {
    "lora": ("ours", "ours-cached", "tuned", "peer-diffusers"),
    "full": ("ours", "ours-cached", "tuned", "peer-salesforce"),
}
WARM_UP = 2  # steps after the proof's six
PROFILED = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases_help = f"may be given several times or with several names; one of {', '.join(CASES)}"
    parser.add_argument("--case", nargs="+", action="extend", choices=CASES, metavar="CASE", help=cases_help)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw the rows and the floor of every case to this PNG")
    parser.add_argument("--profile", action="store_true", help="also print time by class of operator")
    parser.add_argument("--providers", nargs="+", help="default: all that do the case's kind of tuning")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each provider")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch_size", type=int, help="pairs a forward pass of ours and tuned; default: the case's")
    parser.add_argument("--eager", action="store_true", help="leave the blocks of ours and tuned uncompiled")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    left_out: dict[str, str] = {}
    names = list(dict.fromkeys(arguments.case or ()))
    if not names:
        names, left_out = default_cases(arguments.device, arguments.dtype)
        for name, reason in left_out.items():
            say(f"{name} is left out: {reason}")
        if not names:
            say("no case fits: free memory of the GPU, or name a case with --case and a smaller --batch_size")
            return 1
    for name in names:
        for provider in arguments.providers or ():
            if provider not in (offered := (*FOR_TUNING[CASES[name].tuning], "ours-chosen")):
                parser.error(f"--providers {provider} does not train {name}: choose from {', '.join(offered)}")
        if arguments.batch_size and CASES[name].pairs % arguments.batch_size:
            batch_size, pairs = arguments.batch_size, CASES[name].pairs
            parser.error(f"--batch_size ({batch_size}) must divide the {pairs} pairs of a step of {name}")

    book = Book(arguments.json, single=len(names) == 1 and not left_out, left_out=left_out)
    for number, name in enumerate(names):
        if number:
            print("", flush=True)
        try:
            result = measured_case(CASES[name], arguments, book.note)
        except Failed as error:
            book.note_failure(name, str(error))
            print(error, file=sys.stderr)
            continue
        print(report.table(result), flush=True)
        if arguments.profile:
            print("\n" + report.profile_table(result), flush=True)
    complete = [result for result in book.results.values() if not result.unmeasured]
    if arguments.plot and complete:
        report.plot(complete, arguments.plot)
    weak = [line for result in complete for line in map(weakness, result.truth.values()) if line]
    for line in weak:
        print(f"no proof: {line}", file=sys.stderr)
    differs = any(row.problems for result in complete for row in result.rows)
    return 1 if book.failed or weak or differs else 0


def default_cases(device: str, dtype: str) -> tuple[list[str], dict[str, str]]:
    """Return the cases to measure when none is named, and why others are left out."""
    if device == "cpu":
        return [name for name, case in CASES.items() if case.mini], {}
    free, _ = torch.cuda.mem_get_info()
    say(f"predicting which cases fit into {free / 2**30:.1f} GiB")
    return fitting(free, dtype)


class Book:
    """Everything that this run has measured so far, kept in its JSON file."""

    def __init__(self, path: Path | None, *, single: bool, left_out: dict[str, str]) -> None:
        self.path, self.single, self.left_out = path, single, left_out
        self.results: dict[str, report.Result] = {}
        self.failed: dict[str, str] = {}

    def note(self, result: report.Result) -> None:
        """Record a case as far as it is measured."""
        self.results[result.case] = result
        self._write()

    def note_failure(self, name: str, error: str) -> None:
        self.failed[name] = error
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        cases = {name: report.as_json(result) for name, result in self.results.items()}
        for name, error in self.failed.items():
            cases.setdefault(name, {"case": name, "rows": []})["failed"] = error
        [first, *_] = cases.values()
        write_json(self.path, first if self.single else {"cases": cases, "left_out": self.left_out})


def measured_case(case: Case, arguments: argparse.Namespace, note: Callable[[report.Result], None]) -> report.Result:
    """Measure one case; `note` gets the result so far after every provider.

    Raises Failed if a provider's process fails.
    """
    names = arguments.providers or list(FOR_TUNING[case.tuning])
    settings = Settings(
        case.name,
        arguments.device,
        arguments.dtype,
        arguments.batch_size or case.batch_size,
        PROOF_STEPS + WARM_UP + arguments.steps + PROFILED,
        case.learning_rate,
        not arguments.eager,
    )
    with tempfile.TemporaryDirectory(prefix="step_time-") as folder:
        return run(Path(folder), settings, names, arguments.steps, note)


def run(
    folder: Path, settings: Settings, names: list[str], steps: int, note: Callable[[report.Result], None]
) -> report.Result:
    """Prepare the work, compute the fp32 truth, then measure every provider."""
    case = CASES[settings.case]
    ask_once("truth", folder, "prepare", settings)
    needed = counts.known(case.name)
    ceiling = matmul_ceiling(settings.device, settings.torch_dtype)
    truth = {}
    for optimizer in sorted({optimizer_of(name, case) for name in names}):
        say(f"{case.name}: the fp32 truth, {optimizer}")
        truth[optimizer] = ask_once("truth", folder, "prove", optimizer=optimizer)[0]
    result = report.Result(
        case=case.name,
        machine=machine(settings.device),
        versions=counts.versions() | {"torch": torch.__version__, "python": platform.python_version()},
        command=shlex.join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        ceiling=ceiling,
        needed_flops=needed["flops"],
        truth=truth,
        rows=[],
        unmeasured=list(names),
    )
    measure = together if settings.device == "cpu" else one_by_one
    for name, values in measure(folder, names, steps):
        wrong = problems(values["proof"], truth[optimizer_of(name, case)], settings.dtype)
        flops = executed(name, case, needed)
        result.rows.append(report.Row(provider=name, pairs=case.pairs, flops=flops, problems=wrong, **values))
        result.unmeasured.remove(name)
        note(result)
    result.ceiling = max(ceiling, matmul_ceiling(settings.device, settings.torch_dtype))
    note(result)
    return result


def together(folder: Path, names: list[str], steps: int) -> Iterator[tuple[str, dict]]:
    """Yield every provider's name and measurements; they take turns, one step at a time."""
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
            yield name, measured[name] | end(worker, timed[name])
    finally:
        for worker in workers.values():
            worker.close()


def one_by_one(folder: Path, names: list[str], steps: int) -> Iterator[tuple[str, dict]]:
    """Yield every provider's name and measurements; each runs alone on the device."""
    for name in names:
        worker = Worker(name, folder)
        try:
            values = begin(worker)
            values |= end(worker, worker.ask("steps", steps))
        finally:
            worker.close()
        yield name, values


def begin(worker: Worker) -> dict:
    """Open a provider, run its proof and warm it up; return what that measured."""
    say(f"{worker.name}: opening, six steps for the proof, {WARM_UP} more to warm up")
    opening = worker.ask("open")
    proof, seconds = worker.ask("prove")
    worker.ask("steps", WARM_UP)
    worker.ask("reset_memory")
    return {"opening": opening, "proof": proof, "warm_up": seconds}


def end(worker: Worker, timed: list[tuple[float, float]]) -> dict:
    """Return what the timed steps took, and the profile of one more step."""
    seconds, waited = zip(*timed, strict=True)
    peak = worker.ask("peak_memory")
    return {
        "seconds": list(seconds),
        "waited": list(waited),
        "peak_memory": peak,
        "profile": worker.ask("profile"),
    }


def ask_once(name: str, folder: Path, method: str, *arguments: object, **options: object) -> object:
    """Return one answer from a process that is closed afterwards."""
    worker = Worker(name, folder, **options)
    try:
        if method != "prepare":
            worker.ask("open")
        return worker.ask(method, *arguments)
    finally:
        worker.close()


def optimizer_of(provider: str, case: Case) -> str:
    """Return the optimizer of a provider: a peer keeps its script's."""
    return "adafactor" if provider == "peer-salesforce" and case.model.family == "sdxl" else "adamw"


def executed(provider: str, case: Case, needed: dict) -> float:
    """Return the FLOPs per pair that a provider really executes, encoders and recomputed forwards included."""
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
    return f"{device_name(torch.device(device))}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def say(line: str) -> None:
    print(f"step_time: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
