"""Win rates with ties, exact tests, intervals and how often they hold the truth, and diversity."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from dpo_fast import statistics
from dpo_fast.statistics import (
    RESAMPLES,
    Bootstrap,
    beyond_students_t,
    binomial_interval,
    by_prompt,
    holm,
    median_of_prompt,
    outcomes,
    sign_test,
    students_t,
    win_rate,
)
from tests.helpers.seeds import SIGMAS

# Simulated coverages below keep their seeds: a bound that notices intervals too narrow by 0.02 is two to four standard
# errors from 0.95, and fresh samples would need to be ten times larger for one that is never crossed by chance.


def test_ties_count_half():
    base = torch.tensor([0.0, 1.0, 2.0, 3.0])
    rate = win_rate(base, torch.tensor([1.0, 1.0, 1.0, 5.0]), ["a", "b", "c", "d"])
    assert (rate.rate, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)


def test_a_model_against_itself_is_one_half():
    scores = torch.rand(50)
    assert win_rate(scores, scores, [str(k) for k in range(50)])[:3] == (0.5, 0.5, 0.5)


def test_without_a_tie_nothing_is_certain():
    """However alike prompts are: as many won in each, all won, each won as often as lost."""
    three = torch.tensor([1.0, 1.0, 1.0, -1.0] * 3)
    rate = win_rate(torch.zeros(12), three, [str(k // 4) for k in range(12)])
    assert rate.rate == 0.75 and rate.low < 0.5 and rate.high > 0.9
    nearly = torch.cat([three[:4]] * 19 + [torch.ones(4)])  # one prompt differs: no narrower than of 80 lone images
    rate = win_rate(torch.zeros(80), nearly, [str(k // 4) for k in range(80)])
    assert rate.high - rate.low > 2 * 1.96 * (rate.rate * (1 - rate.rate) / 80) ** 0.5
    prompts = [str(k // 2) for k in range(80)]
    even = win_rate(torch.zeros(80), torch.tensor([1.0, -1.0] * 40), prompts)
    assert even.low == pytest.approx(0.5 - (even.high - 0.5)) and 0.3 < even.low < 0.45
    won, lost = (win_rate(torch.zeros(80), torch.full((80,), sign), prompts) for sign in (1.0, -1.0))
    t = 2.0226909  # R's qt(0.975, 39)
    assert won[:3] == pytest.approx((1, 40 / (40 + t**2), 1)) and lost[:3] == pytest.approx((0, 0, 1 - won.low))
    one = win_rate(torch.zeros(80), torch.tensor([1.0] + [0.0] * 79), prompts)  # all but one are ties
    assert one.low < 0.5 < one.rate < one.high
    assert win_rate(torch.zeros(1), torch.ones(1), ["a"])[:3] == (1, 0, 1)


def test_base_and_policy_may_be_exchanged():
    base, policy = (torch.randint(0, 4, (60,)).double() for _ in range(2))
    prompts = [f"p{k}" for k in torch.randint(0, 25, (60,)).tolist()]
    one, other = win_rate(base, policy, prompts), win_rate(policy, base, prompts)
    assert other[:3] == pytest.approx((1 - one.rate, 1 - one.high, 1 - one.low), abs=1e-12)


def test_looks_at_a_row_are_not_ties():
    """Each pair right at one of two draws: their means are one half as a tie's are, and not for certain."""
    prompts = [str(k) for k in range(12)]
    of = Bootstrap(prompts).share(torch.tensor([[1.0, 0.0]] * 12))
    assert of.value == 0.5 and of.low < 0.4 and of.high > 0.6
    assert Bootstrap(prompts).share(torch.full((12, 2), 0.5)) == (0.5, 0.5, 0.5)


def test_students_t_is_that_of_tables():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 10: 2.22814, 30: 2.04227, 299: 1.96793}
    assert {freedom: students_t(freedom) for freedom in table} == pytest.approx(table, rel=2e-6)
    assert students_t(1_000_000) == pytest.approx(1.959966, abs=2e-6)


def test_between_whole_degrees_students_t_is_never_too_small():
    exact = {1.5: 6.0166, 2.5: 3.5746, 3.5: 2.94, 7.7: 2.3217, 33.3: 2.0338}  # by quadrature, rounded down
    for freedom, value in exact.items():
        assert value <= students_t(freedom) <= value * (1.01 if freedom > 3 else 1.2)
        assert students_t(math.ceil(freedom)) < students_t(freedom) < students_t(math.floor(freedom))


