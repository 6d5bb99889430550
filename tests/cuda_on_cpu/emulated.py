"""A build of build.py in the place of the backend `native`: its CUDA kernels compute on tensors of the host."""

import ctypes
import functools
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from dpo_fast.kernels import native
from tests.cuda_on_cpu.build import Variant, build


class Counts(NamedTuple):
    launches: int
    blocks: int
    barriers: int
    exchanges: int  # lanes that took part in shuffles


class Emulated:
    """An extension whose kernels run on the machine of machine.h."""

    def __init__(self, path: Path):
        self.path = path
        self.module = _load(path)
        self._machine = ctypes.CDLL(str(path))
        self._machine.cuda_on_cpu_schedule.argtypes = [ctypes.c_uint64]

    def schedule(self, seed: int) -> None:
        """Draw the order of threads and blocks, and the errors of approximate instructions, anew; 0: in order."""
        self._machine.cuda_on_cpu_schedule(seed)

    def limit_rows(self, rows: int) -> None:
        """Refuse grids of more than `rows` in y or z, where a GPU's limit is 65535."""
        self._machine.cuda_on_cpu_most_rows(rows)

    def counts(self) -> Counts:
        """What has run since the extension was loaded."""
        numbers = (ctypes.c_long * 4)()
        self._machine.cuda_on_cpu_counts(numbers)
        return Counts(*numbers)

    @contextmanager
    def as_native(self, device: int = 0) -> Iterator[None]:
        """Within the block the backend `native` computes on host tensors as on this CUDA device."""

        def place(x: Tensor) -> Any:
            if x.device.type != "cpu":
                raise ValueError(f"backend 'native' computes on cpu and cuda; got tensors on {x.device}")
            return self.module.Place(device, 0, 0)

        with mock.patch.object(native, "_native", self.module), mock.patch.object(native, "_place", place):
            yield


@functools.cache
def emulated(variant: Variant) -> Emulated:
    return Emulated(build(variant))


def _load(path: Path) -> ModuleType:
    name = f"{path.stem}._native"  # pybind11 gives one module a name
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module
