"""Which columns of a data set hold a pair's images, label and caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpo_fast.errors import BadInput

LAYOUTS = (
    "Pick-a-Pic (jpg_0, jpg_1, label_0, caption), preference (prompt, chosen, rejected with images), "
    "or a folder with JSONL (prompt, chosen, rejected with file paths)"
)
NO_LABEL = "none"  # the label_column that says: the first image column is always the better one


@dataclass(frozen=True)
class Columns:
    """The columns of one pair. `label` None: the first image is always the better one."""

    images: tuple[str, str]
    label: str | None
    caption: str


class WantedColumns(NamedTuple):
    """The column names a user gave, None for those to be found."""

    images: Sequence[str] | None
    label: str | None
    caption: str | None

    def find(self, columns: list[str], name: str) -> Columns:
        """Settle on columns that exist, or raise BadInput listing those that do."""
        if not columns:
            raise BadInput(f"data set {name!r} is empty: it has no rows and no columns")

        def missing(what: str, remedy: str) -> BadInput:
            return BadInput(
                f"data set {name!r} has {what}; its columns are {', '.join(columns)}. {remedy} Accepted: {LAYOUTS}."
            )

        for given in (*(self.images or ()), self.caption, None if self.label == NO_LABEL else self.label):
            if given is not None and given not in columns:
                raise missing(f"no column {given!r}", "Name one of these.")
        if self.images is not None:
            if len(self.images) != 2 or self.images[0] == self.images[1]:
                raise BadInput(f"image_columns ({', '.join(self.images)}) must name two different columns")
            images = (self.images[0], self.images[1])
        else:
            known = [pair for pair in (("jpg_0", "jpg_1"), ("chosen", "rejected")) if set(pair) <= set(columns)]
            if not known:
                raise missing(
                    "no image columns jpg_0 and jpg_1, nor chosen and rejected", "Or name two with --image_columns."
                )
            images = known[0]

        label = self.label
        if label is None and images != ("chosen", "rejected"):
            if "label_0" not in columns:
                remedy = f"Name one with --label_column, or 'none' if {images[0]} is always the better image."
                raise missing("no label column label_0", remedy)
            label = "label_0"

        caption = self.caption or next((column for column in ("caption", "prompt") if column in columns), None)
        if caption is None:
            raise missing("no caption or prompt column", "Or name one with --caption_column.")
        return Columns(images, None if label == NO_LABEL else label, caption)
