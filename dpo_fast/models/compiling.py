"""torch.compile of a UNet, so that policy and reference agree and nothing is compiled after the first step.

The policy runs with a graph and the reference without one, LoRA's without adapters too: these are several programs of
one block. Inductor keeps in fp32 what an eager UNet rounds between two operators, and where it does so depends on what
it could fuse, so two programs would differ. Compiled blocks therefore round where eager ones do. On a GPU, Inductor
also times several ways to split a reduction and keeps the fastest, which may differ between two programs;
`deterministic` makes it choose by rules instead.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from dpo_fast.errors import BadInput

# A program for each shape, for inputs with and without a gradient; PyTorch's own limit of 8 is below what SD1.5 has.
PROGRAMS_AT_MOST = 64
# Of the programs made with them alone, not of the process.
OPTIONS = {
    "emulate_precision_casts": True,  # round where an eager block does
    "deterministic": True,  # no timing where its outcome would change the order of additions (a GPU's reductions)
}


def compile_unet(unet: UNet2DConditionModel, mode: str) -> None:
    """Compile `unet` in place, at its first call; names of modules and parameters stay what they are.

    "off": not at all. "regional": each transformer block on its own, so that equal blocks share a program. Shapes are
    static. Programs are kept between runs in `programs_folder()`.
    """
    assert mode in ("off", "regional"), mode
    if mode == "off":
        return
    import torch._dynamo  # a second that only compiling is worth

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(programs_folder()))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS_AT_MOST)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, options=OPTIONS)


def check_compiler(device: torch.device) -> None:
    """Raises BadInput where programs for `device` cannot be made."""
    try:
        if device.type == "cuda":
            importlib.import_module("triton")
        else:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except (ImportError, RuntimeError) as error:
        needed = "Triton" if device.type == "cuda" else "a C++ compiler (CXX names it)"
        raise BadInput(f"--compile needs {needed}: install it, or leave --compile off") from error


def programs_folder() -> Path:
    """Where programs are kept: $TORCHINDUCTOR_CACHE_DIR, or dpo_fast-compiled in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_fast-compiled"


def programs_made() -> int:
    """How many graphs this process has compiled so far: it must not grow after the first step."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@contextmanager
def not_compiled() -> Iterator[None]:
    """Within the block compiled modules run as written: for shapes that are rare (samples, held-out pairs)."""
    with torch.compiler.set_stance("force_eager"):
        yield
