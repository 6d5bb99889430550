"""csrc/cuda on a CPU: every op against the CPU's own bits and float64, under many orders of threads and blocks.

tests/kernels runs on both routes too, as the backends cuda_source and cuda_ptx.
"""

import os
import subprocess
import sys

import pytest

from dpo_fast.kernels.dispatch import usable_backends
from tests.cuda_on_cpu.build import Variant, reason_against

if reason := usable_backends()["native"] or reason_against("source"):
    pytest.skip(f"csrc/cuda cannot run on this CPU: {reason}", allow_module_level=True)

from tests.cuda_on_cpu.check import EDGES, problem, sanitizing
from tests.cuda_on_cpu.emulated import emulated
from tests.kernels.cases import CASES

QUICK = [case for case in (*CASES, *EDGES) if case.name in ("odd", "labels", "fp16", "channels_last")]
ROUTES = [
    "source",
    pytest.param("ptx", marks=pytest.mark.skipif(bool(reason_against("ptx")), reason=f"ptx: {reason_against('ptx')}")),
]


@pytest.mark.exhaustive
@pytest.mark.drawn(2)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_small_case(case, seed):
    assert problem(emulated(Variant("source")), case, seed, schedules=2) == ""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.drawn(2)
@pytest.mark.parametrize("how", [[], ["--low_limits"], ["--sanitized"], ["--large"]], ids=lambda how: " ".join(how))
@pytest.mark.parametrize("route", ROUTES)
def test_every_case(route, how, seed):
    """All cases, with the limits of grids lowered, under the sanitizers, and in the sizes of training steps."""
    schedules = "4" if how == ["--low_limits"] else "1" if how else "2"
    command = [sys.executable, "-m", "tests.cuda_on_cpu.check", route, *how, "--schedules", schedules]
    done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert ", 0 wrong;" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_the_tests_of_the_kernels_pass_under_the_sanitizers(route, pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "tests/kernels"]
    command += ["-k", f"cuda_{route} and not standard_normal and not independent"]  # a million numbers each
    environment = {**sanitizing(), "CUDA_ON_CPU_SANITIZED": "1"}
    done = subprocess.run(
        [*command, "--seed", str(pytestconfig.option.seed)],
        env=environment,
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


def test_a_launch_on_a_device_that_is_not_there_is_refused(seed):
    gpu = emulated(Variant("source"))
    from tests.cuda_on_cpu.check import everything

    with gpu.as_native(device=1):
        everything(QUICK[0], seed)  # the machine has two
    with gpu.as_native(device=2), pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        everything(QUICK[0], seed)
    assert gpu.module.cuda_fault(1) == "" and "invalid device ordinal" in gpu.module.cuda_fault(2)


def test_the_libraries_that_the_sanitizers_need_are_there():
    assert all(map(os.path.isfile, sanitizing()["LD_PRELOAD"].split(":")))
