"""Limit the memory that decoding takes at once: every decoder acquires its share of a semaphore before it starts."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

IN_FLIGHT = 1 << 30  # bytes: the sum of the peaks of all images being decoded at once
UNIT = 1 << 22  # bytes per unit of the semaphore
LARGE = 1 << 26  # bytes: from this size on, freed memory is returned to the system


def _trimming() -> Any:
    """Return glibc's malloc_trim, or a function that does nothing on other systems.

    PIL's blocks are too small for glibc to return to the system by itself: memory that a thread frees stays with it.
    """
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return lambda padding: 0


_trim = _trimming()


class Budget:
    """Shares of `IN_FLIGHT`, granted to threads or processes in the order in which they ask.

    A killed process never releases its share, so a loader makes a budget for its own workers, which ends with them.
    """

    def __init__(self, semaphore: Any, lock: Any) -> None:
        self._free = semaphore
        self._turn = lock  # one acquires at a time: two that each had half of what they need would deadlock

    @classmethod
    def of_threads(cls) -> "Budget":
        return cls(threading.Semaphore(IN_FLIGHT // UNIT), threading.Lock())

    @classmethod
    def of_processes(cls, context: Any) -> "Budget":
        """Make a budget for processes that `context`, of multiprocessing, starts."""
        return cls(context.Semaphore(IN_FLIGHT // UNIT), context.Lock())

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Hold a share of `size` bytes, at most IN_FLIGHT, during the `with` block."""
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
