"""Images of many sizes into batches of one size each."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

WAITING = 4  # batches: how many images wait for others of their size, at most
BYTES = 1 << 29  # of the images that wait, at most


def batches_by_size(items: Iterable[T], size_of: Callable[[T], torch.Size], batch_size: int) -> Iterator[list[T]]:
    """Every item once, in batches of at most `batch_size` items of one size, which follow from the items' order alone.

    An item is an image of `size_of` bytes. A batch is smaller where there are no more of its size. When more than
    WAITING batches or BYTES are held, the oldest batch is yielded as it is (the largest would not do: among many rare
    sizes a frequent one would never fill a batch).
    """
    waiting: dict[torch.Size, list[T]] = {}
    held = held_bytes = 0

    def take(size: torch.Size) -> list[T]:
        nonlocal held, held_bytes
        batch = waiting.pop(size)
        held -= len(batch)
        held_bytes -= len(batch) * size.numel()
        return batch

    for item in items:
        size = size_of(item)
        waiting.setdefault(size, []).append(item)
        held += 1
        held_bytes += size.numel()
        if len(waiting[size]) >= batch_size:
            yield take(size)
        while held > WAITING * batch_size or held_bytes > BYTES:
            yield take(next(iter(waiting)))
    yield from waiting.values()
