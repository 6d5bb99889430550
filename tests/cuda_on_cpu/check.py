"""Every op of csrc/cuda, run on a CPU, against the CPU's own ops, float64 and itself.

python -m tests.cuda_on_cpu.check [source|ptx] [--sanitized] [--low_limits] [--schedules N] [--large] [--seed N]

prints the first problem of each case, what ran, and the seconds. Of each case it checks that
- noise and gradients have the bits of the CPU's ops;
- errors, margins and the loss are as near to float64 as their additions allow;
- every output is written, whatever lay in its memory before;
- another order of threads and blocks, and memory that begins at odd addresses, change no bit.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor

from dpo_fast.kernels import native, reference
from tests.cuda_on_cpu.build import Variant, compiler
from tests.cuda_on_cpu.emulated import Emulated, emulated
from tests.helpers.memory import poisoned_memory
from tests.kernels.cases import BF16, CASES, F16, F32, STEP_CASES, Case, difference_terms, loss_inputs, noise_inputs

# sizes around the kernels' own limits: tiles of 2048 elements, blocks of 256 threads, groups of 4 channels
EDGES = [
    Case("several_tiles", pairs=3, shape=(4, 65, 67), policy=BF16, ref=F32, target=F16, labels=True, weights=True),
    Case("several_tiles_last", pairs=2, shape=(4, 48, 48), policy=F16, ref=F16, channels_last=True),
    Case("more_pairs_than_threads", pairs=257, shape=(1, 1, 3), labels=True, weights=True),
    Case("eight_channels_last", pairs=2, shape=(8, 5, 7), channels_last=True, policy=BF16, ref=BF16),
    Case("nine_channels_last", pairs=2, shape=(9, 5, 7), channels_last=True, policy=BF16, ref=BF16),
    Case("nine_planes", pairs=2, shape=(9, 4, 8), policy=F16, ref=F16),
    Case("one_more_than_a_tile", pairs=2, shape=(1, 1, 2049)),
    Case("one_less_than_a_tile", pairs=2, shape=(1, 23, 89)),
]
# fewer rows of a grid and parts of an image, so that small cases go beyond them
LOW_LIMITS = (
    ("cuda/vectors.cuh", "return static_cast<unsigned>(rows < 65535 ? rows : 65535);",
     "return static_cast<unsigned>(rows < 3 ? rows : 3);"),
    ("cuda/pair_errors.cuh", "constexpr int64_t kMaxParts = 128;", "constexpr int64_t kMaxParts = 2;"),
)  # fmt: skip
LOW_ROWS = 3
TILE, MAX_PARTS = 2048, 128  # csrc/cuda/pair_errors.cuh
NATIVE = SimpleNamespace(noise_pair=native, pair_errors=native, dpo_loss=native)

Outputs = dict[str, tuple[Tensor, ...]]


def displaced(x: Tensor) -> Tensor:
    """x in memory that begins one number past a multiple of 64 bytes and ends with the last number."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


def everything(case: Case, seed: int, displace: bool = False, ops: SimpleNamespace = NATIVE) -> Outputs:
    """All outputs of all ops on one case. `ops` has the modules of a backend by the names of the ops."""

    def placed(values: Iterable) -> list:
        return [displaced(x) if displace and isinstance(x, Tensor) and x.dim() else x for x in values]

    noise = placed(vars(noise_inputs(case, seed)).values())
    inputs = loss_inputs(case, seed)
    inputs.policy_pred = inputs.policy_pred.detach()
    p, ref, target, beta, label, weight = placed(vars(inputs).values())
    grad, margin = placed([torch.linspace(-1, 1, 2 * case.pairs), torch.linspace(-9, 9, case.pairs)])
    scale = torch.tensor(8.0)
    outputs = {
        f"noise_pair {kind} {dtype}": ops.noise_pair.noise_pair_fwd(*noise, kind, dtype)
        for kind in ("epsilon", "v_prediction")
        for dtype in (F32, F16, BF16)
    }
    return outputs | {
        "pair_errors": ops.pair_errors.pair_errors_fwd(p, ref, target),
        "pair_errors without a reference": ops.pair_errors.pair_errors_fwd(p, None, target),
        "dpo_loss": ops.dpo_loss.dpo_loss_fwd(p, ref, target, beta, label, weight),
        "pair_errors_bwd": (ops.pair_errors.pair_errors_bwd(grad, p, target),),
        "dpo_loss_bwd": (ops.dpo_loss.dpo_loss_bwd(scale, p, target, margin, beta, label, weight),),
        "dpo_loss_bwd of decided pairs": (
            ops.dpo_loss.dpo_loss_bwd(scale, p, target, 20 * margin, beta, label, weight),
        ),
    }


