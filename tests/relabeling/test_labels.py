"""Labels from scores against plain arithmetic; agreement; the exact interval."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from dpo_fast.errors import BadInput
from dpo_fast.relabeling.labels import Rule, agreement, label
from dpo_fast.relabeling.pair_scores import Scores
from dpo_fast.statistics import binomial_interval

EPS = np.finfo(np.float64).eps
SOFT_ATOL = 4 * EPS  # a soft label is 1/2 and the half of a tanh, each known to half an ulp, whatever is left of them


def scores_of(**pairs: np.ndarray) -> Scores:
    n = len(next(iter(pairs.values())))
    return Scores(np.arange(n), pairs, [], n)


def rule(*, temperature=None, keep_fraction=None, min_margin=None, **weights: float) -> Rule:
    return Rule(weights, temperature, keep_fraction, min_margin)


@pytest.fixture
def two(seed) -> Scores:
    random = np.random.default_rng(seed)
    one, other = random.normal(3, 2, (50, 2)), random.normal(-40, 30, (50, 2))
    one[7, 0] = one[7, 1]
    return scores_of(one=one, other=other)


def test_one_scorer_keeps_its_own_unit(two):
    found = label(two, rule(one=1.0))
    difference = two.of["one"][:, 0] - two.of["one"][:, 1]
    assert np.array_equal(found.margin, difference)
    assert np.array_equal(found.label, np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5)))
    assert found.label[7] == 0.5 and found.kept.all()
    soft = label(two, rule(one=1.0, temperature=0.7)).label
    np.testing.assert_allclose(soft, 1 / (1 + np.exp(-difference / 0.7)), rtol=0, atol=SOFT_ATOL)
    against = label(two, rule(one=-1.0)).label
    assert np.array_equal(against, 1 - found.label)


def test_several_are_standardised_before_they_are_weighted(two, seed):
    found = label(two, rule(one=1.0, other=0.5, temperature=2.0))
    wanted, terms = 0.0, 0.0  # terms: what the scores themselves add to a margin, in which they may cancel
    for name, weight in (("one", 1.0), ("other", 0.5)):
        difference = two.of[name][:, 0] - two.of[name][:, 1]
        scale = np.sqrt((difference**2).mean())
        wanted, terms = wanted + weight * difference / scale, terms + weight * np.abs(two.of[name]).sum(1) / scale
    # about ten roundings of half an ulp (scores, difference, scale, product, quotient, sum) on each of the two sides
    rounding = 16 * EPS * terms
    assert (np.abs(found.margin - wanted) <= rounding).all()
    soft = 1 / (1 + np.exp(-wanted / 2))
    assert (np.abs(found.label - soft) <= SOFT_ATOL + rounding / 8).all()  # 1/8: the steepest slope of this sigmoid
    # the unit of a scorer, and which image is first, are nothing to it
    flips = np.random.default_rng(seed + 1).random(50) < 0.5
    of = {name: np.where(flips[:, None], pair[:, ::-1], pair) for name, pair in two.of.items()}
    other = label(scores_of(one=1000 * of["one"], other=of["other"]), rule(one=1.0, other=0.5))
    assert (np.abs(other.margin - np.where(flips, -wanted, wanted)) <= rounding).all()


def test_soft_labels_do_not_overflow():
    found = label(scores_of(one=np.array([[1e6, 0], [0, 1e6], [2, 2]])), rule(one=1.0, temperature=1e-3))
    assert found.label.tolist() == [1, 0, 0.5]


def test_the_largest_margins_are_kept(two):
    size = np.abs(label(two, rule(one=1.0)).margin)
    found = label(two, rule(one=1.0, keep_fraction=0.3)).kept
    assert found.sum() == 15 and size[found].min() >= size[~found].max()
    limit = float(np.median(size))
    assert np.array_equal(label(two, rule(one=1.0, min_margin=limit)).kept, size >= limit)
    assert label(two, rule(one=1.0, keep_fraction=1e-9)).kept.sum() == 1
    equal = scores_of(one=np.array([[1.0, 0]] * 5 + [[3.0, 0]]))
    assert label(equal, rule(one=1.0, keep_fraction=0.5)).kept.tolist() == [True, True, False, False, False, True]


def test_what_cannot_be_labelled_is_refused(two):
    with pytest.raises(BadInput, match="scorer same gives both images"):
        label(scores_of(same=np.ones((4, 2)), **{}), rule(same=1.0))
    with pytest.raises(BadInput, match=r"--min_margin \(1e\+09\) keeps no pair: the largest margin is"):
        label(two, rule(one=1.0, min_margin=1e9))
    with pytest.raises(BadInput, match="no pair can be scored"):
        label(scores_of(one=np.empty((0, 2))), rule(one=1.0))


def test_agreement_counts_ties_of_either_apart():
    margin = np.array([2.0, -1, 3, -4, 0, 0, 5, 1e-30])
    human = np.array([1, 0, 0.3, 0.2, 1, 0.5, 0.5, 1])
    found = agreement(margin, human)
    assert (found.agree, found.disagree) == (4, 1)
    assert (found.tied_by_people, found.tied_by_scorer, found.tied_by_both) == (1, 1, 1)
    assert found[:3] == binomial_interval(4, 5) and found.rate == 0.8
    nobody = agreement(np.zeros(3), np.array([0.5, 1, 0]))
    assert nobody[:5] == (None, None, None, 0, 0) and nobody[5:] == (0, 2, 1)


@pytest.mark.parametrize("wins, trials", [(0, 1), (12, 12), (3, 10), (17, 40), (95, 100)])
def test_the_interval_is_exact(wins, trials):
    """In rational arithmetic: at each end the chance of so many or a rarer number is 2.5%."""

    def chance(rate: float, numbers: range) -> float:
        p = Fraction(rate)
        return float(sum(comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in numbers))

    share, low, high = binomial_interval(wins, trials)
    assert share == wins / trials and 0 <= low <= share <= high <= 1
    assert low == 0 if wins == 0 else chance(low, range(wins, trials + 1)) == pytest.approx(0.025, rel=1e-9)
    assert high == 1 if wins == trials else chance(high, range(wins + 1)) == pytest.approx(0.025, rel=1e-9)


@pytest.mark.slow
def test_the_interval_of_as_many_pairs_as_pickapic_has():
    share, low, high = binomial_interval(500_000, 851_293)
    half = 1.959964 * (share * (1 - share) / 851_293) ** 0.5
    assert (low, high) == pytest.approx((share - half, share + half), abs=2e-6)
