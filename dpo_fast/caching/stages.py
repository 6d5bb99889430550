"""Stages of work on a cache folder that all ranks perform together, and the folder's disk errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_fast.caching.recipe import remedies
from dpo_fast.errors import FORBIDDEN, BadInput, disk_error, remedy
from dpo_fast.parallel import Ranks
from dpo_fast.store import not_writable


def stage_on_all_ranks(ranks: Ranks, stage: Callable[[], None], root: Path) -> None:
    """Run a stage on every rank; if it fails on one rank, it fails on all. Disk errors are raised as BadInput."""

    def run() -> None:
        with disk_errors_as_bad_input(root):
            stage()

    ranks.on_all(run)


@contextmanager
def disk_errors_as_bad_input(root: Path) -> Iterator[None]:
    """Raise BadInput for the errors of a disk that is full, failing or not writable."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput) or (found := disk_error(error)) is None:
            raise
        if found.errno in FORBIDDEN:
            raise not_writable(root, found, remedies()) from error
        where = f" at {found.filename}" if found.filename else ""
        raise BadInput(
            f"the cache folder {root} could not be written or read ({found.strerror}{where}): what was encoded is kept;"
            f" {remedy(found)}, then start the same command again, it goes on from there"
        ) from error
