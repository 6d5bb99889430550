"""Fixtures for the tests of the kernels."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from dpo_fast.kernels.dispatch import usable_backends
from tests.cuda_on_cpu.build import Variant, reason_against
from tests.helpers.memory import poisoned_memory

ROUTES = {"cuda_source": "source", "cuda_ptx": "ptx"}  # csrc/cuda on the CPU: tests/cuda_on_cpu


def _places() -> Iterator:
    """Each backend that can be used here with each device it computes on; on a GPU marked gpu."""
    usable = [name for name, reason in usable_backends().items() if not reason]
    interpreting = "triton" in usable and import_module("triton").knobs.runtime.interpret
    for name in usable:
        if name != "triton" or interpreting:
            yield pytest.param((name, "cpu"), id=name)
    for name in usable if torch.cuda.is_available() and not interpreting else ():
        if name != "native" or not import_module("dpo_fast.kernels.native").reason_against("cuda"):
            yield pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu)
    for name, route in ROUTES.items() if "native" in usable else ():
        reason = reason_against(route)
        marks = [pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}")]
        if route == "ptx":  # the same source: what nvcc makes of it is a longer look
            marks.append(pytest.mark.exhaustive)
        yield pytest.param(("native", route), id=name, marks=marks)


@pytest.fixture(params=_places())
def backend(request: pytest.FixtureRequest, seed: int) -> Iterator[str]:
    """A backend's name; new tensors lie where it computes."""
    name, device = request.param
    if device in ROUTES.values():
        from tests.cuda_on_cpu.emulated import emulated  # which needs the extension

        gpu = emulated(Variant(device, sanitized=os.environ.get("CUDA_ON_CPU_SANITIZED") == "1"))
        gpu.schedule(seed + 1)  # 0 is no order at random
        with gpu.as_native():
            yield name
    else:
        with nullcontext() if device == "cpu" else torch.device(device):
            yield name


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Outputs that a kernel does not write hold nan."""
    with poisoned_memory():
        yield
