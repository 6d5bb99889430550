"""Which rows a run needs, and what the manifest knows about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpo_fast.caching.manifest import Manifest
from dpo_fast.data.columns import Columns
from dpo_fast.data.images import BadImage, Encoded, Keys
from dpo_fast.data.pairs import Usable, judge_streamed
from dpo_fast.data.sources import BadRow, Source, StreamedRow


@dataclass(frozen=True)
class NeededRows:
    """The pairs that a run needs: the given rows of a source, or the first usable pairs of a stream."""

    rows: list[int] | None = None  # ascending
    pairs: int | None = None


class Row(NamedTuple):
    """A row being processed; `images` is set if they had to be read."""

    row: int
    keys: Keys
    images: Encoded | None
    caption: str | None  # None: the row is a tie or unusable, only its keys are wanted


def is_fully_known(soft_labels: bool, manifest: Manifest, wanted: NeededRows) -> bool:
    """Whether the manifest knows every needed row of a stream, which then is not read."""
    return None not in known_rows(soft_labels, None, manifest, wanted)


def known_rows(
    soft_labels: bool, source: Source | None, manifest: Manifest, wanted: NeededRows
) -> Iterator[Row | None]:
    """Yield the wanted rows with their keys; None for each unknown row, and once for the unknown rest of a stream."""
    if wanted.rows is not None:
        captions = source.captions()
        for row in wanted.rows:
            yield Row(row, manifest.images(row), None, captions[row]) if row in manifest else None
        return
    pairs = 0
    for streamed in manifest.streamed_rows():
        if pairs == wanted.pairs:
            return
        usable = is_usable(soft_labels, streamed, manifest.columns)
        pairs += usable
        yield Row(streamed.row, streamed.images, None, streamed.caption if usable else None)
    if pairs != wanted.pairs and not (manifest.about and manifest.about["ended"]):
        yield None


def is_usable(soft_labels: bool, row: StreamedRow, columns: Columns) -> bool:
    """Whether `StreamedPairs` trains on a row."""
    return isinstance(judge_streamed(row, columns, soft_labels), Usable)


def first_bad(row: int, keys: Keys, faults: dict[bytes, str], columns: Sequence[str]) -> BadRow | None:
    for key, column in zip(keys, columns, strict=True):
        if isinstance(key, BadImage):
            return BadRow(row, key.column, key.reason)
        if key in faults:
            return BadRow(row, column, faults[key])
    return None
