"""Turn one pair into tensors, and several into a micro-batch.

Everything random about a pair (timestep, flip, crop, caption dropout) is drawn here, once per pair and never per image,
as a pure function of (seed, pair id, draw): see `dpo_fast.draws`. The noise is drawn where it is used, by `noise_pair`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from dpo_fast import draws
from dpo_fast.data.images import SAME, BadImage, Encoded, Keys, crop_corner, mirror, scaled, to_pixels
from dpo_fast.data.pairs import PairIndex
from dpo_fast.data.sources import Source
from dpo_fast.errors import BadInput

T = TypeVar("T")


class EncodedPair(NamedTuple):
    """One pair before decoding."""

    images: Encoded | Keys  # chosen first
    caption: str
    label: float
    chosen: int = 0  # index of the chosen image in the source's order


class PairItem(NamedTuple):
    """One decoded pair; `collate` makes a `Batch` of several."""

    pixels: Tensor  # uint8 [2, 3, R, R], chosen first
    caption: str
    dropped: bool
    pair_id: int
    draw: int
    timestep: int
    label: float
    weight: float
    time_ids: tuple[float, ...]
    bad: str | None


class Drawn(NamedTuple):
    """The random draws for B pairs, as lists."""

    timesteps: list[int]
    dropped: list[bool]
    mirrored: list[bool]
    corners: list[tuple[float, float] | None]  # of the crop; None is the center


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTransform:
    """How an encoded pair becomes pixels, a timestep and conditioning. Raises BadInput for settings out of range."""

    resolution: int  # pixels; the shorter side is scaled to it, then a square is cut
    seed: int
    timesteps: Tensor  # int64 [n], ascending: those that may be drawn
    grid: bool = False  # True: a pair's draws walk through `timesteps` in turn (Turbo's four steps)
    hflip: bool = False  # mirror half of the pairs
    random_crop: bool = False  # False: the center
    caption_dropout: float = 0.0  # share of the pairs trained without their caption
    # SDXL's micro-conditioning. fixed: (R, R, 0, 0, R, R); real: the smaller image's true size and crop
    time_ids: str = "fixed"

    in_threads: ClassVar[bool] = False  # batches are made in worker processes

    def __post_init__(self) -> None:
        assert self.timesteps.dtype == torch.int64 and len(self.timesteps) > 0
        if self.resolution < 1:
            raise BadInput(f"resolution ({self.resolution}) must be at least 1 pixel")
        if not 0 <= self.caption_dropout <= 1:
            raise BadInput(f"caption_dropout ({self.caption_dropout}) must be a probability, from 0 to 1")
        if self.time_ids not in ("fixed", "real"):
            raise BadInput(f"time_ids ({self.time_ids!r}) must be fixed or real")

    def drawn(self, pair_id: Tensor, draw: Tensor) -> Drawn:
        """Draw what is random about pairs, given their ids and draw indices (int64 [B] both)."""
        n = len(pair_id)
        return Drawn(
            draws.timesteps(self.seed, pair_id, draw, self.timesteps, grid=self.grid).tolist(),
            draws.dropout(self.seed, pair_id, draw, self.caption_dropout).tolist(),
            draws.flip(self.seed, pair_id, draw).tolist() if self.hflip else [False] * n,
            draws.crop(self.seed, pair_id, draw).tolist() if self.random_crop else [None] * n,
        )

    def batch(self, pair_id: Tensor, draw: Tensor, pairs: Sequence[EncodedPair]) -> "Batch":
        """Decode pairs into a micro-batch, given their ids and draw indices (int64 [B] both)."""
        return collate(self(pair_id, draw, pairs))

    def __call__(self, pair_id: Tensor, draw: Tensor, pairs: Sequence[EncodedPair]) -> list[PairItem]:
        """Decode pairs, given their ids and draw indices (int64 [B] both). A bad image gives its pair weight 0."""
        drawn = self.drawn(pair_id, draw)
        items = []
        for i, pair in enumerate(pairs):
            try:
                pixels, time_ids = self._pixels(pair.images, drawn.mirrored[i], drawn.corners[i])
                bad = None
            except BadImage as error:
                pixels = torch.zeros(2, 3, self.resolution, self.resolution, dtype=torch.uint8)
                time_ids, bad = self.fixed_time_ids, str(error)
            items.append(
                PairItem(
                    pixels=pixels,
                    caption=pair.caption,
                    dropped=drawn.dropped[i],
                    pair_id=int(pair_id[i]),
                    draw=int(draw[i]),
                    timestep=drawn.timesteps[i],
                    label=pair.label,
                    weight=0.0 if bad else 1.0,
                    time_ids=time_ids,
                    bad=bad,
                )
            )
        return items

    def _pixels(
        self, images: tuple[bytes | BadImage, bytes | BadImage], mirrored: bool, where: tuple[float, float] | None
    ) -> tuple[Tensor, tuple[float, ...]]:
        squares, conditions = [], []
        if images[0] == images[1]:
            raise images[0] if isinstance(images[0], BadImage) else BadImage(SAME, "rejected image")
        for name, encoded in zip(("chosen image", "rejected image"), images, strict=True):
            if isinstance(encoded, BadImage):
                raise encoded
            try:
                image, size = scaled(encoded, self.resolution)
            except BadImage as error:
                raise BadImage(error.reason, name) from error
            if mirrored:
                image = mirror(image)
            top, left = crop_corner(image.size, self.resolution, where)
            squares.append(to_pixels(image, top, left, self.resolution))
            conditions.append((*size, top, left))
        return torch.stack(squares), self.time_ids_of(conditions)

    def time_ids_of(self, conditions: Sequence[tuple[int, int, int, int]]) -> tuple[float, ...]:
        """A pair's time ids, from (true height, true width, crop top, crop left) of each image."""
        if self.time_ids == "fixed":
            return self.fixed_time_ids
        smaller = min(conditions, key=lambda condition: condition[0] * condition[1])  # of equal areas, the chosen image
        return (*smaller, self.resolution, self.resolution)

    @property
    def fixed_time_ids(self) -> tuple[float, ...]:
        return (self.resolution, self.resolution, 0, 0, self.resolution, self.resolution)


