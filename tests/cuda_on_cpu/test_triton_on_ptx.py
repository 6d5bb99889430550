"""What Triton makes of its kernels for sm_90, run on a CPU: the bits of the native ops, and no fault.

The interpreter, in which tests/kernels runs them, knows neither threads nor shared memory nor approximate instructions.
"""

import functools

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from dpo_fast.kernels.dispatch import usable_backends  # noqa: E402
from tests.cuda_on_cpu.build import reason_against  # noqa: E402

if reason := usable_backends()["native"] or reason_against("source"):
    pytest.skip(f"PTX cannot run on this CPU: {reason}", allow_module_level=True)

from tests.cuda_on_cpu.check import everything, sums_problem  # noqa: E402
from tests.cuda_on_cpu.run_ptx import launch  # noqa: E402
from tests.cuda_on_cpu.triton_driver import triton_on_ptx  # noqa: E402
from tests.helpers.memory import poisoned_memory  # noqa: E402
from tests.kernels.cases import CASES  # noqa: E402

# a thread adds 16 elements of a tile of 2048, a warp five times, four warps twice; a term is rounded four times
ADDITIONS = 16 + 5 + 2 + 4
CHOSEN = [
    *("odd", "five_channels", "fp16", "ref_errors", "channels_last", "channels_last_odd", "one_number"),
    "labels_weights_bf16",
]


@pytest.mark.exhaustive
@pytest.mark.drawn(2)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHOSEN], ids=str)
def test_the_ptx_of_triton_gives_the_bits_of_the_native_ops(case, seed):
    with poisoned_memory():
        expected = everything(case, seed)
        results = []
        for schedule in (0, seed % 1000 + 1):
            with triton_on_ptx(functools.partial(launch, schedule=schedule)) as ops:
                results.append(everything(case, seed, ops=ops))
    for name, values in results[0].items():
        for actual, other, native in zip(values, results[1][name], expected[name], strict=True):
            assert torch.isfinite(actual).all(), name
            # another order of threads, and other errors of instructions that a GPU approximates
            assert torch.equal(actual, other), name
            if name.startswith("noise") or "_bwd" in name:
                assert torch.equal(actual, native), name
    assert sums_problem(case, seed, results[0], ADDITIONS) == ""
