"""Successive halving (Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943): many candidates, few images for most.

All candidates are compared with the base on a few images; the better half is kept and compared on as many again, and so
on, so that every round costs about as much as the first.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.statistics import Bootstrap, Interval, WinRate, win_rate

FIRST = 32  # images of each candidate in the first round, or as many as there are prompts
LEAST = 2  # candidates that are left for the last round


class Share(NamedTuple):
    """The images of one round: these prompts with these seeds."""

    prompts: list[str]
    seeds: range

    @property
    def images(self) -> int:
        return len(self.prompts) * len(self.seeds)


def in_two(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split distinct prompts into those to choose by and those to judge by: always the same, whatever their order."""
    order = sorted(set(prompts), key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
    return order[::2], order[1::2]


def shares(prompts: Sequence[str], images: int) -> list[Share]:
    """Share out up to `images` images over rounds, each of which at least doubles what was there before.

    A round has whole prompts of the first seed, until all have had their turn, and then all prompts with further seeds.
    A few prompts may be left over, so that the numbers double.
    """
    halvings = max(0, int(math.log2(max(1, min(len(prompts), images) / FIRST))))
    first = max(1, min(len(prompts), images) >> halvings)
    used = list(prompts[: first << halvings])
    found, done = [Share(used[:first], range(1))], first
    while done * 2 <= min(len(used), images):
        found.append(Share(used[done : 2 * done], range(1)))
        done *= 2
    while done * 2 <= images:
        found.append(Share(used, range(done // len(used), 2 * done // len(used))))
        done *= 2
    return found


def kept_of(candidates: int) -> int:
    """How many of the candidates a round keeps: half, rounded up, and at least LEAST."""
    return max(min(LEAST, candidates), math.ceil(candidates / 2))


@dataclass
class Race:
    """The scores of candidates and of the base on the images made so far."""

    candidates: Sequence[str]
    by: str  # "gain" or "win_rate"
    prompts: list[str] = field(default_factory=list)  # of each image
    base: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))  # fp64 [images]
    scores: dict[str, Tensor] = field(default_factory=dict)  # candidate -> fp64, shorter if it was dropped
    alive: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.alive = list(self.candidates)
        self.scores = {name: torch.zeros(0, dtype=torch.float64) for name in self.candidates}

    def add(self, prompts: Sequence[str], base: Tensor, scores: dict[str, Tensor]) -> None:
        """Add a round's scores, of the candidates that are alive."""
        self.prompts += prompts
        self.base = torch.cat([self.base, base])
        for name in self.alive:
            self.scores[name] = torch.cat([self.scores[name], scores[name]])

    def drop_the_worse_half(self) -> None:
        """Keep the better half (`kept_of`)."""
        best = set(sorted(self.alive, key=self.value, reverse=True)[: kept_of(len(self.alive))])
        self.alive = [name for name in self.alive if name in best]

    def value(self, name: str) -> float:
        """What candidates are compared by."""
        gain = self.gains(name)
        if self.by == "gain":
            return float(gain.mean())
        return float(((gain > 0).double() + 0.5 * (gain == 0).double()).mean())

    def gains(self, name: str) -> Tensor:
        """The candidate's score minus the base's, fp64 [its images]."""
        scores = self.scores[name]
        return scores - self.base[: len(scores)]

    def best(self) -> str:
        """The candidate that is alive and best."""
        return max(self.alive, key=self.value)

    def gain(self, name: str) -> Interval:
        """The mean gain, with its interval over prompts."""
        gains = self.gains(name)
        return Bootstrap(self.prompts[: len(gains)]).mean(gains)

    def win_rate(self, name: str) -> WinRate:
        """The win rate against the base, with its interval over prompts."""
        scores = self.scores[name]
        return win_rate(self.base[: len(scores)], scores, self.prompts[: len(scores)])
