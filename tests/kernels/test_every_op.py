"""No op and no kernel is missing from the tests that name them one by one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = ROOT / "dpo_fast" / "kernels"
# Each runs every op: on the CPU, in what surrounds a launch, interpreted, in CUDA on a CPU.
RUN_THEM_ALL = (
    "tests/kernels/test_native.py",
    "tests/kernels/test_first_launch.py",
    "tests/kernels/test_triton.py",
    "tests/cuda_on_cpu/check.py",
)


def functions(file: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]


def ops(file: Path) -> set[str]:
    return {function.name for function in functions(file) if re.search("_(fwd|bwd)$", function.name)}


def test_every_backend_has_every_op():
    of_triton = {name for file in (BACKENDS / "triton").glob("*.py") for name in ops(file)}
    native = ops(BACKENDS / "native.py")
    assert native == of_triton and len(native) >= 5
    assert native - {"noise_pair_fwd"} == ops(BACKENDS / "reference.py")
    for op in {re.sub("_(fwd|bwd)$", "", name) for name in native}:
        assert (BACKENDS / f"{op}.py").is_file() and (ROOT / "tests" / "kernels" / f"test_{op}.py").is_file(), op


@pytest.mark.parametrize("file", RUN_THEM_ALL)
def test_every_op_is_run_by(file):
    called = set(re.findall(r"\w+_(?:fwd|bwd)\b", (ROOT / file).read_text()))
    assert ops(BACKENDS / "native.py") <= called


def test_every_triton_kernel_is_compiled():
    pytest.importorskip("triton")
    from tests.kernels.test_triton_compile import KERNELS

    kernels = {
        f"{file.stem}.{function.name}"
        for file in (BACKENDS / "triton").glob("*.py")
        for function in functions(file)
        if function.name.endswith("_kernel")
    }
    assert kernels == {name for name, _ in KERNELS}
