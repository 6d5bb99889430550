"""The Triton kernels compiled without a GPU: exact instructions, no spills, nothing in local memory, 128-bit accesses.

`pytest -s tests/kernels/test_triton_compile.py` prints the table of registers and widths.
"""

import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
]

FLOAT = dict.fromkeys(
    "sums policy_error ref_error error_delta cached_error label weight loss margin grad_error grad_loss "
    "sqrt_alpha_bar sqrt_one_minus_alpha_bar".split(),
    "*fp32",
)
SCALAR = dict.fromkeys("pairs elements tiles images channels pixels rows".split(), "i32")
SCALAR |= dict(half_beta="fp32", scale="fp32", slope="fp32", seed="i64", pair_id="*i64", draw="*i64")
MULTIPLES_OF_16 = ("elements", "pixels")  # as in every latent of 8x8 and up

# kernel, pointers' dtypes, constants
PREDICTIONS = [
    dict(policy="*bf16", ref="*bf16", target="*fp32", SHARED_TARGET=True),
    dict(policy="*fp16", ref="*fp16", target="*fp32", SHARED_TARGET=False),
    dict(policy="*fp32", ref="*bf16", target="*fp32", SHARED_TARGET=True),
    dict(policy="*bf16", ref=None, target="*fp32", SHARED_TARGET=False),
    dict(policy="*fp32", ref="*fp32", target="*bf16", SHARED_TARGET=False),
]
LATENTS = [
    dict(latents="*fp16", noisy="*bf16", target="*fp32", groups=1, VELOCITY=False),
    dict(latents="*fp16", noisy="*fp16", target="*fp32", groups=1, VELOCITY=True),
    dict(latents="*fp32", noisy="*fp32", target="*fp32", groups=1, VELOCITY=True),
]
KERNELS = [
    *(("pair_errors.tile_sums_kernel", row) for row in PREDICTIONS),
    *(("pair_errors.pair_errors_bwd_kernel", {**row, "grad": row["policy"]}) for row in PREDICTIONS[:3]),
    *(("dpo_loss.dpo_loss_bwd_kernel", {**row, "grad": row["policy"]}) for row in PREDICTIONS[:3]),
    ("pair_errors.image_errors_kernel", dict(ONLINE=True, cached_error=None)),
    ("pair_errors.image_errors_kernel", dict(ONLINE=False)),
    ("dpo_loss.dpo_loss_kernel", dict(ONLINE=True, cached_error=None)),
    ("dpo_loss.dpo_loss_kernel", dict(ONLINE=False, label=None, weight=None)),
    *(("noise_pair.noise_planes_kernel", row) for row in LATENTS),
    *(("noise_pair.noise_pixels_kernel", {**row, "FULL": True}) for row in LATENTS),
]


@pytest.fixture(scope="module")
def kernels():
    """The backend's modules, which without a GPU cannot be imported as they are, and are forgotten afterwards."""
    before = set(sys.modules)
    with mock.patch("torch.cuda.is_available", return_value=True):
        names = {kernel.partition(".")[0] for kernel, _ in KERNELS}
        modules = {name: import_module(f"dpo_fast.kernels.triton.{name}") for name in names}
    yield SimpleNamespace(**modules)
    if not torch.cuda.is_available():
        for name in set(sys.modules) - before:
            if name.startswith("dpo_fast.kernels.triton"):
                del sys.modules[name]


def label(row) -> str:
    return "-".join(str(v).removeprefix("*") for v in row.values()) if isinstance(row, dict) else row


def compile_for(kernels, kernel: str, row: dict, capability: int, aligned: bool = True):
    """The kernel as launched on tensors aligned so; of `row`, strings are types and the rest constants."""
    module, name = kernel.split(".")
    function, constants = getattr(getattr(kernels, module), name), vars(kernels.pair_errors) | vars(kernels.noise_pair)
    given = {**FLOAT, **SCALAR, **row}
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        assert argument in given or argument in constants, f"{kernel}: add the type of {argument} to FLOAT or SCALAR"
        kind = given.get(argument, constants.get(argument))
        if isinstance(kind, str):
            signature[argument] = kind
            if aligned and (kind.startswith("*") or argument in MULTIPLES_OF_16):
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument], constexprs[argument] = "constexpr", kind
    warps = 1 if module == "noise_pair" else 4
    return triton.compile(
        ASTSource(function, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=warps, enable_fp_fusion=False),
    )


