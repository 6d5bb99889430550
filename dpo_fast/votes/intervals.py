"""How certain a win rate by people's votes is, over other prompts and other voters.

There are two rates of the second model over the first, ties counted half, each the estimate of a number of its own:

- by votes: how often a voter drawn at random prefers the second model on a prompt drawn at random;
- by majority: on which share of prompts the majority of n voters drawn at random prefers it, n being the votes that a
  comparison has. It depends on n: where each vote goes one way with 70 %, 84 % of majorities of five do.

Votes on one prompt are alike, and so are those of one voter: 5 people who vote on 200 prompts are not 1000 people. So
the variance of a rate is put together from two parts,

    prompts: what resampling prompts gives, which holds the chance of single votes as well;
    voters:  what prompts share because the same people voted on them: what resampling voters gives, less what it would
             give if each vote of a voter on another prompt were another person's, which is in the first part already.

The sum is the variance of two-way clusters, V(prompts) + V(voters) - V(both) (Cameron, Gelbach and Miller, Journal of
Business & Economic Statistics 29, 2011, 238). The crossed bootstrap, in which a vote weighs its prompt's weight times
its voter's (Owen, Annals of Applied Statistics 1, 2007, 386), has V(prompts) + V(voters) + V(both) instead: it counts
the chance of single votes three times, and is far too wide where that chance is what matters most, as with five votes a
comparison. Rates are sums, so that the variances of infinitely many resamples can be written down: nothing is drawn.

A majority is no sum over voters. Resampled voters would have it found among fewer and heavier votes, and each would
sway it less. So its voters' part comes from leaving out one vote at a time, as the jackknife does (Efron and Stein,
Annals of Statistics 9, 1981, 586): without it the majority is another, or a tie, or as it was.
"""

import math
from typing import NamedTuple

import numpy as np

from dpo_fast.statistics import Interval, students_t

# Votes that are nearly unanimous hardly show how much tastes differ. Two votes of one voter are then taken to correlate
# by ALIKE at least, times FEW / (FEW + looks that are not with the larger side).
ALIKE, FEW = 0.1, 5
ONE_VOTER = "one voter: the interval is over prompts, and says nothing of other voters"
ONE_PROMPT = "one prompt: the interval says nothing of other prompts"


class Rates(NamedTuple):
    """How often the second model is preferred."""

    majority: Interval
    votes: Interval
    note: str | None  # what the intervals do not say


class Part(NamedTuple):
    """A part of a variance, and the degrees of freedom of its estimate; `effective` voters or prompts less one."""

    variance: float
    freedom: float

    @property
    def effective(self) -> float:
        return self.freedom + 1


def rates(
    second: np.ndarray,  # fp64 [N]: 1 for a vote for the second model, 0.5 for a tie, 0 for the first
    comparison: np.ndarray,  # int64 [N] each, numbered from 0 without gaps
    prompt: np.ndarray,
    voter: np.ndarray,
) -> Rates:
    """The rates by majority and by votes with their 95% intervals, of N > 0 votes on comparisons of two models.

    An interval is Wilson's (1927), with t^2 / n in its formula replaced by

        (t_prompts^2 prompts + t_voters^2 voters) / (p (1 - p)),

    the two parts of the variance, each with Student's t for its own degrees of freedom (as Banerjee's of two variances,
    Annals of the Institute of Statistical Mathematics 12, 1960, 157): those of the effective prompts and voters (Kish)
    less one. The prompts' part is at least that of independent looks, and that of one look a prompt if all looks are
    equal; the voters' part is at least that of `ALIKE`. Nothing is ever certain: also if all votes are ties, the
    interval has a width.

    With one voter, or one prompt, there is no such part, which `note` says. The comparisons of a single prompt are
    taken for prompts, and of a single comparison, voters are; its majority is but one look, and the interval [0, 1].
    """
    assert len(second) == len(comparison) == len(prompt) == len(voter) > 0
    for_second = 2 * second - 1
    lead = np.bincount(comparison, for_second)
    majority = won(lead)
    one_prompt, one_voter = prompt.max() == 0, voter.max() == 0
    note = "; ".join(said for said, holds in ((ONE_PROMPT, one_prompt), (ONE_VOTER, one_voter)) if holds) or None
    if len(lead) == 1:
        certain = float(majority[0])
        by_votes = (
            _interval(second, between(second, voter), None) if not one_voter else Interval(second.mean(), 0.0, 1.0)
        )
        return Rates(Interval(certain, 0.0, 1.0), by_votes, note)
    prompt_of = np.arange(len(lead))
    if one_prompt:
        prompt = comparison
    else:
        prompt_of[comparison] = prompt
    swayed = majority[comparison] - won(lead[comparison] - for_second)  # by each vote
    cell = prompt * (int(voter.max()) + 1) + voter
    parts = [None if one_voter else shared(of, cell, voter) for of in (swayed, second)]
    if not one_voter:
        parts[0] = Part(parts[0].variance * (len(second) / len(lead)) ** 2, parts[0].freedom)
    return Rates(
        _interval(majority, between(majority, prompt_of), parts[0]),
        _interval(second, between(second, prompt), parts[1]),
        note,
    )


def won(lead: np.ndarray) -> np.ndarray:
    """By how many more votes the second model has: 1 it wins, 1/2 a tie, 0 the first does."""
    return (np.sign(lead) + 1) / 2


def effective(group: np.ndarray) -> float:  # int64 [N]
    """How many groups of equal size tell as much: (sum of sizes)^2 / sum of squared sizes (Kish, Survey Sampling)."""
    sizes = np.bincount(group).astype(np.float64)
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def freedom_of(group: np.ndarray) -> float:  # int64 [N]
    """The degrees of freedom of a variance between groups."""
    return max(1.0, effective(group) - 1)


def between(looks: np.ndarray, group: np.ndarray) -> Part:  # fp64, int64 [N]
    """The variance of a mean, over groups that are drawn again."""
    sums = np.bincount(group, looks - looks.mean()) / len(looks)
    freedom = freedom_of(group)
    return Part(float(np.square(sums).sum()) * (freedom + 1) / freedom, freedom)


def shared(influence: np.ndarray, cell: np.ndarray, voter: np.ndarray) -> Part:  # fp64, int64, int64 [N]
    """The part of a mean's variance that prompts share by their voters. cell: of each voter and prompt."""
    whole = between(influence, voter)
    _, cell = np.unique(cell, return_inverse=True)
    own = np.square(np.bincount(cell, influence - influence.mean()) / len(influence)).sum()
    return Part(max(0.0, whole.variance - float(own)), whole.freedom)


def _interval(looks: np.ndarray, prompts: Part, voters: Part | None) -> Interval:
    """Wilson's interval of the mean of looks that are 0, 1/2 or 1, fp64 [N]."""
    share = float(looks.mean())
    spread = share * (1 - share)
    t_prompts = students_t(prompts.freedom) ** 2
    if prompts.variance > 0:
        odds = t_prompts * max(prompts.variance, float(looks.var(ddof=1)) / len(looks)) / spread
    else:
        odds = t_prompts / prompts.effective
    if voters is not None:
        against = len(looks) * min(share, 1 - share)
        least = ALIKE * FEW / (FEW + against) / voters.effective
        seen = voters.variance / spread if spread > 0 else 0.0
        odds += max(students_t(voters.freedom) ** 2 * seen, t_prompts * least)
    middle = (share + odds / 2) / (1 + odds)
    half = math.sqrt(odds * spread + odds**2 / 4) / (1 + odds)
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))
