"""How sure a comparison is: paired win rates with ties, and intervals by resampling prompts."""

from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 10_000


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


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """The exact 95% interval of a share (Clopper and Pearson 1934): never covers less, however few the trials.

    Its ends are the probabilities with which so many successes, or more, and so many, or fewer, have a chance of 2.5%.
    """
    assert 0 <= successes <= trials and trials > 0
    count = torch.arange(trials + 1, dtype=torch.float64)
    whole = torch.tensor(trials + 1, dtype=torch.float64)
    ways = torch.lgamma(whole) - torch.lgamma(count + 1) - torch.lgamma(whole - count)  # log of trials choose count

    def chance(rate: float, part: slice) -> float:
        rate = torch.tensor(rate, dtype=torch.float64)
        return (ways + count * rate.log() + (trials - count) * torch.log1p(-rate))[part].exp().sum().item()

    def where(part: slice, rising: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):  # bisection, to 1e-15
            middle = (low + high) / 2
            if (chance(middle, part) < 0.025) == rising:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    low = where(slice(successes, None), rising=True) if successes else 0.0
    high = where(slice(0, successes + 1), rising=False) if successes < trials else 1.0
    return low, high
