"""The only place that chooses who computes an op.

In order: an argument other than "auto", the context manager `backend`, the variable DPO_FAST_BACKEND, then by device. A
backend is a module that gives `<op>_fwd` and `<op>_bwd` on plain tensors and raises ImportError, with the remedy in its
message, where it cannot be used; one that can be used on some devices only has `reason_against(device_type)` too. What
was asked for and is not available raises; only "auto" falls back.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

VARIABLE = "DPO_FAST_BACKEND"

_HOME = {
    "reference": "dpo_fast.kernels.reference",
    "triton": "dpo_fast.kernels.triton",  # a package: one module an op
    "native": "dpo_fast.kernels.native",
}
# What auto tries on a device before the reference. Triton joins for "cuda" when its tests have passed on a GPU.
_PREFERRED = {"cpu": ("native",)}

_override: str | None = None  # of the process, not of the thread: autograd runs CUDA backwards in threads of its own


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use the backend `name` for the calls inside, forward and backward, that name none themselves. Not for threads."""
    global _override
    _check_name(name, "backend")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def usable_backends(device: str = "cpu") -> dict[str, str]:
    """Each backend's name with "" where it can be used on this type of device, else the reason why it cannot."""
    return {name: _reason_against(name, device) for name in _HOME}


def module_for(op: str, name: str, *tensors: Tensor | None) -> ModuleType:
    """The module that computes `op` on these tensors. `name` is the call's own backend argument.

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot be used here.
    """
    name, source = _requested(name)
    device = next(x.device.type for x in tensors if x is not None)
    if name == "auto":
        # float64 is for checking gradients, and only the reference knows it
        double = any(x is not None and x.dtype == torch.float64 for x in tensors)
        candidates = () if double else _PREFERRED.get(device, ())
        name = next((candidate for candidate in candidates if not _reason_against(candidate, device)), "reference")
    elif reason := _reason_against(name, device):
        usable = ", ".join(known for known in _HOME if not _reason_against(known, device))
        raise RuntimeError(f"{source} {name!r} cannot be used here ({reason}); choose auto, {usable}")
    _announce(name, device)
    return import_module(f"{_HOME[name]}.{op}" if name == "triton" else _HOME[name])


def _requested(name: str) -> tuple[str, str]:
    """The first name that was asked for, and where."""
    source = "backend"
    if name == "auto" and _override is not None:
        name = _override
    elif name == "auto" and os.environ.get(VARIABLE):
        name, source = os.environ[VARIABLE], VARIABLE
    _check_name(name, source)
    return name, source


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in _HOME:
        raise ValueError(f"{source} {name!r} is unknown; choose auto, {', '.join(_HOME)}")


@functools.cache
def _reason_against(name: str, device: str) -> str:
    try:
        module = import_module(_HOME[name])
    except ModuleNotFoundError as error:
        return "not in this installation of dpo_fast" if error.name == _HOME[name] else str(error)
    except ImportError as error:
        return str(error)
    return module.reason_against(device) if hasattr(module, "reason_against") else ""


@functools.cache  # so that it says it once
def _announce(name: str, device: str) -> None:
    logging.getLogger("dpo_fast").info("kernels on %s: %s", device, name)
