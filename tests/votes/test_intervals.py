"""Rates by votes and by majority: values by hand, variances against plain loops and drawn resamples, coverage."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from benchmarks.vote_intervals import WORLDS, both_rates
from dpo_fast.statistics import Bootstrap, students_t
from dpo_fast.votes.intervals import ALIKE, FEW, ONE_PROMPT, ONE_VOTER, between, effective, rates, shared, won


def drawn(generator, prompts=12, voters=6, votes=3, seeds=1, taste=0.7):
    """second, comparison, prompt, voter of votes with effects of prompts and voters, and ties."""
    comparison = np.repeat(np.arange(prompts * seeds), votes)
    prompt = comparison // seeds
    voter = np.concatenate([generator.permutation(voters)[:votes] for _ in range(prompts * seeds)])
    voter = np.unique(voter, return_inverse=True)[1]
    at = 0.3 + generator.normal(size=prompts)[prompt] + taste * generator.normal(size=voters)[voter]
    at += generator.normal(size=len(at))
    return 0.5 * (at > 0.3) + 0.5 * (at > -0.3), comparison, prompt, voter


def one_a_prompt(outcomes):
    """Votes on a comparison of each prompt: a row a prompt, a column a voter."""
    prompts, voters = np.indices(np.shape(outcomes))
    return np.ravel(outcomes).astype(float), prompts.ravel(), prompts.ravel(), voters.ravel()


def test_rates_by_hand():
    """Four prompts: 3:0, 2:1, 1 and two ties, 1:1 and a tie."""
    found = rates(*one_a_prompt([[1, 1, 1], [1, 0, 1], [0, 0.5, 0.5], [1, 0, 0.5]]))
    assert found.majority.value == (1 + 1 + 0 + 0.5) / 4
    assert found.votes.value == pytest.approx((3 + 2 + 1 + 1.5) / 12)
    assert found.note is None


def test_who_wins():
    assert won(np.array([3.0, 1.0, 0.0, -1.0])).tolist() == [1, 1, 0.5, 0]


def test_variances_are_those_of_plain_loops(seed):
    """Cameron, Gelbach and Miller's three sums over pairs of votes that share a prompt, a voter, or both."""
    second, _, prompt, voter = drawn(np.random.default_rng(seed), seeds=2)
    number = len(second)
    away = (second - second.mean()) / number
    of_prompts = of_voters = of_both = 0.0
    for i, j in product(range(number), repeat=2):
        product_ = away[i] * away[j]
        of_prompts += product_ * (prompt[i] == prompt[j])
        of_voters += product_ * (voter[i] == voter[j])
        of_both += product_ * (prompt[i] == prompt[j] and voter[i] == voter[j])
    free = [effective(group) for group in (prompt, voter)]
    cell = prompt * 100 + voter
    assert between(second, prompt).variance == pytest.approx(of_prompts * free[0] / (free[0] - 1))
    assert shared(second, cell, voter).variance == pytest.approx(max(0, of_voters * free[1] / (free[1] - 1) - of_both))


def test_the_interval_by_votes_is_the_formula(seed):
    """Wilson's, with both parts and their own Student's t, computed here once more."""
    second, comparison, prompt, voter = drawn(np.random.default_rng(seed), prompts=30)
    found = rates(second, comparison, prompt, voter).votes
    cell = prompt * 100 + voter
    prompts, voters = between(second, prompt), shared(second, cell, voter)
    p = second.mean()
    floor = ALIKE * FEW / (FEW + len(second) * min(p, 1 - p)) / effective(voter)
    t_prompts, t_voters = students_t(29), students_t(effective(voter) - 1)
    odds = t_prompts**2 * max(prompts.variance, second.var(ddof=1) / len(second)) / (p * (1 - p))
    odds += max(t_voters**2 * voters.variance / (p * (1 - p)), t_prompts**2 * floor)
    for end in (found.low, found.high):  # where (p - x)^2 = odds x (1 - x)
        assert (p - end) ** 2 == pytest.approx(odds * end * (1 - end), rel=1e-9)


