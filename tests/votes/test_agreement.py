"""Krippendorff's alpha against the package of that name, by hand, and where it is not defined."""

import math
from statistics import NormalDist

import krippendorff
import numpy as np
import pytest
import torch

from dpo_fast.statistics import students_t
from dpo_fast.votes.agreement import RESAMPLES, agreement
from tests.votes.drawn import drawn, vote


def by_the_package(votes):
    """The package takes a matrix of coders and units, with NaN for what is missing."""
    voters = list(dict.fromkeys(v.voter for v in votes))
    comparisons = list(dict.fromkeys(v.comparison for v in votes))
    matrix = np.full((len(voters), len(comparisons)), np.nan)
    for v in votes:
        matrix[voters.index(v.voter), comparisons.index(v.comparison)] = v.outcome
    return krippendorff.alpha(matrix, level_of_measurement="nominal")


@pytest.mark.parametrize("votes_each", [2, 3, 5])
def test_alpha_is_that_of_the_package_with_votes_missing(seed, votes_each):
    generator = np.random.default_rng(seed)
    votes = drawn(2, 40, 7, votes_each, generator)
    votes = [v for v in votes if generator.random() < 0.7]  # some comparisons keep one vote, or none
    assert agreement(votes).alpha == pytest.approx(by_the_package(votes), abs=1e-12)


def test_alpha_of_random_votes_is_near_0_and_of_like_minds_near_1(seed):
    generator = np.random.default_rng(seed)
    random = [vote(c, str(v), generator.choice([0.0, 0.5, 1.0])) for c in range(400) for v in range(4)]
    assert abs(agreement(random).alpha) < 0.15
    alike = [v._replace(outcome=(v.comparison % 3) / 2) for v in random]
    assert agreement(alike).alpha == pytest.approx(1.0)
    odd = [v._replace(outcome=generator.choice([0.0, 0.5, 1.0])) if generator.random() < 0.1 else v for v in alike]
    assert 0.75 < agreement(odd).alpha < 0.98


def test_alpha_by_hand():
    """Two voters, three comparisons: both wins; a win and a tie; both losses. Two of six coincidences differ."""
    votes = [vote(0, "a", 1), vote(0, "b", 1), vote(1, "a", 1), vote(1, "b", 0.5), vote(2, "a", 0), vote(2, "b", 0)]
    observed, expected = 2 / 6, (6**2 - 3**2 - 1**2 - 2**2) / (6 * 5)
    assert agreement(votes).alpha == pytest.approx(1 - observed / expected)


def test_alpha_is_not_defined_where_nothing_can_be_said():
    one_voter = [vote(c, "a", c % 2) for c in range(10)]
    no_overlap = [vote(c, str(c), c % 2) for c in range(10)]
    all_equal = [vote(c, v, 1.0) for c in range(10) for v in "abc"]
    for votes in ([], one_voter, no_overlap, all_equal):
        assert agreement(votes) == (None, None)
    with pytest.raises(ValueError):  # the package refuses it as well
        by_the_package(all_equal)


def test_comparisons_with_one_vote_do_not_count(seed):
    votes = drawn(2, 20, 5, 3, np.random.default_rng(seed))
    single = [vote(1000 + k, "alone", k % 2) for k in range(50)]
    assert agreement(votes + single) == agreement(votes)


def test_alpha_knows_neither_order_nor_names_nor_which_model_is_first(seed):
    generator = np.random.default_rng(seed)
    votes = drawn(2, 30, 6, 4, generator)
    found = agreement(votes)
    shuffled = [votes[k] for k in generator.permutation(len(votes))]
    renamed = [v._replace(voter=f"{v.voter[::-1]} x") for v in votes]
    swapped = [v._replace(outcome=1 - v.outcome, models=v.models[::-1]) for v in votes]
    assert agreement(votes) == found  # nothing is drawn anew
    for other in (shuffled, renamed, swapped):
        assert agreement(other).alpha == pytest.approx(found.alpha, abs=1e-12)
        assert agreement(other).interval == pytest.approx(found.interval, abs=1e-9)


def test_a_tie_is_an_opinion_of_its_own():
    """Half a vote for each model would make these two agree more than voters of opposite taste."""
    ties = [vote(c, v, o) for c in range(10) for v, o in (("a", c % 2), ("b", 0.5))]
    opposite = [vote(c, v, o) for c in range(10) for v, o in (("a", c % 2), ("b", 1 - c % 2))]
    assert agreement(ties).alpha < 0 and agreement(opposite).alpha < agreement(ties).alpha


def test_the_interval_resamples_prompts(seed):
    """Against the package's alpha of each resample, with all comparisons of the drawn prompts."""
    votes = drawn(2, 12, 5, 3, np.random.default_rng(seed), seeds=2)
    prompts = sorted({v.prompt for v in votes})
    counts = np.zeros((12, 2, 3))  # [prompt, its comparison, outcome]
    for v in votes:
        counts[prompts.index(v.prompt), v.comparison % 2, round(2 * v.outcome)] += 1
    draws = torch.randint(12, (RESAMPLES, 12), generator=torch.Generator().manual_seed(0)).numpy()
    alphas = [
        krippendorff.alpha(value_counts=counts[draw].reshape(-1, 3), level_of_measurement="nominal") for draw in draws
    ]
    tail = NormalDist().cdf(-students_t(11) * math.sqrt(12 / 11))  # Hesterberg's expanded percentiles
    assert agreement(votes).interval[1:] == pytest.approx(np.quantile(alphas, [tail, 1 - tail]), abs=1e-9)


def test_one_prompt_has_no_interval(seed):
    votes = [v._replace(prompt="one") for v in drawn(2, 12, 5, 3, np.random.default_rng(seed))]
    found = agreement(votes)
    assert found.alpha is not None and found.interval is None
