"""The pair kernels, each implementation beside the others: time, bandwidth, launches and error, on training's shapes.

    python benchmarks/kernels.py [--pairs 1 8 64] [--json FILE]

`eager` is the op's specification in plain PyTorch, differentiated by autograd; `compile` is the same through
torch.compile; the others are the backends of dpo_fast that can be used here. GB/s counts the bytes an op has to move,
and `of copy` is its fraction of a device-to-device copy measured in this very run. `launches` are kernels on a GPU and
operators dispatched on a CPU (not known of compiled code). `error` is the largest one against float64, relative to the
largest value of the output it is in.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases live with the tests

from dpo_fast.files import write_json
from dpo_fast.kernels import dispatch, reference
from tests.kernels.cases import STEP_CASES, Case, loss_inputs, noise_inputs

ROUNDS, MIN_SECONDS = 7, 0.05
WRONG = 0.05  # relative error above which a row is left out (Inductor's C++ gets wrapping int64 products wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8, 64], help="pairs a call")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in STEP_CASES], help="names of shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_compile", action="store_true", help="leave the torch.compile rows out")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    device = arguments.device
    copy = copy_bandwidth(device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}; copy {copy:.1f} GB/s")
    print(
        f"{'case':30}{'op':18}{'implementation':15}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'launches':>10}"
        f"{'error':>9}{'x eager':>9}"
    )
    rows, wrong = [], []
    for case in STEP_CASES:
        if case.name not in arguments.cases:
            continue
        for pairs in arguments.pairs:
            for row in measure(replace(case, pairs=pairs), device, copy, not arguments.no_compile):
                if row["error"] > WRONG:
                    print(
                        f"{row['case']:30}{row['op']:18}{row['implementation']:15} wrong, left out: {row['error']:.2g}"
                    )
                    wrong.append({name: row[name] for name in ("case", "op", "implementation", "error")})
                    continue
                rows.append(row)
                numbers = f"{row['ms']:9.3f}{row['gb_per_s']:8.1f}{row['of_copy']:9.2f}{row['launches'] or '-':>10}"
                numbers += f"{row['error']:9.1e}{row['speedup_over_eager']:9.2f}"
                print(f"{row['case']:30}{row['op']:18}{row['implementation']:15}{numbers}", flush=True)
            if arguments.json:  # after every case: a long run may be cut off
                result = {"device": where, "torch": torch.__version__, "copy_gb_per_s": copy, "command": sys.argv}
                write_json(arguments.json, result | {"rows": rows, "wrong": wrong})


def measure(case: Case, device: str, copy: float, compiled: bool) -> list[dict]:
    """Measure one case; return its rows."""
    torch._dynamo.reset()  # compile each case afresh with static shapes, never past the recompile limit
    rows = []
    for op, (calls, truth, size) in operations(case, device, compiled).items():
        times = interleaved({name: call for name, call in calls.items()}, device)
        errors = {name: error(call(), truth) for name, call in calls.items()}
        for name, call in calls.items():
            rows.append(
                {
                    "case": f"{case.name} B={case.pairs}",
                    "op": op,
                    "implementation": name,
                    "ms": times[name] * 1e3,
                    "gb_per_s": size / times[name] / 1e9,
                    "of_copy": size / times[name] / 1e9 / copy,
                    "launches": None if name == "compile" and device == "cpu" else launches(call, device),
                    "error": errors[name],
                    "speedup_over_eager": times["eager"] / times[name],
                }
            )
    return rows


def operations(case: Case, device: str, compiled: bool) -> dict[str, tuple[dict[str, Callable], tuple, int]]:
    """Map each op to (implementation -> call, float64 truth of its outputs, bytes it has to move)."""
    noise, loss = vars(noise_inputs(case, 0, device)), vars(loss_inputs(case, 0, device))
    noise_arguments = (*noise.values(), "epsilon", case.policy)
    loss_arguments = tuple(loss.values())
    policy, ref, target = loss["policy_pred"].detach(), loss["ref"], loss["target"]
    plain = (policy, ref, target, *loss_arguments[3:])
    _, margin, _, _ = reference.dpo_loss(*plain)
    one = torch.ones((), device=device)
    back = (one, policy, target, margin, case.beta, loss["label"], loss["weight"])
    latents = noise["latents"]
    truths = {
        "noise_pair": tuple(
            t.double() for t in reference.noise_pair(latents.double(), *noise_arguments[1:-1], torch.float64)
        ),
        "dpo_loss": tuple(t.double() for t in reference.dpo_loss(*doubled(plain))),
        "dpo_loss backward": (reference.dpo_loss_bwd(*doubled(back)),),
    }
    sizes = {
        "noise_pair": 2 * latents.nbytes + target.numel() * 4,
        "dpo_loss": policy.nbytes + ref.nbytes + target.nbytes,
        "dpo_loss backward": 2 * policy.nbytes + target.nbytes,
    }

    def differentiate(function: Callable) -> Callable:
        value = function(*loss_arguments)[0]
        return lambda: torch.autograd.grad(value, loss_arguments[0], retain_graph=True)

    specifications = {"eager": (reference.noise_pair, reference.dpo_loss)}
    if compiled:
        specifications["compile"] = tuple(torch.compile(f, dynamic=False) for f in specifications["eager"])
    calls: dict[str, dict[str, Callable]] = {op: {} for op in truths}
    for name, (noise_pair, dpo_loss) in specifications.items():
        calls["noise_pair"][name] = lambda f=noise_pair: f(*noise_arguments)
        calls["dpo_loss"][name] = lambda f=dpo_loss: f(*plain)
        calls["dpo_loss backward"][name] = differentiate(dpo_loss)
    for name, reason in dispatch.usable_backends(device).items():
        if reason or name == "reference":  # the reference is the row `eager`
            continue
        noise_module = dispatch.module_for("noise_pair", name, latents)
        loss_module = dispatch.module_for("dpo_loss", name, policy)
        calls["noise_pair"][name] = lambda m=noise_module: m.noise_pair_fwd(*noise_arguments)
        calls["dpo_loss"][name] = lambda m=loss_module: m.dpo_loss_fwd(*plain)
        calls["dpo_loss backward"][name] = lambda m=loss_module: (m.dpo_loss_bwd(*back),)
    return {op: (calls[op], truths[op], sizes[op]) for op in truths}


def doubled(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def error(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Return the largest error of any output, relative to that output's largest value."""
    return max(
        ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
        for got, want in zip(outputs, truth, strict=True)
    )


