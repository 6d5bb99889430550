"""How far voters agree: Krippendorff's alpha of wins, ties and losses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dpo_fast.statistics import Bootstrap, Interval
from dpo_fast.votes.records import Vote

OUTCOMES = (0.0, 0.5, 1.0)
RESAMPLES = 2000


class Agreement(NamedTuple):
    """Krippendorff's alpha; None where it is not defined."""

    alpha: float | None
    interval: Interval | None


def agreement(votes: Sequence[Vote]) -> Agreement:
    """Krippendorff's alpha of votes on one question (Content Analysis, 2004, chapter 11), nominal.

    1 is full agreement, 0 is what votes dealt out at random among the comparisons would have, below 0 is less.

        alpha = 1 - (n - 1) sum_i [ sum_{c != k} n_ic n_ik / (m_i - 1) ] / sum_{c != k} n_c n_k

    n_ic: votes of comparison i for outcome c; m_i: its votes, where fewer than two it is left out; n_c, n: all of them.

    An outcome is a model's, in the order of the comparison, wherever its image stood. It is nominal: a tie is an
    opinion of its own ("no difference"), not half a vote for either model. Were outcomes ordered, two voters of
    opposite taste would be made to agree a little with anyone who calls ties; and the two models' order says nothing.

    Not defined, and None, where no comparison has two votes, and where all votes are equal: voters who never differ,
    on images that never differ, show nothing of whether they would tell them apart. The interval resamples prompts,
    with all their comparisons (`Bootstrap`): it is of these voters on other prompts. None with a single prompt.
    """
    # prompts in an order of their own, so that other orders of votes are resampled alike
    comparisons = sorted({(vote.prompt, vote.group, vote.comparison) for vote in votes})
    rows = {key[1:]: row for row, key in enumerate(comparisons)}
    counts = np.zeros((len(rows), len(OUTCOMES)))
    prompts = [prompt for prompt, _, _ in comparisons]
    for vote in votes:
        counts[rows[vote.group, vote.comparison], OUTCOMES.index(vote.outcome)] += 1
    shared = counts.sum(1) > 1
    counts, prompts = counts[shared], [prompt for prompt, kept in zip(prompts, shared, strict=True) if kept]
    if not len(counts):
        return Agreement(None, None)
    number = counts.sum(1)
    disagreement = (number**2 - np.square(counts).sum(1)) / (number - 1)
    terms = torch.from_numpy(np.column_stack([disagreement, counts]))  # fp64 [comparisons, 4]
    alpha = _alpha(terms.sum(0, keepdim=True)).item()
    if not np.isfinite(alpha):
        return Agreement(None, None)
    bootstrap = Bootstrap(prompts, RESAMPLES)
    if len(set(prompts)) == 1:
        return Agreement(alpha, None)
    resampled = _alpha(bootstrap.sums(terms))
    resampled = resampled[resampled.isfinite()]
    interval = bootstrap.percentiles(alpha, resampled) if len(resampled) > RESAMPLES / 2 else None
    return Agreement(alpha, interval)


def _alpha(sums: torch.Tensor) -> torch.Tensor:  # fp64 [R, 4]: disagreement, votes for each outcome -> fp64 [R]
    """Alpha from sums over comparisons; NaN where all votes are equal."""
    votes = sums[:, 1:].sum(1)
    expected = votes.square() - sums[:, 1:].square().sum(1)
    return 1 - (votes - 1) * sums[:, 0] / expected
