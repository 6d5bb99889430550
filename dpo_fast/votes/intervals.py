"""How certain a win rate by people's votes is, over other prompts and other voters.

Two rates of the second model over the first, ties counted half, each of a population of its own:

- by votes: how often a voter drawn at random prefers the second model's image of a prompt drawn at random;
- by majority: on which share of prompts the majority of n voters drawn at random prefers it, n being the votes that a
  comparison has. It depends on n: where 70 % of the votes go one way, 84 % of majorities of five do.

Votes on one prompt are alike, and so are those of one voter: 5 people who vote on 200 prompts are not 1000 people. The
variance of a rate is therefore put together from two parts,

    prompts: that between prompts, which holds the chance of single votes as well: what resampling prompts gives;
    voters:  what prompts share because the same people voted on them: what resampling voters gives, less the part that
             each voter's votes would give were they of different people, which the first part holds already.

Their sum is that of two-way clusters, V(prompts) + V(voters) - V(both) (Cameron, Gelbach and Miller, Journal of
Business & Economic Statistics 29, 2011, 238). The bootstrap that multiplies a prompt's weight by a voter's (Owen,
Annals of Applied Statistics 1, 2007, 386) has V(prompts) + V(voters) + V(both) instead: it counts the chance of single
votes three times, and its intervals are far too wide where that chance is what matters most, as with five votes a
prompt. Being linear, rates need no resamples: these are the variances of infinitely many.

A majority is no smooth function of votes. Resampled voters would have it among fewer, heavier votes, which depend on a
voter half as much: the voters' part comes from leaving out one vote at a time instead (the jackknife: Efron and Stein,
Annals of Statistics 9, 1981, 586).
"""

import math
from typing import NamedTuple

import numpy as np

from dpo_fast.statistics import Interval, students_t


class Rates(NamedTuple):
    """How often the second model is preferred, in both ways of counting."""

    majority: Interval
    votes: Interval


class Part(NamedTuple):
    """One part of a variance, and the degrees of freedom it is estimated with."""

    variance: float
    freedom: float


def rates(
    second: np.ndarray,  # fp64 [N]: 1 for a vote for the second model, 0.5 for a tie, 0 for the first
    comparison: np.ndarray,  # int64 [N] each, counted from 0 without gaps
    prompt: np.ndarray,
    voter: np.ndarray,
) -> Rates:
    """The rates by majority and by votes, with their intervals, of N > 0 votes on comparisons of two models."""
    assert len(second) == len(comparison) == len(prompt) == len(voter) > 0
    for_second = 2 * second - 1
    lead = np.bincount(comparison, for_second)
    majority = won(lead)
    prompt_of = np.zeros(len(lead), np.int64)
    prompt_of[comparison] = prompt
    if prompt_of.max() == 0:  # of a single prompt, comparisons are what can be drawn again
        prompt, prompt_of = comparison, np.arange(len(lead))
    cell = prompt * (int(voter.max()) + 1) + voter
    swayed = majority[comparison] - won(lead[comparison] - for_second)  # by each vote
    by_majority = _interval(
        majority, _prompts(majority, prompt_of), _voters(swayed - swayed.mean(), len(lead), cell, voter)
    )
    by_votes = _interval(second, _prompts(second, prompt), _voters(second - second.mean(), len(second), cell, voter))
    return Rates(by_majority, by_votes)


def won(lead: np.ndarray) -> np.ndarray:
    """Who wins by how many more votes the second model has: 1 it does, 1/2 in a tie, 0 the first."""
    return (np.sign(lead) + 1) / 2


def effective(group: np.ndarray) -> float:
    """How many groups of equal size tell as much: (sum of sizes)^2 / sum of squared sizes (Kish, Survey Sampling)."""
    sizes = np.bincount(group).astype(np.float64)
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def _prompts(looks: np.ndarray, prompt: np.ndarray) -> Part:
    """The part of a mean's variance between prompts."""
    away = np.bincount(prompt, looks - looks.mean()) / len(looks)
    number = effective(prompt)
    freedom = max(1.0, number - 1)
    return Part(float(np.square(away).sum()) * (freedom + 1) / freedom, freedom)


def _voters(influence: np.ndarray, number: int, cell: np.ndarray, voter: np.ndarray) -> Part:
    """The part that prompts share by their voters. influence: fp64 [N], of each vote, times `number`."""
    freedom = max(1.0, effective(voter) - 1)
    of_voter = np.square(np.bincount(voter, influence)).sum() * (freedom + 1) / freedom
    _, cell = np.unique(cell, return_inverse=True)
    own = np.square(np.bincount(cell, influence)).sum()
    return Part(max(0.0, float(of_voter - own)) / number**2, freedom)


def _interval(looks: np.ndarray, prompts: Part, voters: Part) -> Interval:
    share = float(looks.mean())
    spread = share * (1 - share)
    if prompts.variance > 0 and spread > 0:
        floor = float(looks.var(ddof=1)) / len(looks)
        prompts_variance = max(prompts.variance, floor)
        odds = (
            students_t(prompts.freedom) ** 2 * prompts_variance + students_t(voters.freedom) ** 2 * voters.variance
        ) / spread
    else:
        odds = students_t(prompts.freedom) ** 2 / (prompts.freedom + 1)
    middle = (share + odds / 2) / (1 + odds)
    half = math.sqrt(odds * spread + odds**2 / 4) / (1 + odds)
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))
