"""Make batches from the cache: each record is found by the key of its image or caption, checked, and copied once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo_fast.caching.recipe import caption_key, mirrored
from dpo_fast.caching.ref_errors import RefErrors
from dpo_fast.data.batch import Batch, EncodedPair, PairTransform
from dpo_fast.data.images import SAME, BadImage
from dpo_fast.store import Recipe, Store


class CachedItems:
    """Records of one recipe as tensors. Safe to read from several threads."""

    def __init__(self, store: Store):
        self._store = store
        self._dtypes = {field.name: np.dtype(field.dtype) for field in store.recipe.fields}
        self._parts, end = [], 0
        for field in store.recipe.fields:
            self._parts.append((field.name, end, end + field.nbytes))
            end += field.nbytes

    @property
    def recipe(self) -> Recipe:
        return self._store.recipe

    @property
    def folder(self) -> Path:
        return self._store.folder

    def meta(self, keys: Sequence[bytes]) -> list:
        """The meta stored with each record."""
        found = self._store.find(keys)
        return [self._store.meta(shard, row) for shard, row in zip(found.shard, found.row, strict=True)]

    def read(self, keys: Sequence[bytes | None]) -> dict[str, Tensor]:
        """Read the records of `keys`: a tensor [n, ...] per field of the recipe. A None key gives zeros.

        Raises KeyError for a missing key and BadInput for a damaged record.
        """
        out = {
            field.name: torch.empty((len(keys), *field.shape), dtype=getattr(torch, field.dtype))
            for field in self.recipe.fields
        }
        rows = {name: tensor.view(len(keys), -1).numpy().view(np.uint8) for name, tensor in out.items()}
        there = [key for key in keys if key is not None]
        found = iter(zip(*self._store.find(there), strict=True))
        for i, key in enumerate(keys):
            if key is None:
                for part in rows.values():
                    part[i] = 0
                continue
            shard, row = next(found)
            if shard < 0:
                raise KeyError(f"{self._store.folder} has no entry {key.hex()}")
            record = self._store.record(shard, row)
            for name, start, end in self._parts:
                rows[name][i] = record[start:end]
        return out


class CachedTransform:
    """The counterpart of `PairTransform` for cached pairs, whose images are keys.

    With the reference's `errors` at K draws, visit v of a pair uses draw v mod K for everything that is drawn.
    """

    in_threads = True

    def __init__(
        self, transform: PairTransform, latents: CachedItems, text: CachedItems, errors: RefErrors | None = None
    ):
        self.draws, self.latents, self.text, self.errors = transform, latents, text, errors
        assert not transform.random_crop, "only the centre is cached"

    @property
    def seed(self) -> int:
        return self.draws.seed

    def batch(self, pair_id: Tensor, draw: Tensor, pairs: Sequence[EncodedPair]) -> Batch:
        """Make a micro-batch, given ids and draws (int64 [B] both). A pair with a bad image gets zeros and weight 0."""
        if self.errors is not None:
            draw = draw % self.errors.draws
        drawn = self.draws.drawn(pair_id, draw)
        sides: tuple[list, list] = ([], [])
        time_ids, bad = [], []
        for pair, mirror in zip(pairs, drawn.mirrored, strict=True):
            keys, conditions, fault = self._look_up(pair, mirror)
            bad.append(fault)
            time_ids.append(self.draws.fixed_time_ids if fault else self.draws.time_ids_of(conditions))
            for side, key in zip(sides, keys, strict=True):
                side.append(None if fault else key)
        ids = pair_id.tolist()
        conditioning = self.text.read([caption_key(pair.caption) for pair in pairs])
        chosen = [pair.chosen for pair in pairs]
        return Batch(
            pixels=None,
            captions=[pair.caption for pair in pairs],
            dropped=torch.tensor(drawn.dropped, dtype=torch.bool),
            pair_id=pair_id,
            draw=draw,
            timesteps=torch.tensor(drawn.timesteps, dtype=torch.int64),
            label=torch.tensor([pair.label for pair in pairs], dtype=torch.float32),
            weight=torch.tensor([0.0 if fault else 1.0 for fault in bad], dtype=torch.float32),
            time_ids=torch.tensor(time_ids, dtype=torch.float32),
            bad=[(row, fault) for row, fault in zip(ids, bad, strict=True) if fault],
            latents=self.latents.read([*sides[0], *sides[1]])["latents"],
            conditioning=conditioning,
            ref_errors=self.errors.read(pair_id, draw, chosen) if self.errors is not None else None,
        )

    def _look_up(self, pair: EncodedPair, mirror: bool) -> tuple[list[bytes | None], list, str | None]:
        """The keys of a pair's images, their sizes and crops, and the error of the first bad one, or None."""
        keys: list[bytes | None] = [None, None]
        conditions = []
        for side, image in enumerate(pair.images):
            if isinstance(image, BadImage):
                return keys, [], str(image)
            if side == 1 and image == pair.images[0]:
                return keys, [], str(BadImage(SAME, "rejected image"))
            keys[side] = mirrored(image) if mirror else image
        for name, noted in zip(("chosen image", "rejected image"), self.latents.meta(keys), strict=True):
            if isinstance(noted, dict):
                return keys, [], str(BadImage(noted["bad"], name))
            conditions.append(tuple(noted))
        return keys, conditions, None