def test_the_interval_of_independent_prompts_is_the_binomials():
    policy = (torch.rand(2000) < 0.6).double() * 2 - 1
    rate = win_rate(torch.zeros(2000), policy, [str(k) for k in range(2000)])
    half = 1.96 * (rate.rate * (1 - rate.rate) / 2000) ** 0.5
    # Wilson's middle is up to 0.0002 aside; the width is off by the error of a standard deviation of 10,000 resamples
    off = 3e-4 + SIGMAS * half / (2 * RESAMPLES) ** 0.5
    assert rate.low == pytest.approx(rate.rate - half, abs=off)
    assert rate.high == pytest.approx(rate.rate + half, abs=off)
    assert win_rate(torch.zeros(2000), policy, [str(k) for k in range(2000)]) == rate


def test_images_of_one_prompt_are_not_independent():
    """Where all images of a prompt win or lose together, only the prompts count: the interval is as wide as theirs."""
    won = (torch.rand(40) < 0.5).double() * 2 - 1
    prompts = [str(k) for k in range(40)]
    few = win_rate(torch.zeros(40), won, prompts)
    many = win_rate(torch.zeros(400), won.repeat_interleave(10), [p for p in prompts for _ in range(10)])
    # the standard deviation of 10,000 resamples decides the one width; the other may be that of independent images
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=SIGMAS / (2 * RESAMPLES) ** 0.5)


def test_the_images_of_a_single_prompt_are_resampled_themselves():
    """Its one prompt come again and again would leave no doubt at all."""
    won = (torch.randperm(50) < 25).double() * 2 - 1
    alone = win_rate(torch.zeros(50), won, ["one"] * 50)
    assert alone == win_rate(torch.zeros(50), won, [str(k) for k in range(50)])
    assert alone.high - alone.low > 0.2 and Bootstrap(["one"] * 50).median(won).low < 1


@pytest.mark.parametrize(
    ("wins", "trials", "low", "high"),
    [  # R's binom.test
        (7, 10, 0.3475471, 0.9332605),
        (0, 10, 0.0, 0.3084971),
        (10, 10, 0.6915029, 1.0),
        (1, 1, 0.025, 1.0),
        (50, 100, 0.3983211, 0.6016789),
        (0, 0, 0.0, 1.0),
    ],
)
def test_the_exact_interval_is_that_of_tables(wins, trials, low, high):
    assert binomial_interval(wins, trials)[1:] == pytest.approx((low, high), abs=1e-7)


def test_the_exact_interval_leaves_a_fortieth_on_each_side():
    """Of 3200 trials; the tails are added up in whole numbers, at ends rounded to 2^-24."""

    def tail(p: float, wins: range) -> float:
        share = round(p * 2**24)
        term, total = math.comb(3200, wins[0]) * share ** wins[0] * (2**24 - share) ** (3200 - wins[0]), 0
        for k in wins:
            total += term
            term = term * (3200 - k) * share // ((k + 1) * (2**24 - share))
        return total / 2 ** (24 * 3200)

    of = binomial_interval(2070, 3200)
    assert tail(of.low, range(2070, 2400)) == pytest.approx(0.025, rel=1e-4)
    assert tail(of.high, range(1800, 2071)) == pytest.approx(0.025, rel=1e-4)


def test_the_exact_interval_holds_the_share_in_95_of_100_at_least():
    """Coverage summed over all outcomes, not simulated."""
    for trials in (5, 23, 60):
        intervals = [binomial_interval(wins, trials) for wins in range(trials + 1)]
        for p in torch.rand(200, dtype=torch.float64).tolist():
            chance = [math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1)]
            held = sum(c for c, of in zip(chance, intervals, strict=True) if of.low <= p <= of.high)
            assert held >= 0.95, (trials, p)


def test_the_sign_test_counts_outcomes():
    assert sign_test(7, 3) == sign_test(3, 7) == pytest.approx(0.34375)  # R's binom.test(7, 10)
    assert sign_test(0, 0) == sign_test(5, 5) == sign_test(5, 4) == 1.0
    assert sign_test(0, 12) == 2 / 2**12
    assert 0 <= sign_test(3000, 200) < 1e-300
    for wins, losses in torch.randint(0, 9, (20, 2)).tolist():
        trials = wins + losses
        as_far = [k for k in range(trials + 1) if abs(2 * k - trials) >= abs(wins - losses)]
        assert sign_test(wins, losses) == pytest.approx(sum(math.comb(trials, k) for k in as_far) / 2**trials)


