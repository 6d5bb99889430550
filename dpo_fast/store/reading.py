"""Find the records of a store by key, and check them when they are read."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dpo_fast.checksums import Damaged
from dpo_fast.files import write_json
from dpo_fast.store.recipe import KEY_BYTES, Recipe
from dpo_fast.store.shards import Shard, check_recipe, read_shard, shard_indices


class Found(NamedTuple):
    """The shard and row of the record of each key; -1 for a key without a record."""

    shard: np.ndarray  # int64 [n]
    row: np.ndarray  # int64 [n]


class Store:
    """The records of one recipe on disk now. Raises BadInput for the folder of another recipe or a damaged shard."""

    def __init__(self, root: Path, recipe: Recipe):
        self.folder, self.recipe = Path(root) / recipe.folder_name, recipe
        self.shards: list[Shard] = []
        if self.folder.is_dir():
            check_recipe(self.folder, recipe)
            self.shards = [read_shard(path, recipe) for path in shard_indices(self.folder)]
        keys = np.concatenate([shard.key_bytes for shard in self.shards] or [np.zeros((0, KEY_BYTES), np.uint8)])
        heads = _heads(keys)
        order = np.argsort(heads, kind="stable")
        self._heads, self._keys = heads[order], keys[order]
        counts = [len(shard.key_bytes) for shard in self.shards]
        self._shard = np.repeat(np.arange(len(counts)), counts)[order]
        self._row = np.concatenate([np.arange(n) for n in counts] or [np.zeros(0, np.int64)])[order]

    def __len__(self) -> int:
        return len(self._heads)

    def find(self, keys: Sequence[bytes]) -> Found:
        """Locate the records of `keys`, each KEY_BYTES long."""
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        heads = _heads(wanted)
        shard, row = np.full(len(wanted), -1), np.full(len(wanted), -1)
        first, last = np.searchsorted(self._heads, heads), np.searchsorted(self._heads, heads, "right")
        for i in range(len(wanted)):
            for place in range(first[i], last[i]):  # more than one only if the first 64 bits of two keys agree
                if (self._keys[place] == wanted[i]).all():
                    shard[i], row[i] = self._shard[place], self._row[place]
        return Found(shard, row)

    def keys(self) -> set[bytes]:
        """The keys of all records."""
        return {key for shard in self.shards for key in shard.keys}

    def record(self, shard: int, row: int) -> np.ndarray:
        """Return a record, uint8 [record_bytes]. Raises Damaged if its checksum differs."""
        held = self.shards[shard]
        record = held.records[row]
        if xxhash.xxh3_64_intdigest(record) != held.checksums[row]:
            raise Damaged(
                f"{held.path}: record {row} is damaged (its checksum differs):"
                f" {self.recipe.remedies.damaged.replace('{root}', str(held.path.parents[1]))}"
            )
        return record

    def meta(self, shard: int, row: int) -> Any:
        return self.shards[shard].meta[row]

    def touch(self) -> None:
        """Update the time of last use, for `prune`; a read-only cache is left as it is."""
        path = self.folder / "recipe.json"
        with suppress(OSError):
            if path.exists():
                os.utime(path)
            elif self.shards:  # `verify --remove` deleted it
                write_json(path, self.recipe.as_json())


def _heads(keys: np.ndarray) -> np.ndarray:
    """The first 64 bits of keys, uint64 [n]."""
    return keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)