@pytest.mark.drawn(16)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel, row", KERNELS, ids=label)
def test_compiles_without_spills_and_with_wide_accesses(kernels, kernel, row, capability, tmp_path):
    module, name = kernel.split(".")
    compiled = compile_for(kernels, kernel, row, capability)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage, sass = (
        subprocess.run([triton.knobs.nvidia.cuobjdump.path, option, binary], capture_output=True, text=True, check=True)
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    registers, stack, shared, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout).groups()
    )
    accesses = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL|ATOM\w*|RED)\b\S*", sass.stdout))
    widths = " ".join(f"{count}x{access}" for access, count in sorted(accesses.items()))
    resources = f"registers {registers:3} local {stack + local} shared {shared:4}"
    print(f"\nsm_{capability} {name:24} {label(row):40} {resources}  {widths}")

    assert stack == local == 0
    assert not any(access.startswith(("LDL", "STL", "ATOM", "RED")) for access in accesses)
    if name in ("image_errors_kernel", "dpo_loss_kernel"):
        return  # a few elements an image
    images = {k: v for k, v in row.items() if isinstance(v, str)}
    outputs = ("grad", "noisy", "target") if module == "noise_pair" else ("grad",)
    reads = sum(size_of(v) for k, v in images.items() if k not in outputs)
    assert accesses["LDG.E.128"] >= reads * 8 // 16  # 8 elements a thread of each at least
    wide_stores = sum(accesses[a] for a in accesses if a.startswith("STG") and "128" in a)
    assert wide_stores >= sum(size_of(images[k]) * 8 // 16 for k in outputs if k in images)
    # all that is not wide is one number a program
    assert sum(n for a, n in accesses.items() if "128" not in a) <= 8


# instructions that approximate, flush subnormal numbers or round a * b + c once, and why they may
ALLOWED = {
    "fma.rn.f64": "in the library's exp and log of float64, in the reported loss",
    "rcp.approx.ftz.f64": "where the library's log of float64 begins; what follows makes it exact to one unit",
    "abs.ftz.f32": "on the upper half of a float64 in the library's exp, to ask how large it is",
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, row", KERNELS, ids=label)
def test_no_float32_is_computed_approximately(kernels, kernel, row, capability):
    """Those of the loss only reach float64; every sum and product is one that no assembler may contract."""
    ptx = compile_for(kernels, kernel, row, capability).asm["ptx"]
    opcodes = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)", ptx, re.MULTILINE))
    inexact = {o for o in opcodes if re.search(r"\.(approx|full|ftz)\b|^fma|^mad\.\w+\.f", o)}
    assert inexact == (set(ALLOWED) if kernel == "dpo_loss.dpo_loss_kernel" else set())
    arithmetic = {o for o in opcodes if re.match(r"(add|sub|mul|div|sqrt|rcp)\..*f\d\d$", o)}
    assert arithmetic and all(".rn." in o for o in arithmetic - set(ALLOWED)), arithmetic


@pytest.mark.parametrize("size", [1, "i32"], ids=["ones", "odd"])
@pytest.mark.parametrize("kernel, row", dict(KERNELS).items(), ids=label)  # each kernel once
def test_compiles_for_odd_sizes_and_for_one_of_everything(kernels, kernel, row, size):
    """Without alignment, in more than one group of channels; and Triton makes constants of arguments that are 1."""
    sizes = dict.fromkeys("pairs elements tiles channels pixels groups rows".split(), size)
    compile_for(kernels, kernel, {**row, **sizes, "FULL": False}, 80, aligned=False)


def size_of(pointer: str) -> int:
    return int(pointer.removeprefix("*bf").removeprefix("*fp")) // 8
