"""How certain a comparison is: paired win rates with ties, means, medians, exact tests, intervals over prompts."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 10_000
CHUNK = 1 << 22  # elements held at once while resampling
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
    """Intervals by resampling prompts (Efron and Tibshirani 1993): expanded percentiles for means and medians, and for
    shares the interval described at `share`.

    Images of one prompt are alike, so they are drawn together; if there is only one prompt, its images are resampled,
    and the interval says nothing about other prompts. The seed is fixed, so that the same scores give the same
    interval, and all values of one evaluation are resampled with the same prompts.

    A prompt is weighted by its number of images. If these numbers differ, the prompts are worth fewer: `effective`,
    (sum of sizes)^2 / sum of squared sizes (Kish, Survey Sampling, 1965), which sets the degrees of freedom.
    """

    def __init__(self, prompts: Sequence[str], resamples: int = RESAMPLES) -> None:
        assert len(prompts) > 0 and resamples > 1
        number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self.group = torch.tensor([number[prompt] for prompt in prompts])  # int64 [N]: the prompt of each row
        if len(number) == 1:
            self.group = torch.arange(len(prompts))
        self.groups = int(self.group.max()) + 1
        self.sizes = torch.bincount(self.group)  # int64 [groups]: images of each prompt
        self.effective = len(prompts) ** 2 / int(self.sizes.square().sum())  # prompts; = groups where sizes are equal
        self.freedom = max(1.0, self.effective - 1)  # degrees of freedom
        generator = torch.Generator().manual_seed(0)
        # how often each resample holds each prompt: once on average, and over 255 times with a chance below 1 / 256!
        self.counts = torch.zeros(resamples, self.groups, dtype=torch.uint8)
        one = torch.ones((), dtype=torch.uint8)
        for part in self.counts.split(max(1, CHUNK // self.groups)):
            part.scatter_add_(1, torch.randint(self.groups, part.shape, generator=generator), one.expand(part.shape))

    def mean(self, values: Tensor) -> Interval:  # [N]
        """The mean of all rows, with its interval."""
        return self.percentiles(values.double().mean().item(), self._means(values))

    def share(self, looks: Tensor) -> Interval:  # [N], or [N, looks] with several looks per row: 0, 1, or 1/2 in a tie
        """The mean of all looks, with Wilson's interval at the bootstrap's variance.

        As in Korn and Graubard (Survey Methodology 24, 1998, 193), the looks are worth p (1 - p) / variance of p
        independent ones, since there are ties and the images of a prompt are alike. Wilson's score interval (1927) is
        taken at that number, with Student's t in place of the normal deviate; its degrees of freedom are the effective
        prompts less one. The variance is the bootstrap's over prompts, but at least that of independent looks and, if
        prompts have different numbers of images, at least that of their design (`_of_design`). If all looks are equal,
        each effective prompt is worth one look. Percentiles of the resampled share would instead cover too few true
        shares if these are near 0 or 1 or prompts are few, and would have no width if all prompts agree.

        If all looks are ties, nothing is in doubt: exactly 0.5 [0.5, 0.5]. A single row gives [0, 1].
        """
        looks = looks.double()
        if bool((looks == 0.5).all()):
            return Interval(0.5, 0.5, 0.5)
        share = looks.mean().item()
        if self.groups == 1:
            return Interval(share, 0.0, 1.0)
        odds = students_t(self.freedom) ** 2 / self._worth(looks)
        middle = (share + odds / 2) / (1 + odds)
        half = math.sqrt(odds * share * (1 - share) + odds**2 / 4) / (1 + odds)
        return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))

    def p_of_share(self, looks: Tensor) -> float:  # as for `share`
        """Two-sided p-value of the test, by the formula of `share`, that the true share is one half.

        It is below 0.05 where the interval of `share` excludes one half; for an effective number of prompts between
        whole numbers both are interpolated, and may disagree at the very edge. 1 for a single row.
        """
        looks = looks.double()
        if bool((looks == 0.5).all()) or self.groups == 1:
            return 1.0
        deviate = abs(looks.mean().item() - 0.5) * 2 * math.sqrt(self._worth(looks))
        return beyond_students_t(deviate, self.freedom)

    def _worth(self, looks: Tensor) -> float:  # fp64, not all ties, of several prompts
        """How many independent looks say as much about the share."""
        share = looks.mean().item()
        rows = looks.flatten(1).mean(1) if looks.dim() > 1 else looks
        corrected = self._means(rows).var().item() * (self.freedom + 1) / self.freedom
        variance = max(corrected, looks.var().item() / looks.numel(), self._of_design(rows))
        return share * (1 - share) / variance if variance > 0 else self.effective

    def median(self, values: Tensor) -> Interval:  # [N]
        """The median of all rows, with its interval; for an even number, halfway between the two in the middle."""
        ordered, order = values.double().sort()
        group = self.group[order]

        def medians(counts: Tensor) -> Tensor:
            upto = counts[:, group].cumsum(1, dtype=torch.int32)  # how many of a resample are at most this value
            total = upto[:, -1:]
            middle = torch.cat([(total + 1) // 2, total // 2 + 1], 1)  # the one or two in the middle, counted from 1
            return ordered[torch.searchsorted(upto, middle)].mean(1)

        return self.percentiles(values.double().quantile(0.5).item(), self._each(medians, len(values)))

    def sums(self, values: Tensor) -> Tensor:  # [N, columns] -> fp64 [resamples, columns]
        """The sums of all rows in each resample."""
        of_group = torch.zeros(self.groups, values.shape[1], dtype=torch.float64)
        of_group.index_add_(0, self.group, values.double())
        return self._each(lambda counts: counts.double() @ of_group, self.groups)

    def percentiles(self, value: float, resampled: Tensor) -> Interval:  # fp64 [resamples]
        """Return the value with expanded percentiles (Hesterberg, The American Statistician 69, 2015, 371).

        They lie further out as Student's t exceeds the normal deviate, and by sqrt(n / (n - 1)) for n effective
        prompts: plain percentiles cover too little if these are few.
        """
        if self.groups == 1:
            return Interval(value, resampled.min().item(), resampled.max().item())
        tail = 0.5 * math.erfc(students_t(self.freedom) * math.sqrt((self.freedom + 1) / self.freedom / 2))
        return Interval(value, *resampled.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist())

    def _of_design(self, rows: Tensor) -> float:  # fp64 [N]
        """The variance of the mean, given how correlated the images of one prompt are; 0 if all prompts have equally
        many images, where the bootstrap's variance is as good.

        variance / N^2 x sum of size (1 + (size - 1) correlation), correlation = 1 - the variance within prompts / that
        of all rows, in [0, 1] (Kish's design effect). The bootstrap's variance is far too small where the few prompts
        that lost are among those with few images.
        """
        if bool((self.sizes == self.sizes[0]).all()):
            return 0.0
        number = len(rows)
        whole = rows.var(correction=0).item()
        means = self._sums(rows) / self.sizes
        within = (rows - means[self.group]).square().sum().item() / (number - self.groups)
        correlation = min(max(1 - within / whole, 0.0), 1.0) if whole > 0 else 0.0
        others = int((self.sizes * (self.sizes - 1)).sum())
        return whole / number**2 * (number + correlation * others)

    def _sums(self, values: Tensor) -> Tensor:  # [N] -> fp64 [groups]
        return torch.zeros(self.groups, dtype=torch.float64).index_add_(0, self.group, values.double())

    def _means(self, values: Tensor) -> Tensor:  # [N] -> fp64 [resamples]
        both = torch.stack([self._sums(values), self.sizes.double()], 1)
        total = self._each(lambda counts: counts.double() @ both, self.groups)
        return total[:, 0] / total[:, 1]

    def _each(self, of: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """Apply `of` to all resamples, a few at a time: `width` elements are held for each."""
        return torch.cat([of(part) for part in self.counts.split(max(1, CHUNK // width))])


def win_rate(
    base: Tensor,  # scores [N] each, one pair per row
    policy: Tensor,
    prompts: Sequence[str],
    bootstrap: Bootstrap | None = None,  # over these prompts; None: made here
) -> WinRate:
    """Compare scores pair by pair, with the interval of `Bootstrap.share`. A model against itself gets exactly 0.5
    [0.5, 0.5]."""
    assert base.shape == policy.shape == (len(prompts),) and len(prompts) > 0
    rate = (bootstrap or Bootstrap(prompts)).share(outcomes(base, policy))
    wins, ties = int((policy > base).sum()), int((policy == base).sum())
    return WinRate(*rate, wins, ties, len(prompts) - wins - ties)


def outcomes(base: Tensor, policy: Tensor) -> Tensor:  # scores [N] each -> fp64 [N]
    """What each pair counts in a win rate: 1 where the policy wins, 1/2 in a tie, 0 where it loses."""
    return (policy > base).double() + 0.5 * (policy == base).double()


def by_prompt(base: Tensor, policy: Tensor, prompts: Sequence[str]) -> Counts:  # scores [N] each
    """Count prompts won, tied and lost: a prompt is won when more of its images are won than lost.

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
    """The median over the images of each prompt, in the order in which the prompts first appear."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return torch.stack([values[of_prompt].double().quantile(0.5) for of_prompt in rows.values()])


def binomial_interval(wins: int, trials: int) -> Interval:
    """The exact 95% interval of a share (Clopper and Pearson 1934) of independent trials without ties.

    It covers the true share in at least 95% of experiments, whatever the share is. With no trials it is [0, 1].
    """
    assert 0 <= wins <= trials
    if trials == 0:
        return Interval(0.5, 0.0, 1.0)
    tail = (1 - CONFIDENCE) / 2
    successes = torch.arange(trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(successes + 1) - torch.lgamma(trials - successes + 1)

    def share_with(chosen: slice, rising: bool) -> float:
        """Find by bisection the p at which the numbers of successes in `chosen` have total probability `tail`."""
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
    return min(1.0, 2 * total / 2**trials)  # integers until the division


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


def students_t(freedom: float) -> float:
    """The two-sided 95% quantile of Student's t, for `freedom` >= 1 degrees of freedom.

    Between integers it is linear in 1 / freedom, in which t is convex: never too small, and less than 1% too large for
    more than 3 degrees.
    """
    below = math.floor(freedom)
    if below == freedom:
        return _students_t(below)
    share = (1 / below - 1 / freedom) * below * (below + 1)  # of the way to the next integer
    return (1 - share) * _students_t(below) + share * _students_t(below + 1)


def beyond_students_t(deviate: float, freedom: float) -> float:
    """The probability that |t| exceeds `deviate` >= 0, for `freedom` >= 1; linear in 1 / freedom between integers."""

    def beyond(whole: int) -> float:
        return max(0.0, 1 - _within(whole)(math.atan(deviate / math.sqrt(whole))))

    below = math.floor(freedom)
    if below == freedom:
        return beyond(below)
    share = (1 / below - 1 / freedom) * below * (below + 1)  # of the way to the next integer
    return (1 - share) * beyond(below) + share * beyond(below + 1)


@lru_cache
def _students_t(freedom: int) -> float:
    """The quantile for a whole number of degrees of freedom, by bisection."""
    within, low, high = _within(freedom), 0.0, math.pi / 2
    while (angle := (low + high) / 2) not in (low, high):
        low, high = (angle, high) if within(angle) < CONFIDENCE else (low, angle)
    return math.sqrt(freedom) * math.tan(angle)


def _within(freedom: int) -> Callable[[float], float]:
    """The probability of |t| < sqrt(freedom) tan(angle), as a function of the angle: a sum of sines and cosines
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    step = torch.tensor(range(1 + odd, freedom - 1, 2), dtype=torch.float64)
    factors = torch.cat([torch.ones(1, dtype=torch.float64), step / (step + 1)]).cumprod(0)
    powers = odd + 2 * torch.arange(len(factors), dtype=torch.float64)

    def within(angle: float) -> float:
        terms = math.sin(angle) * (factors * math.cos(angle) ** powers).sum().item()
        return 2 / math.pi * (angle + terms * (freedom > 1)) if odd else terms

    return within


def interval95(share: float, n: int) -> list[float]:
    """The 95% interval [low, high] of a share of n independent cases: E. B. Wilson, JASA 22 (1927), 209."""
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