def interleaved(calls: dict[str, Callable], device: str) -> dict[str, float]:
    """Return median seconds per call; the implementations take turns, so that a noisy machine disturbs them alike."""
    counts = {}
    for name, call in calls.items():
        call()
        once = seconds(call, 1, device)
        counts[name] = max(1, int(MIN_SECONDS / max(once, 1e-6)))
    rounds = [{name: seconds(call, counts[name], device) for name, call in calls.items()} for _ in range(ROUNDS)]
    return {name: sorted(r[name] for r in rounds)[ROUNDS // 2] for name in calls}


def seconds(call: Callable, count: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


class _Operators(TorchDispatchMode):
    """Count the dispatched operators, except views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        inputs = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)}
        aliases = isinstance(result, Tensor) and result.untyped_storage().data_ptr() in inputs
        self.count += not (aliases and not function._schema.is_mutable)
        return result


def launches(call: Callable, device: str) -> int:
    """Count the kernels that a call launches (GPU), or the operators that it dispatches (CPU)."""
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    with _Operators() as operators:
        call()
    return operators.count


def copy_bandwidth(device: str) -> float:
    """Return the GB/s, reads plus writes, of copying 256 MiB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), 1, device) for _ in range(10))
    return 2 * source.nbytes / best / 1e9


if __name__ == "__main__":
    main()