def test_holm_corrects_the_smallest_most():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # R's p.adjust
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_beyond_students_t_is_that_of_tables():
    table = {(12.7062, 1): 0.05, (2.77645, 4): 0.05, (4.03214, 5): 0.01, (2.75, 30): 0.01, (0.0, 7): 1.0}  # R's pt
    for (deviate, freedom), p in table.items():
        assert beyond_students_t(deviate, freedom) == pytest.approx(p, rel=1e-4)
    assert beyond_students_t(2.0, 8) < beyond_students_t(2.0, 7.5) < beyond_students_t(2.0, 7)
    assert beyond_students_t(1e9, 30) < 1e-12


@pytest.mark.parametrize("images", [1, 3])
def test_p_is_below_a_twentieth_where_the_interval_excludes_one_half(images):
    sides = set()
    for _ in range(60):
        prompts = [str(k // images) for k in range(40 * images)]
        base, policy = (torch.randint(0, 3, (len(prompts),)).double() for _ in range(2))
        policy += 0.4 * torch.rand(1) * (torch.rand(len(prompts)) < 0.7)
        bootstrap = Bootstrap(prompts, 500)
        rate = win_rate(base, policy, prompts, bootstrap)
        p = bootstrap.p_of_share(outcomes(base, policy))
        assert (p < 0.05) == (not rate.low <= 0.5 <= rate.high), (rate, p)
        assert p == pytest.approx(bootstrap.p_of_share(outcomes(policy, base)))
        sides.add(p < 0.05)
    assert sides == {True, False}


def test_p_where_nothing_can_be_said_and_where_all_is_said():
    tied, won = torch.full((9,), 0.5), torch.ones(9)
    for prompts in (list("abcdefghi"), ["a"] * 9):  # of a single prompt, images are counted
        assert Bootstrap(prompts, 99).p_of_share(tied) == 1
        assert Bootstrap(prompts, 99).p_of_share(won) == pytest.approx(0.017072, rel=1e-4)  # R's 2 * pt(-3, 8)
    assert Bootstrap(["a"], 99).p_of_share(won[:1]) == 1


def test_prompts_are_won_by_the_majority_of_their_images():
    base, policy = torch.zeros(7), torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0, -1.0])
    assert by_prompt(base, policy, ["a", "a", "a", "b", "b", "c", "d"]) == (1, 2, 1)


def test_medians_of_prompts():
    values = torch.tensor([1.0, 5.0, 2.0, 7.0, 4.0])
    assert median_of_prompt(values, ["b", "a", "b", "b", "a"]).tolist() == [2.0, 4.5]


def test_means_and_medians_are_resampled_as_said():
    """Against resamples drawn in the plain way: the same prompts, all their images, numpy's median."""
    prompts = [f"p{k}" for k in torch.randint(0, 15, (40,)).tolist()]
    values = torch.randn(40, dtype=torch.float64)
    bootstrap = Bootstrap(prompts, resamples=300)
    distinct = list(dict.fromkeys(prompts))
    drawn = torch.randint(len(distinct), (300, len(distinct)), generator=torch.Generator().manual_seed(0)).tolist()
    picked = [
        [v for k in one for v, p in zip(values.tolist(), prompts, strict=True) if p == distinct[k]] for one in drawn
    ]
    for found, statistic in ((bootstrap.mean(values), np.mean), (bootstrap.median(values), np.median)):
        n = 40**2 / sum(prompts.count(prompt) ** 2 for prompt in distinct)  # Hesterberg's expanded tail, Kish's number
        tail = NormalDist().cdf(-students_t(n - 1) * math.sqrt(n / (n - 1)))
        ends = np.quantile([statistic(one) for one in picked], [tail, 1 - tail])
        assert found == pytest.approx((statistic(values.numpy()), *ends), abs=1e-12)


def test_resamples_are_drawn_a_few_at_a_time(monkeypatch):
    """As one draw would be, without its 8 bytes a number."""
    prompts, drawn = [str(k) for k in range(50)], []
    plain = torch.randint(50, (300, 50), generator=torch.Generator().manual_seed(0))
    randint = torch.randint

    def watched(high: int, shape: tuple[int, int], **options: torch.Generator) -> torch.Tensor:
        drawn.append(math.prod(shape))
        return randint(high, shape, **options)

    monkeypatch.setattr(torch, "randint", watched)
    monkeypatch.setattr(statistics, "CHUNK", 512)
    counts = Bootstrap(prompts, resamples=300).counts
    assert max(drawn) <= 512 and sum(drawn) == 300 * 50 and counts.element_size() == 1
    assert torch.equal(counts.long(), torch.stack([row.bincount(minlength=50) for row in plain]))


