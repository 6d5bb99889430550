"""A stand-in for Triton's CUDA driver on a machine without a GPU: it hands each launch to a Python function as PTX.

Triton's own runtime does everything up to the launch, as it does in front of an H100: it specialises a kernel on its
arguments, compiles it for sm_90 and assembles the result. Only then comes the stand-in: instead of loading the binary
it passes on the PTX and the bytes of each parameter. Tensors lie in the CPU's memory and pointers are addresses there.
"""

import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from dpo_fast.kernels import dispatch

# ptx, kernel_name, grid, threads, shared_bytes, parameters: little-endian bytes of each, in the order of the PTX
Launch = Callable[[str, str, tuple[int, int, int], int, int, list[bytes]], None]

BACKEND = "dpo_fast.kernels.triton"
TRITON = Path(__file__).parents[2] / "dpo_fast" / "kernels" / "triton"
OPS = tuple(sorted(file.stem for file in TRITON.glob("*.py") if file.stem not in ("__init__", "common", "arithmetic")))
TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10  # that a block of an H100 can have
NULL = bytes(8)  # an address
_CODES = dict(i1="b", i8="b", i16="h", i32="i", i64="q", u1="B", u8="B", u16="H", u32="I", u64="Q", fp32="f", fp64="d")


def parameter_sizes(ptx: str, kernel_name: str) -> list[int]:
    """The bytes of each parameter that a kernel's entry in the PTX declares."""
    entry = re.search(rf"\.entry {re.escape(kernel_name)}\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError(f"the PTX has no entry {kernel_name}")
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry.group(1))]


def packed(kind: str, value: Any) -> bytes:
    """An argument as a kernel reads it; `kind` is its type in Triton's signature, as *bf16, i32 or fp32.

    Raises ValueError for a type that has no such representation here.
    """
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr() if isinstance(value, Tensor) else value)
    if kind not in _CODES:
        raise ValueError(f"an argument of type {kind} is not supported; add it to _CODES")
    return struct.pack(f"<{_CODES[kind]}", value)


class Launcher:
    """Called by Triton's runtime, once for each launch; made for one compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature, self.metadata = src.signature, metadata

    def __call__(self, x, y, z, stream, kernel, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        kinds = self.signature.values()
        parameters = [packed(k, v) for k, v in zip(kinds, arguments, strict=True) if k != "constexpr"]
        sizes = parameter_sizes(kernel.ptx, kernel.name)
        # behind the kernel's own are addresses of scratch memory, which none of ours has
        parameters += [NULL] * (len(sizes) - len(parameters))
        if needed := self.metadata.global_scratch_size or self.metadata.profile_scratch_size:
            raise ValueError(f"{kernel.name} needs {needed} bytes of scratch memory, which this driver does not give")
        if [len(parameter) for parameter in parameters] != sizes:
            raise ValueError(f"{kernel.name} takes parameters of {sizes} bytes; its signature is {self.signature}")
        threads = TARGET.warp_size * self.metadata.num_warps
        launch = triton.runtime.driver.active.launch
        launch(kernel.ptx, kernel.name, (x, y, z), threads, self.metadata.shared, parameters)


class PTXDriver:
    """What Triton's runtime asks of a driver, for launches by `launch`."""

    launcher_cls = Launcher

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
            # no module, or Triton would unload it, perhaps when this driver is gone; 1024: most threads of a block
            load_binary=lambda name, binary, shared, device: (None, SimpleNamespace(name=name), 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> str:
        return "ptx"  # Triton keeps compiled kernels by device: not among those of a GPU

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def keep_ptx(module, kernel, name: str, files: dict[str, str], key: str) -> None:
        """Triton's hook behind load_binary, which is not told where the PTX is."""
        kernel.ptx = Path(files[f"{name}.ptx"]).read_text()


@contextmanager
def triton_on_ptx(launch: Launch) -> Iterator[SimpleNamespace]:
    """Inside, backend="triton" takes CPU tensors and `launch` runs its kernels; gives the backend's modules by name.

    They are imported anew, without a GPU and without the interpreter; all is as before afterwards. Launches wait:
    one is over when `launch` returns. Raises RuntimeError where Triton interprets.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets in this process, so it compiles nothing; unset TRITON_INTERPRET")
    parent = import_module("dpo_fast.kernels")
    driver = PTXDriver(launch)

    def forget() -> dict[str, ModuleType]:
        """Take the backend's modules out of Python's list of what is imported."""
        vars(parent).pop("triton", None)
        return {name: sys.modules.pop(name) for name in list(sys.modules) if f"{name}.".startswith(f"{BACKEND}.")}

    def remember(modules: dict[str, ModuleType]) -> None:
        forget()
        sys.modules.update(modules)
        if BACKEND in modules:
            vars(parent)["triton"] = modules[BACKEND]
        dispatch._reason_against.cache_clear()

    with ExitStack() as stack:
        stack.callback(remember, forget())
        dispatch._reason_against.cache_clear()
        with mock.patch("torch.cuda.is_available", return_value=True):  # or the backend refuses to be imported
            common, *modules = (import_module(f"{BACKEND}.{name}") for name in ("common", *OPS))
            assert not dispatch._reason_against("triton", "cpu")

        def launching_for(*tensors: Tensor | None) -> AbstractContextManager:
            with mock.patch.object(common, "INTERPRET", True):  # then it takes tensors of a CPU
                return launching_as_usual(*tensors)

        launching_as_usual = common.launching_for
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launching_for", launching_for))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active"))  # there is no way to ask for it
        triton.runtime.driver.set_active(driver)
        triton.knobs.runtime.kernel_load_end_hook.add(driver.keep_ptx)
        stack.callback(triton.knobs.runtime.kernel_load_end_hook.remove, driver.keep_ptx)
        yield SimpleNamespace(**dict(zip(OPS, modules, strict=True)))