class PairDataset(torch.utils.data.Dataset):
    """The pairs of an index by (position, draw). A bad image never raises: its pair gets weight 0 and is reported.

    `images` loads what `transform` needs from a row: `load_images`, or `load_keys` if it reads from the cache.
    """

    def __init__(
        self,
        source: Source,
        index: PairIndex,
        transform: "PairTransform",
        images: "Callable[[Source, int], Encoded | Keys] | None" = None,
    ):
        self.source, self.index, self.transform, self.images = source, index, transform, images or load_images

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> PairItem:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[PairItem]:
        """Load one micro-batch at a time, so that its draws are made together. The loader calls this."""
        return self.transform(*self._drawn_of(keys))

    def batch(self, keys: Sequence[tuple[int, int]]) -> "Batch":
        """Load one micro-batch as a `Batch`."""
        return self.transform.batch(*self._drawn_of(keys))

    def _drawn_of(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, list[EncodedPair]]:
        position, draw = torch.tensor(keys, dtype=torch.int64).unbind(1)
        return self.index.pair_id[position], draw, [self._encoded(p) for p in position.tolist()]

    def _encoded(self, position: int) -> EncodedPair:
        images, chosen = self.images(self.source, int(self.index.pair_id[position])), int(self.index.chosen[position])
        return EncodedPair(
            chosen_first(images, chosen), self.index.captions[position], float(self.index.label[position]), chosen
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of B pairs. Image tensors are [2B, ...]: the B chosen ones, then the B rejected ones.

    Images come as `pixels`, or from the cache as `latents`; captions come as text, and from the cache
    as `conditioning` too.
    """

    pixels: Tensor | None  # uint8 [2B, 3, R, R]
    captions: list[str]  # B, including dropped ones
    dropped: Tensor  # bool [B]: train without the caption
    pair_id: Tensor  # int64 [B]
    draw: Tensor  # int64 [B]: how many times the pair was visited before
    timesteps: Tensor  # int64 [B]
    label: Tensor  # fp32 [B]
    weight: Tensor  # fp32 [B]: 0 where an image could not be decoded
    time_ids: Tensor  # fp32 [B, 6]: (height, width, crop top, crop left, target height, target width)
    bad: list[tuple[int, str]]  # (row, reason) of the pairs with weight 0
    latents: Tensor | None = None  # from the cache: fp16 [2B, C, h, w]
    conditioning: dict[str, Tensor] | None = None  # from the cache: fp16 [B, ...] each
    ref_errors: Tensor | None = None  # from the cache, if it holds the reference's errors: fp32 [2B]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's loader calls this."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.conditioning is not None:
            tensors["conditioning"] = {name: change(value) for name, value in self.conditioning.items()}
        return replace(self, **tensors)


def collate(items: Sequence[PairItem]) -> Batch:
    """Stack pairs into a micro-batch."""
    return Batch(
        pixels=torch.cat([torch.stack([item.pixels[side] for item in items]) for side in (0, 1)]),
        captions=[item.caption for item in items],
        dropped=torch.tensor([item.dropped for item in items], dtype=torch.bool),
        pair_id=torch.tensor([item.pair_id for item in items], dtype=torch.int64),
        draw=torch.tensor([item.draw for item in items], dtype=torch.int64),
        timesteps=torch.tensor([item.timestep for item in items], dtype=torch.int64),
        label=torch.tensor([item.label for item in items], dtype=torch.float32),
        weight=torch.tensor([item.weight for item in items], dtype=torch.float32),
        time_ids=torch.tensor([item.time_ids for item in items], dtype=torch.float32),
        bad=[(item.pair_id, item.bad) for item in items if item.bad is not None],
    )


def load_images(source: Source, row: int) -> Encoded:
    """A row's two encoded images, or why they cannot be used."""
    try:
        return source.image_bytes(row)
    except BadImage as error:
        return error, error


def load_keys(source: Source, row: int) -> Keys:
    """The keys of a row's two images, or why they cannot be used."""
    try:
        return source.image_keys(row)
    except BadImage as error:
        return error, error


def chosen_first(images: tuple[T, T], chosen: int) -> tuple[T, T]:
    """The row's images in the order chosen, rejected."""
    return images if chosen == 0 else (images[1], images[0])