@pytest.mark.parametrize("prompts", [10, 20, 40, 51, 80])
def test_rates_of_one_image_a_prompt_are_held_in_93_of_100_at_least(prompts):
    """Summed over all outcomes, not simulated; one prompt fewer or more at the end of an interval shifts it by much."""
    names = [str(k) for k in range(prompts)]
    bootstrap = Bootstrap(names, resamples=2000)
    won = (torch.arange(prompts) < torch.arange(prompts + 1)[:, None]).double() * 2 - 1
    intervals = [win_rate(torch.zeros(prompts), of, names, bootstrap) for of in won]
    for rate in (0.5, 0.7, 0.8, 0.9, 0.95):
        chance = [math.comb(prompts, k) * rate**k * (1 - rate) ** (prompts - k) for k in range(prompts + 1)]
        held = sum(c for c, of in zip(chance, intervals, strict=True) if of.low <= rate <= of.high)
        assert 0.93 <= held <= (0.998 if prompts < 40 else 0.977), (prompts, rate, held)


@pytest.mark.parametrize("prompts", [10, 40])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_rates_of_images_alike_within_a_prompt_are_held(prompts, ties, rate):
    """1000 data sets of 3 images a prompt; half of what is not won is tied, at most 0.3."""
    sets, images = 1000, 3
    generator = torch.Generator().manual_seed(prompts)
    tied = min(0.3, 1 - rate) if ties else 0.0
    loss = 1 - rate - tied / 2
    latent = torch.randn(sets, prompts, 1, generator=generator) + torch.randn(
        sets, prompts, images, generator=generator
    )
    lost, less = (2**0.5 * torch.special.ndtri(torch.tensor(edge)) for edge in (loss, loss + tied))
    outcomes = ((latent > less).double() - (latent < lost).double()).flatten(1)
    names = [str(prompt) for prompt in range(prompts) for _ in range(images)]
    bootstrap, base = Bootstrap(names, resamples=500), torch.zeros(prompts * images)
    intervals = [win_rate(base, of, names, bootstrap) for of in outcomes]
    held = sum(of.low <= rate <= of.high for of in intervals) / sets
    assert 0.93 <= held <= (0.998 if prompts < 40 else 0.97), held


def test_intervals_hold_the_truth_in_95_of_100():
    """2000 data sets of 80 prompts, 3 images each that are alike within a prompt, a fifth of the comparisons ties."""
    sets, prompts, images = 2000, 80, 3
    generator = torch.Generator().manual_seed(2)
    liked = 0.35 + 0.5 * torch.randn(sets, prompts, 1, generator=generator)  # how well the policy does on a prompt
    gains = liked + torch.randn(sets, prompts, images, generator=generator)
    gains[gains.abs() < 0.25] = 0
    many = 0.35 + 0.5 * torch.randn(2_000_000, generator=generator) + torch.randn(2_000_000, generator=generator)
    rate = (many >= 0.25).double().mean() + 0.5 * (many.abs() < 0.25).double().mean()
    truth = {"rate": rate.item(), "mean": torch.where(many.abs() < 0.25, 0, many).double().mean().item()}
    names = [str(prompt) for prompt in range(prompts) for _ in range(images)]
    bootstrap = Bootstrap(names, resamples=1000)
    base, held = torch.zeros(prompts * images), dict.fromkeys(("rate", "mean"), 0)
    for gain in gains.flatten(1):
        of = win_rate(base, gain, names, bootstrap)
        held["rate"] += of.low <= truth["rate"] <= of.high
        of = bootstrap.mean(gain)
        held["mean"] += of.low <= truth["mean"] <= of.high
    for name, times in held.items():
        assert 0.93 <= times / sets <= 0.97, (name, times / sets)


def test_intervals_of_medians_hold_the_truth_in_95_of_100():
    """The same of continuous scores, where the median of the population is known: 0.35."""
    sets, prompts, images = 1500, 80, 3
    generator = torch.Generator().manual_seed(3)
    scores = 0.35 + 0.5 * torch.randn(sets, prompts, 1, generator=generator)
    scores = (scores + torch.randn(sets, prompts, images, generator=generator)).flatten(1)
    bootstrap = Bootstrap([str(prompt) for prompt in range(prompts) for _ in range(images)], resamples=400)
    held = sum(of.low <= 0.35 <= of.high for of in map(bootstrap.median, scores))
    assert 0.93 <= held / sets <= 0.97, held / sets


