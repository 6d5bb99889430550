"""How sure a comparison is: paired win rates with ties, means, medians, exact tests, intervals over prompts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 10_000
CHUNK = 1 << 22  # numbers held at once while resampling
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


class Counts(NamedTuple):
    """How many comparisons the policy won, tied and lost."""

    wins: int
    ties: int
    losses: int


class Bootstrap:
    """Intervals by resampling prompts (Efron and Tibshirani 1993, chapter 13: the percentile interval).

    Images of one prompt come and go together, since they are alike; where there is only one prompt its images are
    resampled, and the interval says nothing of others. From a fixed seed, so that the same scores give the same
    interval, and every value of one evaluation is resampled with the same prompts.
    """

    def __init__(self, prompts: Sequence[str], resamples: int = RESAMPLES) -> None:
        assert len(prompts) > 0 and resamples > 0
        number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self.group = torch.tensor([number[prompt] for prompt in prompts])  # int64 [N]: the prompt of each row
        if len(number) == 1:
            self.group = torch.arange(len(prompts))
        generator = torch.Generator().manual_seed(0)
        groups = int(self.group.max()) + 1
        drawn = torch.randint(groups, (resamples, groups), generator=generator)
        self.counts = torch.zeros(drawn.shape, dtype=torch.int16)  # how often a resample holds each prompt
        self.counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.int16).expand(drawn.shape))

    def mean(self, values: Tensor) -> Interval:  # [N]
        """The mean of all rows."""
        values = values.double()
        sums = torch.zeros(self.counts.shape[1], dtype=torch.float64).index_add_(0, self.group, values)
        sizes = torch.bincount(self.group, minlength=len(sums)).double()
        both = torch.stack([sums, sizes], 1)
        total = self._each(lambda counts: counts.double() @ both, self.counts.shape[1])
        return _percentiles(values.mean().item(), total[:, 0] / total[:, 1])

    def median(self, values: Tensor) -> Interval:  # [N]
        """The median of all rows; of an even number, halfway between the two in the middle."""
        ordered, order = values.double().sort()
        group = self.group[order]

        def medians(counts: Tensor) -> Tensor:
            upto = counts[:, group].cumsum(1, dtype=torch.int32)  # how many of a resample are at most this value
            total = upto[:, -1:]
            middle = torch.cat([(total + 1) // 2, total // 2 + 1], 1)  # the one or two in the middle, counted from 1
            return ordered[torch.searchsorted(upto, middle)].mean(1)

        return _percentiles(values.double().quantile(0.5).item(), self._each(medians, len(values)))

    def _each(self, of: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """`of` of all resamples, a few at a time: `width` numbers are held for each."""
        return torch.cat([of(part) for part in self.counts.split(max(1, CHUNK // width))])


def win_rate(
    base: Tensor,  # scores [N] each, row by row a pair
    policy: Tensor,
    prompts: Sequence[str],
    bootstrap: Bootstrap | None = None,  # over these prompts; None: made here
) -> WinRate:
    """Compare scores pair by pair. A model against itself has exactly 0.5 [0.5, 0.5]."""
    assert base.shape == policy.shape == (len(prompts),) and len(prompts) > 0
    rate = (bootstrap or Bootstrap(prompts)).mean((policy > base).double() + 0.5 * (policy == base).double())
    wins, ties = int((policy > base).sum()), int((policy == base).sum())
    return WinRate(*rate, wins, ties, len(prompts) - wins - ties)


def by_prompt(base: Tensor, policy: Tensor, prompts: Sequence[str]) -> Counts:  # scores [N] each
    """Prompts won, tied and lost: a prompt is won when more of its images are won than lost.

    Prompts are independent of each other, images of one prompt are not: these are the counts that the exact interval
    and the sign test may be applied to.
    """
    number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([number[prompt] for prompt in prompts])
    lead = torch.zeros(len(number), dtype=torch.int64).index_add_(
        0, group, (policy > base).long() - (policy < base).long()
    )
    return Counts(int((lead > 0).sum()), int((lead == 0).sum()), int((lead < 0).sum()))


def median_of_prompt(values: Tensor, prompts: Sequence[str]) -> Tensor:  # [N] -> fp64 [distinct prompts]
    """The median over the images of each prompt, in the order in which the prompts first come."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return torch.stack([values[of_prompt].double().quantile(0.5) for of_prompt in rows.values()])


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


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test: how often equal models would differ at least as much. No ties."""
    trials, ways, total = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        total += ways
        ways = ways * (trials - k) // (k + 1)
    return min(1.0, 2 * total / 2**trials)  # whole numbers until the division


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for there being several of them (Holm 1979), in the order given.

    Calling those below 0.05 different is wrong about any one of them in at most 5% of evaluations.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def spread(images: Tensor) -> Tensor:  # uint8 [N,3,H,W], at least two -> fp64 []
    """The root mean square distance of pixels in [0, 1], the mean over every two of the images."""
    flat = images.flatten(1).double() / 255
    return torch.pdist(flat).mean() / flat.shape[1] ** 0.5


def _percentiles(value: float, resampled: Tensor) -> Interval:  # fp64 [resamples]
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    return Interval(value, *resampled.quantile(tails).tolist())
