"""A kernel of PTX, launched on the machine of machine.h."""

import ctypes
import functools

from tests.cuda_on_cpu import ptx
from tests.cuda_on_cpu.build import build_ptx


@functools.cache
def library(text: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build_ptx(text)))
    loaded.cuda_on_cpu_schedule.argtypes = [ctypes.c_uint64]
    return loaded


def launch(
    text: str,
    name: str,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    parameters: list[bytes],
    schedule: int = 1,
) -> None:
    """Run one launch. `parameters` are the kernel's own in their order, as bytes; pointers are addresses of the host.

    Args:
        text: PTX, as nvcc or Triton make it.
        name: of the kernel in it.
        threads: of a block, in x.
        shared_bytes: of shared memory beside what the kernel declares.
        schedule: draws the order of threads and blocks and the errors of approximate instructions; 0: in order.

    Raises:
        ptx.Unknown: The translator does not know an instruction.
        RuntimeError: The launch failed; the message says where.
    """
    loaded = library(text)
    loaded.cuda_on_cpu_schedule(schedule)
    values = [ctypes.create_string_buffer(value, len(value)) for value in parameters]
    addresses = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
    message = ctypes.create_string_buffer(500)
    failed = loaded.cuda_on_cpu_launch(
        ptx.plain_name(name).encode(), (ctypes.c_uint * 3)(*grid), threads, shared_bytes, addresses, message, 500
    )
    if failed:
        raise RuntimeError(message.value.decode())
