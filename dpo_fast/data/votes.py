"""Rows of one caption and the same two images: votes on one pair.

A row that repeats another is a further vote, and stays. Votes that are even say nothing, as a tie: they are left out.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

Names = tuple[Hashable, Hashable]  # of a row's images, in the order of its columns


class Votes(NamedTuple):
    """What recurs among rows, by position."""

    repeated: int  # rows that say what an earlier one says
    even: list[list[int]]  # groups of rows whose votes are even


def count_votes(captions: Sequence[str], chosen: Sequence[int], names_of: Callable[[int], Names | None]) -> Votes:
    """Group rows by caption and images. `chosen` is which image wins; a row whose names are not known, or are equal,
    stays alone."""
    hashes = np.empty(len(captions), np.int64)  # first by a hash: a million groups would take much memory
    for position, caption in enumerate(captions):
        names = names_of(position)
        known = names is not None and names[0] != names[1]
        hashes[position] = hash((caption, frozenset(names)) if known else (position, None))
    _, group, size = np.unique(hashes, return_inverse=True, return_counts=True)
    groups: dict[tuple, list[int]] = {}
    for position in np.flatnonzero(size[group] > 1).tolist():
        if (names := names_of(position)) is not None and names[0] != names[1]:
            groups.setdefault((captions[position], frozenset(names)), []).append(position)
    repeated, even = 0, []
    for rows in groups.values():
        winners = [names_of(row)[chosen[row]] for row in rows]
        repeated += len(rows) - len(set(winners))
        if len(set(winners)) == 2 and 2 * winners.count(winners[0]) == len(winners):
            even.append(rows)
    return Votes(repeated, even)
