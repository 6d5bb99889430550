"""Images of many sizes into batches of one size each."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

WAITING = 4  # batches: how many images wait for others of their size, at most


def batches_by_size(items: Iterable[T], size_of: Callable[[T], torch.Size], batch_size: int) -> Iterator[list[T]]:
    """Every item once, in batches of at most `batch_size` items of one size, which follow from the items' order alone.

    A batch is smaller where there are no more of its size, and where so many wait that the oldest must do as it is (the
    largest would not: among many rare sizes a frequent one would never fill a batch).
    """
    waiting: dict[torch.Size, list[T]] = {}
    held = 0
    for item in items:
        size = size_of(item)
        waiting.setdefault(size, []).append(item)
        held += 1
        if len(waiting[size]) < batch_size:
            if held <= WAITING * batch_size:
                continue
            size = next(iter(waiting))
        batch = waiting.pop(size)
        held -= len(batch)
        yield batch
    yield from waiting.values()
