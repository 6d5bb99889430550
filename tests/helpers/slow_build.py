"""The cache's command with small shards, in processes that start at once, for being killed."""

import multiprocessing
import os
import sys
from contextlib import suppress
from pathlib import Path

from dpo_fast import cache
from dpo_fast.caching import build
from dpo_fast.store import writing


def started(shard_bytes: int, argv: list[object]) -> multiprocessing.Process:
    """A process of the command with `argv`; its imports were done before by one that it is forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dpo_fast.caching.score_reference", "diffusers", "transformers", "tests.helpers.slow_build"]
    )
    process = context.Process(target=_build, args=(shard_bytes, [str(word) for word in argv]))
    process.start()
    return process


def written(cache: Path, pattern: str = "*") -> int:
    """Bytes of the files in `cache` that match."""
    total = 0
    for path in cache.rglob(pattern):
        with suppress(FileNotFoundError):  # deleted or renamed since it was listed
            total += path.stat().st_size
    return total


def _build(shard_bytes: int, argv: list[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    writing.SHARD_BYTES = shard_bytes
    build.PART_ROWS = 3
    sys.exit(cache.main(argv))
