"""The reference's errors on disk: two fp32 values per pair and draw, in blocks of neighbouring rows of the source.

A record is a block of up to 256 rows at one draw: errors [256, 2], in the order of the source's two image columns, so
that they stay valid when labels change; rows that were not wanted are NaN. Its key is a hash of the draw and of every
wanted row's id, images and caption, so changed data or further draws simply add entries.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_fast.caching.recipe import caption_key
from dpo_fast.checksums import Damaged
from dpo_fast.data.images import BadImage, Keys
from dpo_fast.store import KEY_BYTES, Field, Store

BLOCK = 256  # rows
FIELDS = (Field("errors", (BLOCK, 2), "float32"),)


class ScoredPair(NamedTuple):
    """The parts of a source row that its errors depend on."""

    row: int
    images: Keys
    caption: str
    chosen: int  # index of the image that is chosen now, 0 or 1


class Unit(NamedTuple):
    """One record: a block at a draw."""

    block: int  # holds the rows [block * BLOCK, (block + 1) * BLOCK)
    draw: int
    key: bytes


class ErrorBlocks:
    """The records that some pairs need."""

    def __init__(
        self,
        rows: Sequence[int],  # ascending
        pair_of: Callable[[int], ScoredPair],
        draws: int,
        *,
        by_chosen: bool = False,  # errors depend on which image is chosen, as real time ids of equal areas do
    ):
        self.draws, self.pair_of = draws, pair_of
        self.rows: dict[int, list[int]] = {}
        for row in rows:
            self.rows.setdefault(row // BLOCK, []).append(row)
        self.units: list[Unit] = []
        digests = {block: self._digest(some, by_chosen) for block, some in self.rows.items()}
        for draw in range(draws):
            for block, digest in digests.items():
                key = blake2b(draw.to_bytes(8, "little") + digest, digest_size=KEY_BYTES, person=b"errors").digest()
                self.units.append(Unit(block, draw, key))

    def __len__(self) -> int:
        """Pairs times draws."""
        return self.draws * sum(map(len, self.rows.values()))

    def _digest(self, rows: Sequence[int], by_chosen: bool) -> bytes:
        whole = blake2b(digest_size=32)
        for row in rows:
            pair = self.pair_of(row)
            whole.update(row.to_bytes(8, "little"))
            for image in pair.images:
                whole.update(bytes(KEY_BYTES) if isinstance(image, BadImage) else image)
            whole.update(caption_key(pair.caption))
            if by_chosen:
                whole.update(bytes([pair.chosen]))
        return whole.digest()


class RefErrors:
    """The errors of pairs for training, memory-mapped. Safe to read from several threads."""

    def __init__(self, store: Store, blocks: ErrorBlocks):
        """Find and check every record. Raises KeyError where one is missing and BadInput where one is damaged."""
        self._store, self.draws = store, blocks.draws
        found = store.find([unit.key for unit in blocks.units])
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        for unit, shard, row in zip(blocks.units, found.shard.tolist(), found.row.tolist(), strict=True):
            if shard < 0:
                raise KeyError(f"{store.folder} has no entry {unit.key.hex()}")
            store.record(shard, row)
            self._places[unit.block, unit.draw] = shard, row
        made = {json.dumps(store.meta(*place)): None for place in self._places.values()}
        self.made_by: list[dict[str, str]] = [json.loads(text) for text in made]  # their distinct numerics

    @property
    def folder(self) -> Path:
        return self._store.folder

    def read(self, pair_id: Tensor, draw: Tensor, chosen: Sequence[int]) -> Tensor:
        """Read fp32 [2B], chosen images first, for pairs int64 [B] at draws int64 [B]. Raises BadInput for damage."""
        errors = np.empty((2, len(chosen)), np.float32)
        for i, (row, k, side) in enumerate(zip(pair_id.tolist(), draw.tolist(), chosen, strict=True)):
            record = self._store.record(*self._places[row // BLOCK, k]).view(np.float32).reshape(BLOCK, 2)
            errors[:, i] = record[row % BLOCK, [side, 1 - side]]
        if not (errors >= 0).all() or np.isinf(errors).any():  # NaN fails >= 0 too
            row = int(pair_id[int(np.argmin(((errors >= 0) & np.isfinite(errors)).all(0)))])
            raise Damaged(
                f"{self.folder} holds an impossible error (negative or not finite) for row {row}: delete the folder,"
                " and `python -m dpo_fast.cache reference` or the next run computes it again"
            )
        return torch.from_numpy(errors.reshape(-1))
