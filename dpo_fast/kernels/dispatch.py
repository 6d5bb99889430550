"""Choose the backend that computes an op; no other module does.

The choice follows, in order: a `backend` argument other than "auto", the context manager `backend`, the environment
variable DPO_FAST_BACKEND, the device. A backend is a module that has `<op>_fwd` and `<op>_bwd` on plain tensors and
raises ImportError, with the remedy in its message, where it cannot be used; one that works on some devices only also
has `reason_against(device_type)`. Requesting a backend that is not available raises; only "auto" falls back.
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
    "triton": "dpo_fast.kernels.triton",  # a package: one module per op
    "native": "dpo_fast.kernels.native",
}
# What auto tries on a device before the reference. Triton is to be added for "cuda" once its tests pass on a GPU.
_PREFERRED = {"cpu": ("native",)}

_override: str | None = None  # per process, not per thread: autograd runs CUDA backward passes in its own threads


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use the backend `name` for the calls in this block, forward and backward, that do not name one themselves.

    Not thread-safe. Raises ValueError for an unknown name.
    """
    global _override
    _check_name(name, "backend")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def usable_backends(device: str = "cpu") -> dict[str, str]:
    """Return each backend's name with "" if it can be used on this type of device, else with the reason why not."""
    return {name: _reason_against(name, device) for name in _HOME}


def module_for(op: str, name: str, *tensors: Tensor | None) -> ModuleType:
    """Return the module that computes `op` on these tensors. `name` is the call's own backend argument.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot be used here.
    """
    device = next(x.device.type for x in tensors if x is not None)
    # float64 is for checking gradients, and only the reference supports it
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    name = name_for(name, device, double=double)
    _announce(name, device)
    return import_module(f"{_HOME[name]}.{op}" if name == "triton" else _HOME[name])


def name_for(name: str, device: str, *, double: bool = False) -> str:
    """Return the backend that computes on this type of device, tensors with or without float64. Raises as above."""
    name, source = _requested(name)
    if name == "auto":
        candidates = () if double else _PREFERRED.get(device, ())
        return next((candidate for candidate in candidates if not _reason_against(candidate, device)), "reference")
    if reason := _reason_against(name, device):
        usable = ", ".join(known for known in _HOME if not _reason_against(known, device))
        raise RuntimeError(f"{source} {name!r} cannot be used here ({reason}); choose auto, {usable}")
    return name


def _requested(name: str) -> tuple[str, str]:
    """Return the requested name that takes precedence, and where it was requested."""
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


@functools.cache  # so that each choice is logged once
def _announce(name: str, device: str) -> None:
    logging.getLogger("dpo_fast").info("kernels on %s: %s", device, name)