def test_the_part_of_prompts_is_that_of_many_resamples(seed):
    generator = np.random.default_rng(seed)
    second, _, prompt, voter = drawn(generator)
    sums = np.bincount(prompt, second)
    for group, shares in ((prompt, sums / 3), (voter, None)):
        groups = group.max() + 1
        weights = generator.multinomial(groups, np.full(groups, 1 / groups), 20_000)[:, group]
        # linear, as for a mean whose number of votes is fixed
        drawn_ = (weights * (second - second.mean())).sum(1) / len(second)
        correction = effective(group) / (effective(group) - 1)
        assert between(second, group).variance == pytest.approx(drawn_.var() * correction, rel=0.08)
        if shares is not None:
            assert between(second, group).variance == pytest.approx(shares.var(ddof=1) / groups)


def test_weights_that_multiply_count_the_chance_of_votes_three_times(seed):
    """What the docstring says of the crossed bootstrap, by drawing it."""
    generator = np.random.default_rng(seed)
    second, _, prompt, voter = drawn(generator, prompts=30, voters=10, taste=0.0)
    away = (second - second.mean()) / len(second)
    weights = generator.multinomial(30, np.full(30, 1 / 30), 20_000)[:, prompt]
    weights = weights * generator.multinomial(10, np.full(10, 0.1), 20_000)[:, voter]
    of = [np.square(np.bincount(group, away)).sum() for group in (prompt, voter, prompt * 10 + voter)]
    assert (weights * away).sum(1).var() == pytest.approx(sum(of), rel=0.15)
    assert sum(of) > 1.5 * (of[0] + of[1] - of[2])


def test_the_part_of_voters_in_majorities_leaves_out_one_vote_at_a_time(seed):
    """Against loops that count again without each vote."""
    second, comparison, prompt, voter = drawn(np.random.default_rng(seed), prompts=15, voters=5, votes=4)

    def majority(rows):
        lead = sum(1 if second[k] == 1 else -1 if second[k] == 0 else 0 for k in rows)
        return 1.0 if lead > 0 else 0.0 if lead < 0 else 0.5

    swayed = np.zeros(len(second))
    for k in range(len(second)):
        rows = [j for j in range(len(second)) if comparison[j] == comparison[k]]
        swayed[k] = (majority(rows) - majority([j for j in rows if j != k])) * len(second) / 15
    majorities = np.array([majority(np.flatnonzero(comparison == c)) for c in range(15)])
    assert rates(second, comparison, prompt, voter).majority.value == pytest.approx(majorities.mean())
    voters = shared(swayed, prompt * 100 + voter, voter)
    p, end = majorities.mean(), rates(second, comparison, prompt, voter).majority.low
    odds = students_t(14) ** 2 * max(majorities.var(ddof=1) / 15, 0) / (p * (1 - p))
    floor = ALIKE * FEW / (FEW + 15 * min(p, 1 - p)) / effective(voter)
    odds += max(students_t(effective(voter) - 1) ** 2 * voters.variance / (p * (1 - p)), students_t(14) ** 2 * floor)
    assert (p - end) ** 2 == pytest.approx(odds * end * (1 - end), rel=1e-9)


def test_one_vote_each_is_its_majority(seed):
    second, comparison, prompt, voter = drawn(np.random.default_rng(seed), prompts=40, votes=1)
    found = rates(second, comparison, prompt, voter)
    assert found.majority == pytest.approx(found.votes)


@pytest.mark.parametrize("seeds", [1, 2])
def test_swapped_models_mirror_everything(seed, seeds):
    second, *rest = drawn(np.random.default_rng(seed), seeds=seeds)
    for one, other in zip(rates(second, *rest)[:2], rates(1 - second, *rest)[:2], strict=True):
        assert (other.value, other.low, other.high) == pytest.approx((1 - one.value, 1 - one.high, 1 - one.low))


def test_neither_order_nor_names_matter(seed):
    generator = np.random.default_rng(seed)
    votes = drawn(generator, seeds=2)
    found = rates(*votes)
    order = generator.permutation(len(votes[0]))
    shuffled = rates(*(of[order] for of in votes))
    renamed = rates(votes[0], *(generator.permutation(of.max() + 1)[of] for of in votes[1:]))
    for other in (shuffled, renamed):
        assert np.concatenate(other[:2]) == pytest.approx(np.concatenate(found[:2]), abs=1e-12)


def test_five_people_of_many_votes_are_not_many_people(seed):
    """Tastes differ much: five voters on 200 prompts tell less than 200 voters, and hardly more than on 50 prompts."""
    generator = np.random.default_rng(seed)

    def width(prompts, voters):
        widths = []
        for _ in range(20):
            second, comparison, prompt, voter = drawn(generator, prompts, voters, 5, taste=1.5)
            found = rates(second, comparison, prompt, voter)
            widths.append([found.majority.high - found.majority.low, found.votes.high - found.votes.low])
        return np.mean(widths, 0)

    five, many, fewer = width(200, 5), width(200, 200), width(50, 5)
    assert (five > 2 * many).all() and (five > 0.6 * fewer).all()