def test_few_prompts_have_wider_intervals_of_the_mean():
    """Plain percentiles hold too few."""
    sets, prompts = 2000, 12
    scores = torch.randn(sets, prompts, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    bootstrap = Bootstrap([str(prompt) for prompt in range(prompts)], resamples=1000)
    held = sum(of.low <= 0 <= of.high for of in map(bootstrap.mean, scores))
    assert 0.93 <= held / sets <= 0.97, held / sets


UNEVEN = {"1, 2, 20": (1, 2, 20), "1 to 8": range(1, 9), "20 of a tenth": (20, *[1] * 9)}


def alike(sets: int, images: list[int], correlation: float, generator: torch.Generator) -> torch.Tensor:
    """Standard normal scores fp64 [sets, sum of images], those of one prompt correlated."""
    of_prompt = torch.randn(sets, len(images), generator=generator, dtype=torch.float64)
    of_image = torch.randn(sets, sum(images), generator=generator, dtype=torch.float64)
    of_prompt = of_prompt.repeat_interleave(torch.tensor(images), 1)
    return correlation**0.5 * of_prompt + (1 - correlation) ** 0.5 * of_image


@pytest.mark.parametrize("design", UNEVEN)
@pytest.mark.parametrize("correlation", [0.1, 0.9])
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_rates_of_very_different_numbers_of_images_are_held(design, correlation, rate):
    """600 data sets of 40 prompts. With as many degrees of freedom as prompts, and the bootstrap's variance alone, the
    lowest of these is 0.85."""
    sets, generator = 600, torch.Generator().manual_seed(5)
    images = [UNEVEN[design][k % len(UNEVEN[design])] for k in range(40)]
    names = [str(prompt) for prompt, number in enumerate(images) for _ in range(number)]
    won = alike(sets, images, correlation, generator) < torch.special.ndtri(torch.tensor(rate, dtype=torch.float64))
    bootstrap = Bootstrap(names, resamples=300)
    held = sum(of.low <= rate <= of.high for of in map(bootstrap.share, won.double())) / sets
    assert held >= 0.93, held


@pytest.mark.parametrize("correlation", [0.1, 0.9])
def test_means_and_medians_of_very_different_numbers_of_images_are_held(correlation):
    sets, generator = 600, torch.Generator().manual_seed(6)
    images = [(1, 2, 20)[k % 3] for k in range(21)]
    bootstrap = Bootstrap([str(k) for k, number in enumerate(images) for _ in range(number)], resamples=300)
    for statistic in (bootstrap.mean, bootstrap.median):
        intervals = map(statistic, alike(sets, images, correlation, generator))
        held = sum(of.low <= 0 <= of.high for of in intervals) / sets
        assert held >= 0.93, held


def test_prompts_with_as_many_images_each_have_exactly_these_intervals():
    """To the bit those of before prompts with different numbers of images were weighed."""
    expected = {
        (1, 5): (0.20408829270551931, 0.984226492813764, -0.43240356525333923, 0.6503047006444317),
        (2, 3): (0.003383039524036069, 0.9866038015107385, -0.2646004339183687, -0.05025581946193492),
        (7, 1): (0.10928974530798707, 0.8209287381417224, -0.9245578819235714, 1.0664559142306378),
        (30, 4): (0.3925341493123395, 0.5914588774738194, -0.22904065944256932, 0.16281133946622842),
    }
    for (prompts, images), numbers in expected.items():
        generator = torch.Generator().manual_seed(prompts)
        values = torch.randn(prompts * images, generator=generator, dtype=torch.float64)
        bootstrap = Bootstrap([str(k) for k in range(prompts) for _ in range(images)], 200)
        assert bootstrap.effective == (prompts if prompts > 1 else images)
        share, mean = bootstrap.share((values > 0).double()), bootstrap.mean(values)
        assert (*share[1:], *mean[1:]) == pytest.approx(numbers, rel=1e-12)  # other machines sum in another order


def test_one_prompt_with_nearly_all_images_tells_little_of_the_others():
    names = ["much"] * 100 + [str(k) for k in range(20)]
    bootstrap = Bootstrap(names, 500)
    assert bootstrap.effective == 120**2 / (100**2 + 20) and bootstrap.freedom == 1
    of = bootstrap.share(torch.tensor([1.0] * 100 + [0.0] * 20))
    assert of.low < 0.1 and of.high > 0.9
