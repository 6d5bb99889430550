"""torch.compile for a UNet, such that policy and reference agree and nothing is compiled after the first step.

The policy runs with an autograd graph and the reference without one (with LoRA, also without adapters), so one block
has several programs. Inductor keeps in fp32 what an eager UNet rounds between two operators, and where it does so
depends on what it could fuse, so these programs would differ. Compiled blocks therefore round where eager ones do. On a
GPU, Inductor also times several ways to split a reduction and keeps the fastest, which may differ between programs;
`deterministic` makes it choose by rules instead.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from dpo_fast.errors import BadInput

# One program per shape, for inputs with and without gradients; SD1.5 needs more than PyTorch's default limit of 8.
PROGRAMS_AT_MOST = 64
# These are passed to the compile call, so they apply only to the UNet's programs, not to the process.
OPTIONS = {
    "emulate_precision_casts": True,  # round where an eager block does
    "deterministic": True,  # no autotuning that could change the order of additions (reductions on a GPU)
}
RESNETS = "ResnetBlock2D"
TUNED = "-tuned"
MODES = ("regional", "resnets", "regional-tuned", "resnets-tuned")


def compiles(mode: str) -> bool:
    """Whether a mode compiles anything; "auto" does not, unless a run replaced it by what pays on its machine."""
    assert mode in ("auto", "off", *MODES), mode
    return mode not in ("auto", "off")


def compile_unet(unet: UNet2DConditionModel, mode: str) -> None:
    """Set up `unet`, in place, to be compiled at its first call; module and parameter names do not change.

    "off", "auto": do not compile. "regional": compile each transformer block on its own, so that equal blocks share a
    program. "resnets": also each resnet. "-tuned" behind either: without `deterministic`, so that Inductor may time
    reductions. Shapes are static. Programs are cached between runs in `programs_folder()`.
    """
    if not compiles(mode):
        return
    import torch._dynamo  # takes a second, so only when needed

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(programs_folder()))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS_AT_MOST)
    options = OPTIONS | {"deterministic": not mode.endswith(TUNED)}
    blocks = {*unet._repeated_blocks} | ({RESNETS} if mode.startswith("resnets") else set())
    for module in unet.modules():
        if type(module).__name__ in blocks:
            module.compile(fullgraph=True, dynamic=False, options=options)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restore after the block what `compile_unet` changes in the process."""
    variable, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    limit = sys.modules["torch._dynamo"].config.recompile_limit if "torch._dynamo" in sys.modules else None
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        if limit is not None:
            sys.modules["torch._dynamo"].config.recompile_limit = limit


def check_compiler(device: torch.device) -> None:
    """Raise BadInput if programs for `device` cannot be compiled here."""
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
    """The cache of programs: $TORCHINDUCTOR_CACHE_DIR, or dpo_fast-compiled in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_fast-compiled"


def programs_made() -> int:
    """Return how many graphs this process has compiled so far, which must not grow after the first step."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled modules eagerly within the block, for rare shapes (samples, held-out pairs)."""
    with torch.compiler.set_stance("force_eager"):
        yield
