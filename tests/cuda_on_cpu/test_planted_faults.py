"""Faults planted in csrc/cuda, each of which the emulation must find; -s prints what it says.

Each row of the table has the text that is replaced, its replacement, and part of the expected message.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from dpo_fast.kernels.dispatch import usable_backends
from tests.cuda_on_cpu.build import Variant, reason_against

if reason := usable_backends()["native"] or reason_against("source"):
    pytest.skip(f"csrc/cuda cannot run on this CPU: {reason}", allow_module_level=True)

from tests.cuda_on_cpu.check import EDGES, LOW_LIMITS, LOW_ROWS, problem
from tests.cuda_on_cpu.emulated import emulated
from tests.kernels.cases import CASES

BY_NAME = {case.name: case for case in (*CASES, *EDGES)}


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # below csrc
    old: str
    new: str
    source: str | None  # part of the message when the C++ text runs; None: that route cannot see the fault
    ptx: str | None  # part of the message when nvcc's instructions run
    case: str = "labels"
    sanitized: tuple[str, ...] = ()  # the routes on which AddressSanitizer or UBSan says it

    def __str__(self) -> str:
        return self.name


BARRIER_BEFORE = "  __syncthreads();  // the sum before this one is read\n"
BARRIER_AFTER = "shared[threadIdx.x / 32] = x;\n  __syncthreads();\n"
SHUFFLE = "x += __shfl_down_sync(0xffffffffu, x, step);"
STORE = "if (start + i < end) target[i] = values.x[i];"
LOAD = "if (start + i < end) raw.word[i] = __ldg(source + i);"
TREE = "    __syncthreads();\n    if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];"
ALIGNED = "return (reinterpret_cast<uintptr_t>(address) & 15) == 0;"
SUMS = "      op.sums[part * images + image] = policy_sum;\n"
FAULTS = [
    Fault("no barrier before shared memory is used again", "cuda/pair_errors.cu", BARRIER_BEFORE, "",
          "under schedule", "no barrier is between", case="several_tiles"),
    Fault("no barrier after shared memory is written", "cuda/pair_errors.cu", BARRIER_AFTER,
          BARRIER_AFTER.replace("  __syncthreads();\n", ""), "not finite", "is read before anything is written"),
    Fault("no barrier in the tree", "cuda/dpo_loss.cu", TREE, TREE.replace("    __syncthreads();\n", ""),
          "not finite", "is read before anything is written", case="more_pairs_than_threads"),
    Fault("a barrier that some threads never reach", "cuda/dpo_loss.cu", TREE,
          "    if (threadIdx.x >= width) return;\n" + TREE, "others have ended", "others have ended"),
    Fault("a barrier in a branch", "cuda/pair_errors.cu", BARRIER_BEFORE,
          "  if (threadIdx.x < 7) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }\n",
          "different barriers", None),  # nvcc makes one barrier of the two
    Fault("a shuffle in a branch", "cuda/pair_errors.cu", SHUFFLE, f"if (threadIdx.x % 32 < 16) {SHUFFLE}",
          "lanes that do not come", "lanes that do not come"),
    Fault("a shuffle with half a mask", "cuda/pair_errors.cu", "__shfl_down_sync(0xffffffffu, x",
          "__shfl_down_sync(0x0000ffffu, x", "outside its mask", "outside its mask"),
    Fault("numbers written past the end", "cuda/vectors.cuh", STORE, STORE.replace("<", "<="),
          "heap-buffer-overflow", "two threads write", case="odd", sanitized=("source",)),
    Fault("numbers read past the end", "cuda/vectors.cuh", LOAD, LOAD.replace("<", "<="),
          "heap-buffer-overflow", "heap-buffer-overflow", case="odd", sanitized=("source", "ptx")),
    Fault("16 bytes at an odd address", "cuda/vectors.cuh", ALIGNED, "return address != nullptr;",
          "misaligned address", "at an address that is not a multiple", sanitized=("source",)),
    Fault("an index past an array of the stack", "cuda/vectors.cuh",
          "for (int i = 0; i < kVector; ++i) {\n    const uint16_t half",
          "for (int i = 0; i <= kVector; ++i) {\n    const uint16_t half",
          "insufficient space", None, sanitized=("source",)),
    Fault("more rows than a grid has", "cuda/vectors.cuh", LOW_LIMITS[0][1], "return static_cast<unsigned>(rows);",
          "invalid configuration argument", "invalid configuration argument"),
    Fault("rows past the limit left out", "cuda/pair_errors.cuh",
          "  for (int64_t image = blockIdx.y; image < 2 * op.pairs; image += gridDim.y) {\n    const ConstArray policy",
          "  for (int64_t image = blockIdx.y; image < gridDim.y; image += gridDim.y) {\n    const ConstArray policy",
          "not written", "not written"),
    Fault("an output that is not written", "cuda/pair_errors.cuh",
          "  if (op.error_delta_out) op.error_delta_out[image] = errors.delta;\n", "", "not written", "not written"),
    Fault("a number that nothing has set", "cuda/vectors.cuh", "  Raw raw = {};\n", "  Raw raw;\n",
          "not finite", None, case="bf16"),  # to a compiler it may be any number, zero too
    Fault("a sum over blocks that do not wait", "cuda/pair_errors.cu", SUMS,
          SUMS + "if (part + 1 < parts) op.sums[part * images + image] += op.sums[(part + 1) * images + image];\n",
          "not finite", "in the same launch", case="several_tiles"),
    Fault("two threads write one number", "cuda/noise_pair.cu", "  if (block >= op.pixels * groups) return;\n",
          "  if (block > op.pixels * groups) return;\n", None, "two threads write", case="five_channels"),
    Fault("a term that is rounded away", "cuda/dpo_loss.cu", "grad_error_of(op, scale, image) * mean;",
          "grad_error_of(op, scale, image) * (mean * 1.0000002f);", "bits than the CPU's", "bits than the CPU's"),
]  # fmt: skip
IN_DEFAULT = ("no barrier before shared memory is used again", "a barrier that some threads never reach")


def found(fault: Fault, route: str, seed: int, nvcc_flags: tuple[str, ...] = ()) -> str:
    """What the emulation says of a build with the fault."""
    case = BY_NAME[fault.case]
    edits = ((fault.file, fault.old, fault.new),) if fault.old else ()
    if route in fault.sanitized:
        command = [sys.executable, "-m", "tests.cuda_on_cpu.check", route, "--sanitized", "--schedules", "1"]
        command += ["--cases", case.name, "--edits", json.dumps(edits), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode != 0, done.stdout
        lines = (done.stdout + done.stderr).splitlines()
        return next(line for line in lines if "ERROR: AddressSanitizer" in line or "runtime error:" in line)
    gpu = emulated(Variant(route, edits=edits, nvcc_flags=nvcc_flags))
    rows = "rows" in fault.name
    if rows and "limit" in fault.name:  # the limit itself is lowered in both
        gpu = emulated(Variant(route, edits=(*LOW_LIMITS[:1], *edits)))
    gpu.limit_rows(LOW_ROWS if rows else 65535)
    return problem(gpu, case, seed, schedules=12)


def rows(route: str) -> list:
    visible = [fault for fault in FAULTS if getattr(fault, route) is not None]
    return [
        pytest.param(
            fault,
            id=fault.name,
            marks=[] if route == "source" and fault.name in IN_DEFAULT else pytest.mark.exhaustive,
        )
        for fault in visible
    ]


@pytest.mark.slow
@pytest.mark.drawn(3)
@pytest.mark.parametrize("fault", rows("source"))
def test_a_fault_in_the_source_is_found(fault, seed):
    said = found(fault, "source", seed)
    print(f"\n{fault.name}: {said}")
    assert fault.source in said


@pytest.mark.slow
@pytest.mark.skipif(bool(reason_against("ptx")), reason=reason_against("ptx"))
@pytest.mark.drawn(2)
@pytest.mark.parametrize("fault", rows("ptx"))
def test_a_fault_in_the_instructions_is_found(fault, seed):
    said = found(fault, "ptx", seed)
    print(f"\n{fault.name}: {said}")
    assert fault.ptx in said


COMPILED = {  # what a compiler is told, and the op whose bits change
    "contraction of a * b + c": ("-fmad=true", "noise_pair", "odd"),
    "approximate divisions, subnormals flushed": ("-use_fast_math", "dpo_loss_bwd", "odd"),
    "approximate divisions": ("-prec-div=false", "dpo_loss_bwd", "odd"),
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(bool(reason_against("ptx")), reason=reason_against("ptx"))
@pytest.mark.parametrize("flag, op, case", COMPILED.values(), ids=COMPILED)
def test_arithmetic_that_a_compiler_changes_is_found(flag, op, case, seed):
    fault = Fault(flag, "", "", "", None, None, case)
    said = found(fault, "ptx", seed, (flag,))
    print(f"\n{flag}: {said}")
    assert said.startswith(op) and "other bits than the CPU's" in said
