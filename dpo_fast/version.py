"""What `--version` prints: the version, and what this installation was built from and runs on."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dpo_fast import __version__


def version_line() -> str:
    """Return the versions of dpo_fast, Python and PyTorch, and what the kernels were compiled for, in one line."""
    try:
        kernels = compiled_for(import_module("dpo_fast._native"))
    except ImportError:
        kernels = "none"
    python, torch = platform.python_version(), version_of("torch")
    return f"dpo_fast {__version__} (Python {python}, torch {torch}, native kernels: {kernels})"


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def compiled_for(native: Any) -> str:
    """Describe in a few words what the extension dpo_fast._native was compiled for."""
    if not native.cuda_cubins:
        return "C++"
    archs = ", ".join(f"sm_{arch}" for arch in native.cuda_cubins.split(","))
    return f"C++ and CUDA for {archs}, and PTX of compute_{native.cuda_ptx}"