def additions_of(case: Case, max_parts: int) -> int:
    """The longest chain of roundings that a term of an error goes through in csrc/cuda.

    A thread adds eight elements of each of its tiles, a warp five times, a block seven; a term is rounded four times.
    """
    tiles = -(-math.prod(case.shape) // TILE)
    return 8 * -(-tiles // min(tiles, max_parts)) + 5 + 7 + 4


def sums_problem(case: Case, seed: int, outputs: Outputs, additions: int) -> str:
    """How the sums differ from float64 by more than so many roundings can, or ""."""
    inputs = loss_inputs(case, seed)
    p, ref, target = inputs.policy_pred.detach(), inputs.ref, inputs.target
    truth = reference.pair_errors(p.double(), ref.double(), target.double())
    unit = torch.finfo(F32).eps / 2
    if ref.dim() == 4:
        terms = (truth[0], truth[1], difference_terms(p, ref, target))
    else:
        terms = (truth[0], torch.zeros_like(truth[0]), truth[0] + truth[1])
    for actual, exact, size, name in zip(outputs["pair_errors"], truth, terms, ("policy", "ref", "delta"), strict=True):
        error, allowed = (actual.double() - exact).abs(), additions * unit * size + unit * exact.abs()
        if not (error <= allowed).all():
            return f"{name} errors are {(error / allowed).max():.3g} times as far from float64 as they may be"
    half = case.pairs
    loss, margin = outputs["dpo_loss"][:2]
    exact = case.beta / 2 * (truth[2][half:] - truth[2][:half])
    allowed = case.beta / 2 * (additions + 2) * unit * (terms[2][half:] + terms[2][:half]) + 2 * unit * exact.abs()
    if not ((margin.double() - exact).abs() <= allowed).all():
        return "margins are further from float64 than they may be"
    pair_loss = torch.nn.functional.softplus(-margin.double())
    if inputs.label is not None:
        other = torch.nn.functional.softplus(margin.double())
        pair_loss = inputs.label.double() * pair_loss + (1 - inputs.label.double()) * other
    if inputs.weight is not None:
        pair_loss = inputs.weight.double() * pair_loss
    if not abs(loss.double() - pair_loss.mean()) <= 2 * unit * pair_loss.mean():
        return "the loss is not the mean of its margins' losses"
    return ""


@poisoned_memory()
def problem(gpu: Emulated, case: Case, seed: int, schedules: int, max_parts: int = MAX_PARTS) -> str:
    """What is wrong with a build on one case, in a line; "" if nothing is."""
    expected = everything(case, seed)
    schedule, displace = 0, False
    try:
        with gpu.as_native():
            gpu.schedule(0)
            first = everything(case, seed)
            for name, values in first.items():
                for actual, from_cpu in zip(values, expected[name], strict=True):
                    if not torch.isfinite(actual).all():
                        return f"{name}: not finite, or not written"
                    bits = name.startswith("noise") or "_bwd" in name
                    if bits and not torch.equal(actual, from_cpu):
                        return f"{name}: other bits than the CPU's"
            if wrong := sums_problem(case, seed, first, additions_of(case, max_parts)):
                return wrong
            for schedule in range(1, schedules + 1):
                gpu.schedule(seed + schedule)
                displace = schedule % 2 == 1
                for name, values in everything(case, seed, displace).items():
                    if not all(map(torch.equal, values, first[name])):
                        return f"{name}: other bits under schedule {schedule}" + " at odd addresses" * displace
    except RuntimeError as error:
        return str(error)
    return ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("route", nargs="?", default="source", choices=("source", "ptx"))
    parser.add_argument("--sanitized", action="store_true", help="under AddressSanitizer and UBSan")
    parser.add_argument("--low_limits", action="store_true", help="3 rows of a grid, 2 parts of an image")
    parser.add_argument("--schedules", type=int, default=4, help="orders of threads and blocks")
    parser.add_argument("--large", action="store_true", help="the sizes of training steps, instead of the small cases")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="of these alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--edits", type=json.loads, default=[], help=argparse.SUPPRESS)  # of the tests: planted faults
    parser.add_argument("--nvcc_flags", type=json.loads, default=[], help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.sanitized and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        return subprocess.run([sys.executable, "-m", __spec__.name, *arguments], env=sanitizing()).returncode

    torch.set_num_threads(1)
    edits = (*(tuple(edit) for edit in chosen.edits), *(LOW_LIMITS if chosen.low_limits else ()))
    gpu = emulated(Variant(chosen.route, chosen.sanitized, edits, tuple(chosen.nvcc_flags)))
    max_parts = 2 if chosen.low_limits else MAX_PARTS
    if chosen.low_limits:
        gpu.limit_rows(LOW_ROWS)
    started, wrong = time.monotonic(), 0
    cases = STEP_CASES if chosen.large else [*CASES, *EDGES]
    if chosen.cases:
        cases = [case for case in cases if case.name in chosen.cases]
    for case in cases:
        if said := problem(gpu, case, chosen.seed, chosen.schedules, max_parts):
            wrong += 1
            print(f"{case}: {said}", flush=True)
    print(
        f"{chosen.route}{' sanitized' * chosen.sanitized}{' low limits' * chosen.low_limits}: {len(cases)} cases under"
        f" {chosen.schedules + 1} schedules, {wrong} wrong; {gpu.counts()}; {time.monotonic() - started:.1f} s"
    )
    return int(wrong > 0)


def sanitizing() -> dict[str, str]:
    """The environment of a process that loads a sanitized build: the sanitizer has to be there first."""

    def library(name: str) -> str:
        command = [compiler(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    options = {"ASAN_OPTIONS": "detect_leaks=0:use_sigaltstack=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    # the C++ library too, or the sanitizer finds nobody to pass exceptions on to
    return {**os.environ, **options, "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so.6')}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
