"""How much memory decoding may take at once: a semaphore that every decoder takes its share of before it starts."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

IN_FLIGHT = 1 << 30  # bytes of the peaks of all images that are being decoded at once
UNIT = 1 << 22  # bytes: what is counted by
LARGE = 1 << 26  # bytes from which on freed memory is given back


def _trimming() -> Any:
    """glibc's malloc_trim; elsewhere something that does nothing.

    PIL's blocks are too small for glibc to give back by itself: what each thread has freed stays with that thread.
    """
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return lambda padding: 0


_trim = _trimming()


class Budget:
    """Shares of `IN_FLIGHT`, given in the order in which they are asked for, to threads or to processes.

    A process that is killed keeps its share: a loader makes a budget for its own workers, and ends with them.
    """

    def __init__(self, semaphore: Any, lock: Any) -> None:
        self._free = semaphore
        self._turn = lock  # one at a time gathers: two that had half of what they need would wait for each other

    @classmethod
    def of_threads(cls) -> "Budget":
        return cls(threading.Semaphore(IN_FLIGHT // UNIT), threading.Lock())

    @classmethod
    def of_processes(cls, context: Any) -> "Budget":
        """context: of multiprocessing, that starts the processes which are given the budget."""
        return cls(context.Semaphore(IN_FLIGHT // UNIT), context.Lock())

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """A share of `size` bytes, at most IN_FLIGHT, for the block."""
        assert size <= IN_FLIGHT
        units = -(-size // UNIT)
        taken = 0
        try:
            with self._turn:
                while taken < units:
                    self._free.acquire()
                    taken += 1
            yield
        finally:
            if size >= LARGE:
                _trim(0)
            for _ in range(taken):
                self._free.release()
