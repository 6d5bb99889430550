"""Compute values in threads before they are needed: in order, with few waiting."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

BYTES_AHEAD = 1 << 29  # limit for values whose size is known, such as decoded images


class Sized(NamedTuple):
    """A plan whose value takes this many bytes."""

    plan: Callable[[], Any]
    bytes: int


def ahead(pool: ThreadPoolExecutor, plans: Iterable["T | Callable[[], T] | Sized"], depth: int) -> Iterator[T]:
    """Yield the plans' values in order; plans that are functions run in the pool, up to `depth` before they are needed.

    Fewer run ahead if they are `Sized` and together exceed `BYTES_AHEAD`.
    """
    pending: deque[tuple[Callable[[], T], int]] = deque()
    held = 0

    def take() -> T:
        nonlocal held
        value, size = pending.popleft()
        held -= size
        return value()

    for plan in plans:
        plan, size = plan if isinstance(plan, Sized) else (plan, 0)
        while pending and held + size > BYTES_AHEAD:
            yield take()
        pending.append((pool.submit(plan).result if callable(plan) else lambda value=plan: value, size))
        held += size
        if len(pending) > depth:
            yield take()
    while pending:
        yield take()


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an endless iterator, making the next one in a thread while the current one is used."""
    pool = ThreadPoolExecutor(1)
    try:
        pending = pool.submit(next, items)
        while True:
            item = pending.result()
            pending = pool.submit(next, items)
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def groups(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
