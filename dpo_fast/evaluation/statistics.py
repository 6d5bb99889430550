"""How sure a comparison is: paired win rates with ties, and intervals by resampling prompts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class WinRate(NamedTuple):
    """Share of images that the policy wins, ties counted half, with its 95% interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def win_rate(base: Tensor, policy: Tensor, prompts: list[str]) -> WinRate:  # scores [N] each, row by row a pair
    """Compare scores pair by pair.

    The interval is the bootstrap's over prompts (Efron and Tibshirani 1993, chapter 13): images of one prompt come and
    go together, since they are alike. From a fixed seed, so that the same scores give the same interval.
    """
    assert base.shape == policy.shape == (len(prompts),) and len(prompts) > 0
    won = (policy > base).double() + 0.5 * (policy == base).double()
    number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([number[prompt] for prompt in prompts])
    sums = torch.zeros(len(number), dtype=torch.float64).index_add_(0, group, won)
    sizes = torch.bincount(group, minlength=len(number)).double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(number), (RESAMPLES, len(number)), generator=generator)
    low, high = (sums[drawn].sum(1) / sizes[drawn].sum(1)).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    wins, ties = int((policy > base).sum()), int((policy == base).sum())
    return WinRate(won.mean().item(), low, high, wins, ties, len(prompts) - wins - ties)


def diversity(images: Tensor, prompts: list[str]) -> float | None:  # uint8 [N,3,H,W]
    """How much images of one prompt differ: the root mean square distance of pixels in [0, 1], of every two of them.

    The mean over prompts that have at least two images; None where there is no such prompt.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    means = []
    for of_prompt in rows.values():
        if len(of_prompt) > 1:
            flat = images[of_prompt].flatten(1).double() / 255
            means.append(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)
    return torch.stack(means).mean().item() if means else None


def binomial_interval(wins: int, trials: int) -> Interval:
    """The exact 95% interval of a share (Clopper and Pearson 1934), of independent trials without ties.

    It holds the true share in at least 95% of experiments, whatever the share is. Without any trial it is [0, 1].
    """
    assert 0 <= wins <= trials
    if trials == 0:
        return Interval(0.5, 0.0, 1.0)
    tail = (1 - CONFIDENCE) / 2
    successes = torch.arange(trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(successes + 1) - torch.lgamma(trials - successes + 1)

    def share_with(chosen: slice, rising: bool) -> float:
        """The p at which the numbers of successes in `chosen` have the probability `tail` together, by halving."""
        low, high = 0.0, 1.0
        while (p := (low + high) / 2) not in (low, high):
            logs = ways + successes * math.log(p) + (trials - successes) * math.log1p(-p)
            if (logs[chosen].logsumexp(0).exp().item() < tail) == rising:
                low = p
            else:
                high = p
        return p

    low = share_with(slice(wins, None), rising=True) if wins else 0.0
    high = share_with(slice(None, wins + 1), rising=False) if wins < trials else 1.0
    return Interval(wins / trials, low, high)
