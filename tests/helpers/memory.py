"""Memory that shows what a kernel leaves unwritten."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block, memory that PyTorch allocates holds nan, so unwritten outputs are visible."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
