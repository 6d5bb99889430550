"""`dpo_fast.load_pairs`: preference pairs as training reads them, to look at from Python."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import overload

from PIL import Image

from dpo_fast.api.options import check_alone
from dpo_fast.config import TrainConfig
from dpo_fast.data import BadImage, BadRow, PairIndex, PairSets, PairsSource, Source, build_index, open_source
from dpo_fast.data.images import decode
from dpo_fast.errors import BadInput


@dataclass(frozen=True)
class Pair:
    """One preference pair. Images are read and decoded when they are asked for."""

    row: int  # in the source, before any row is left out; its pair id in training
    caption: str
    label: float  # how probably the chosen image is the better one, in [0.5, 1]; 1 without soft labels
    _source: Source = field(repr=False, compare=False)
    _chosen: int = field(repr=False, compare=False)  # which of the row's two images is the chosen one

    @property
    def chosen(self) -> Image.Image:
        """The better image: RGB, upright, over white. Raises BadInput if it cannot be read or decoded."""
        return self._image(self._chosen)

    @property
    def rejected(self) -> Image.Image:
        """The other image, likewise."""
        return self._image(1 - self._chosen)

    def _image(self, side: int) -> Image.Image:
        column = self._source.columns.images[side]
        try:
            return decode(self._encoded[side])
        except BadImage as error:
            raise BadInput(
                f"row {self.row}: {error.column or column} {error.reason}: leave the pair out, as training does"
            ) from error

    @cached_property
    def _encoded(self) -> tuple[bytes, bytes]:
        return self._source.image_bytes(self.row)


class LoadedPairs(Sequence[Pair]):
    """The usable pairs of a data set, in its order, and what was left out of it."""

    def __init__(self, source: Source, sets: PairSets, index: PairIndex) -> None:
        self._source, self._sets, self._index = source, sets, index

    @overload
    def __getitem__(self, position: int) -> Pair: ...
    @overload
    def __getitem__(self, position: slice) -> list[Pair]: ...
    def __getitem__(self, position: int | slice) -> Pair | list[Pair]:
        """The pair at a position, or those of a slice."""
        if isinstance(position, slice):
            return [self[one] for one in range(*position.indices(len(self)))]
        index = self._index
        caption = index.captions[position]  # raises IndexError
        row, label, chosen = (of[position].item() for of in (index.pair_id, index.label, index.chosen))
        return Pair(row, caption, label, self._source, chosen)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def validation(self) -> "LoadedPairs":
        """The pairs that are held out, by `validation_fraction`; they are not among these."""
        return LoadedPairs(self._source, self._sets, self._sets.validation)

    @property
    def rows(self) -> int:
        """Rows of the data set, usable or not."""
        return self._sets.rows

    @property
    def ties_dropped(self) -> int:
        """Rows that are ties."""
        return self._sets.ties_dropped

    @property
    def bad(self) -> list[BadRow]:
        """Rows that cannot be used, as (row, column, reason). Of the images a sample of 1000 pairs was decoded."""
        return list(self._sets.bad)

    def __str__(self) -> str:
        """What was opened and left out, in one line."""
        return f"{self._source.description}: {len(self)} pairs; {self._sets.left_out}"

    def __repr__(self) -> str:
        return f"<LoadedPairs {self}>"


_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}


def load_pairs(
    dataset_name: str | Path | TrainConfig,
    *,
    dataset_config_name: str | None = None,
    dataset_split_name: str | None = None,
    image_columns: tuple[str, str] | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    max_train_samples: int | None = None,
    soft_labels: bool = False,
    max_bad_fraction: float = 0.01,
    validation_fraction: float = 0.0,
    seed: int | None = None,
    cache_dir: str | None = None,
    hub_token: str | None = None,
) -> LoadedPairs:
    """Open preference pairs: a file, a folder, a hub id (docs/pairs.md), or those of a run, by its TrainConfig.

    The other arguments are flags of `python -m dpo_fast.train` and mean the same; seed (None: 0) decides which captions
    are held out. Raises BadInput for a data set that cannot be opened or understood, and if too many rows are bad.
    """
    flags = {
        "dataset_config_name": dataset_config_name,
        "dataset_split_name": dataset_split_name,
        "image_columns": image_columns,
        "label_column": label_column,
        "caption_column": caption_column,
        "max_train_samples": max_train_samples,
        "soft_labels": soft_labels,
        "max_bad_fraction": max_bad_fraction,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "cache_dir": cache_dir,
        "hub_token": hub_token,
    }
    if isinstance(dataset_name, TrainConfig):
        config = dataset_name
        check_alone(config, TrainConfig, [name for name, value in flags.items() if value != _DEFAULTS[name]])
    else:
        config = TrainConfig(dataset_name=str(dataset_name), **flags)
    if config.dataset_name is None:
        raise BadInput("no preference pairs are named: give dataset_name")
    if config.streaming:
        raise BadInput("a stream has no length and no positions: load_pairs needs streaming=False")
    if config.preference is not None:
        config = replace(config, label_column=f"label_{config.preference}")
    source = open_source(PairsSource.of(config, max_rows=config.max_train_samples))
    sets = build_index(
        source,
        seed=config.seed or 0,
        soft_labels=config.soft_labels,
        max_bad_fraction=config.max_bad_fraction,
        validation_fraction=config.validation_fraction,
    )
    return LoadedPairs(source, sets, sets.train)
