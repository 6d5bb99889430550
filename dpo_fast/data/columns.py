"""Which columns of a data set hold a pair's images, label and caption."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_fast.errors import BadInput

LAYOUTS = (
    "Pick-a-Pic (jpg_0, jpg_1, label_0, caption), preference (prompt, chosen, rejected with images), "
    "or a folder with JSONL (prompt, chosen, rejected with file paths)"
)
NO_LABEL = "none"  # a label_column: the first image column is always the better one
# Stand-ins for a label, in JSON and unlike any label:
UNLABELLED = {"has_label": False}  # nobody gave one; with another value, has_label is invalid
DISAGREE = "labels"  # the key of a row's two labels that contradict each other
ROUNDING = 1e-3  # tolerance of the sum of two soft labels, which may be stored in half precision


@dataclass(frozen=True)
class Columns:
    """The columns of one pair. `label` None: the first image is always the better one."""

    images: tuple[str, str]
    label: str | None
    caption: str
    second_label: str | None = None  # Pick-a-Pic's label_1, that of the second image
    has_label: str | None = None  # Pick-a-Pic's: False where people gave no label, whatever the label columns say
    names: tuple[str, str] | None = None  # Pick-a-Pic's image_0_uid and image_1_uid

    @property
    def of_label(self) -> tuple[str, ...]:
        """The columns that a row's label depends on."""
        return tuple(c for c in (self.label, self.second_label, self.has_label) if c is not None)

    def label_of(self, row: Mapping[str, Any]) -> Any:
        """The probability that the first image of a row is the better one, as stored; 0.5 if both labels are equal.

        UNLABELLED if people gave no label; {"has_label": value} if that value is not a boolean, 0, 1 or null; and
        {DISAGREE: [first, second]} if the two labels are numbers that neither sum to 1 nor are equal.
        """
        if self.label is None:
            return 1.0
        labelled = None if self.has_label is None else row.get(self.has_label)
        if not _is_null(labelled):
            if not isinstance(labelled, (int, float)) or labelled not in (0, 1):
                return {"has_label": labelled}
            if not labelled:
                return UNLABELLED
        label = row.get(self.label)
        second = None if self.second_label is None else row.get(self.second_label)
        if isinstance(label, (int, float)) and 0 <= label <= 1 and isinstance(second, (int, float)):
            if second == label:
                return 0.5
            if abs(label + second - 1) > ROUNDING:
                return label if _is_null(second) else {DISAGREE: [label, second]}
        return label


class WantedColumns(NamedTuple):
    """The column names that a user gave; None for those to find."""

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
        if label == NO_LABEL:
            label = None
        has = {name: name if name in columns and label == "label_0" else None for name in ("label_1", "has_label")}
        uids = ("image_0_uid", "image_1_uid")
        names = uids if images == ("jpg_0", "jpg_1") and set(uids) <= set(columns) else None
        return Columns(images, label, caption, has["label_1"], has["has_label"], names)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