def test_nothing_is_certain_but_more_prompts_and_voters_tell_more():
    def widths(outcome, prompts, voters):
        found = rates(*one_a_prompt(np.full((prompts, voters), outcome)))
        return [of.high - of.low for of in found[:2]]

    for outcome in (0.0, 0.5, 1.0):
        few, more, many = widths(outcome, 10, 3), widths(outcome, 100, 3), widths(outcome, 100, 20)
        assert all(0 < m < o < f < 1 for f, o, m in zip(few, more, many, strict=True)), (few, more, many)
    found = rates(*one_a_prompt(np.ones((10, 3))))
    assert found.majority.high == found.votes.high == 1.0 and found.majority.low < 0.75


def test_one_voter_says_nothing_of_others_and_is_an_interval_over_prompts(seed):
    """Nearly that of the scorers' win rates, whose variance is drawn."""
    generator = np.random.default_rng(seed)
    second = generator.choice([0.0, 0.5, 1.0, 1.0], 60)
    numbers = np.arange(60)
    found = rates(second, numbers, numbers, np.zeros(60, int))
    scorer = Bootstrap([str(k) for k in numbers], 20_000).share(torch.from_numpy(second))
    assert found.note == ONE_VOTER
    assert found.votes == pytest.approx(scorer, abs=0.01) and found.majority == pytest.approx(found.votes)


def test_one_prompt_one_comparison_one_vote():
    several = rates(np.array([1, 1, 0, 1.0]), np.arange(4), np.zeros(4, int), np.array([0, 1, 0, 1]))
    assert several.note == ONE_PROMPT and 0 < several.votes.low < 0.75 < several.votes.high < 1
    alone = rates(np.array([1, 1, 0, 1.0]), np.zeros(4, int), np.zeros(4, int), np.arange(4))
    assert alone.note == ONE_PROMPT and alone.majority == (1.0, 0.0, 1.0)
    assert 0 < alone.votes.low < 0.75 < alone.votes.high < 1
    single = rates(np.array([1.0]), *np.zeros((3, 1), int))
    assert single.majority == single.votes == (1.0, 0.0, 1.0)
    assert single.note == f"{ONE_PROMPT}; {ONE_VOTER}"


def test_two_voters_of_opposite_taste_tell_nothing():
    found = rates(*one_a_prompt(np.tile([1.0, 0.0], (100, 1))))
    assert found.votes.value == 0.5 and found.votes.low < 0.05 and found.votes.high > 0.95


@pytest.mark.parametrize("poison", [0, 1, 2, 3])
def test_intervals_hold_their_value_and_stay_within_0_and_1(seed, poison):
    """Whatever is voted: uneven voters and prompts, unanimity, ties, few of everything."""
    generator = np.random.default_rng(seed + poison)
    for _ in range(100):
        number = int(generator.integers(1, 30))
        second = generator.choice(
            [0.0, 0.5, 1.0], number, p=[(1, 0, 0), (0, 0, 1), (0.1, 0, 0.9), (0.3, 0.4, 0.3)][poison]
        )
        codes = (
            np.unique(generator.integers(0, generator.integers(1, 12), number), return_inverse=True)[1] for _ in "cv"
        )
        comparison, voter = codes
        prompt = np.unique((comparison // 2), return_inverse=True)[1]
        for of in rates(second, comparison, prompt, voter)[:2]:
            assert 0 <= of.low <= of.value <= of.high <= 1 and of.high > of.low, (of, second, comparison, voter)
            assert all(map(math.isfinite, of))


# The seeds of simulated coverages are kept: fresh samples would have to be far larger for a bound that chance never
# crosses. All of them, with more data sets: benchmarks/vote_intervals.py.


@pytest.mark.parametrize("rate", [0.5, 0.9])
@pytest.mark.parametrize("world", WORLDS[:4], ids=lambda world: world.name)
def test_rates_are_held_by_their_intervals(world, rate):
    row = both_rates(world, rate, prompts=50, voters=10, sets=400, generator=np.random.default_rng(0))
    for of in ("majority", "votes"):
        assert 0.92 <= row[of]["share"] <= 0.995, (of, row[of])
