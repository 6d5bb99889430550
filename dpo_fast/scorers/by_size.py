"""Group images of many sizes into batches of one size each."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

WAITING = 4  # at most this many batches' worth of images wait for others of their size
BYTES = 1 << 29  # and at most this many bytes of them


def batches_by_size(items: Iterable[T], size_of: Callable[[T], torch.Size], batch_size: int) -> Iterator[list[T]]:
    """Yield every item once, in batches of one size and at most `batch_size` items, which depend on their order alone.

    An item is an image of shape `size_of(item)`, one byte per element. A batch is smaller if no more items of its size
    follow. When more than WAITING batches' worth of items or BYTES are held, the oldest batch is yielded before it is
    full (not the largest: among many rare sizes, a frequent one would then never fill a batch).
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
