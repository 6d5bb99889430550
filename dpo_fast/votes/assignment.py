"""Which comparison a voter sees next, with which question, and which image stands left.

Everything is spread evenly, so that votes can be counted whenever people stop:

- A (comparison, question) with the fewest votes and open showings comes first.
- Among these come first comparisons that the voter has not seen with another question, then kinds of comparisons (a
  group's two models) that the voter has seen least; then the draw decides.
- A voter keeps a question for BLOCK showings; voters begin with different ones.
- The first model's image stands left as often as right, by comparison and question; the draw decides if that is even.

It is a count in memory: `votes.desk` keeps it in step with the store.
"""

import random
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 10  # showings in a row with one question


class Picked(NamedTuple):
    """What a voter is to see."""

    question: int
    comparison: int  # places in the order given
    first_left: bool


class _Voter:
    """What one voter has seen."""

    def __init__(self, questions: int, comparisons: int, kinds: int) -> None:
        self.seen = np.zeros((questions, comparisons), bool)
        self.of_kind = np.zeros(kinds, np.int64)


class Assignment:
    """Counts votes and open showings of every comparison and question, and picks the next one for a voter."""

    def __init__(
        self,
        kinds: Sequence[Hashable],  # of each comparison: its group and models
        questions: int,
        wanted: int,  # votes of each comparison and question
        draw: random.Random,
    ) -> None:
        number = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
        self._kind = np.array([number[kind] for kind in kinds], np.int64)
        self._kinds, self._wanted, self._draw = len(number), wanted, draw
        shape = (questions, len(kinds))
        self.taken = np.zeros(shape, np.int64)  # votes and reserved showings
        self._left = np.zeros(shape, np.int64)  # of these, with the first model's image left
        self._voters: dict[Hashable, _Voter] = {}

    def pick(self, voter: Hashable, shown: int, start: int) -> Picked | None:
        """Return what `voter` sees next, and reserve it; None if nothing is left for this voter.

        shown: how many comparisons the voter was shown. start: the place of the question that the voter began with.
        """
        of = self._of(voter)
        questions = len(self.taken)
        for step in range(questions):
            question = (start + shown // BLOCK + step) % questions
            taken = self.taken[question]
            free = np.flatnonzero((taken < self._wanted) & ~of.seen[question])
            if not len(free):
                continue
            free = _least(free, taken[free])
            free = _least(free, of.seen[:, free].any(0))
            free = _least(free, of.of_kind[self._kind[free]])
            comparison = int(free[self._draw.randrange(len(free))])
            left = int(self._left[question, comparison])
            right = int(taken[comparison]) - left
            first_left = left < right or (left == right and self._draw.random() < 0.5)
            picked = Picked(question, comparison, first_left)
            self.add(voter, picked)
            return picked
        return None

    def add(self, voter: Hashable, picked: Picked) -> None:
        """Count a vote or a showing of `voter`, and remember that the voter has seen it."""
        of = self._of(voter)
        of.seen[picked.question, picked.comparison] = True
        of.of_kind[self._kind[picked.comparison]] += 1
        self.restore(picked)

    def forget(self, voter: Hashable, picked: Picked) -> None:
        """Undo `add` of a showing that is no longer reserved: the voter may see it again."""
        of = self._of(voter)
        of.seen[picked.question, picked.comparison] = False
        of.of_kind[self._kind[picked.comparison]] -= 1

    def release(self, picked: Picked) -> None:
        """Give a reservation to others, until `restore`; the voter is still remembered to have seen it."""
        self.taken[picked.question, picked.comparison] -= 1
        self._left[picked.question, picked.comparison] -= picked.first_left

    def restore(self, picked: Picked) -> None:
        """Count what was released again."""
        self.taken[picked.question, picked.comparison] += 1
        self._left[picked.question, picked.comparison] += picked.first_left

    def has_room(self, picked: Picked) -> bool:
        """Whether fewer than the wanted votes and reservations are there."""
        return bool(self.taken[picked.question, picked.comparison] < self._wanted)

    def has_seen(self, voter: Hashable, picked: Picked) -> bool:
        """Whether a voter has voted on a comparison and question, or has it open."""
        return bool(self._of(voter).seen[picked.question, picked.comparison])

    def _of(self, voter: Hashable) -> _Voter:
        if voter not in self._voters:
            self._voters[voter] = _Voter(*self.taken.shape, self._kinds)
        return self._voters[voter]


def _least(places: np.ndarray, values: np.ndarray) -> np.ndarray:  # int64 [n], [n] -> int64 [m]
    return places[values == values.min()]
