"""Davidson's model against the log-linear Poisson model and by hand; what has no maximum; intervals of strengths."""

import math

import numpy as np
import pytest
import torch

from benchmarks.vote_intervals import WORLDS, chances_of, draw_table, held
from dpo_fast.statistics import Bootstrap, students_t
from dpo_fast.votes.intervals import ONE_PROMPT, ONE_VOTER
from dpo_fast.votes.ranking import RESAMPLES, against_average, fit, ranking, strengths, tabled
from tests.helpers.seeds import SIGMAS
from tests.votes.drawn import drawn, vote


def pairs_of(models):
    pairs = [(i, j) for i in range(models) for j in range(i + 1, models)]
    return np.array([i for i, _ in pairs]), np.array([j for _, j in pairs])


def chances(s, nu, first, second):
    """Davidson's formula as published, from p = exp(s)."""
    p, q = np.exp(s[first]), np.exp(s[second])
    total = p + q + nu * np.sqrt(p * q)
    return np.stack([p / total, nu * np.sqrt(p * q) / total, q / total], 1)


def by_poisson(counts, first, second, models):
    """The equal log-linear model, counts ~ Poisson(exp(pair + strengths + tie)), by iteratively reweighted least
    squares: another likelihood, other parameters, another method."""
    pairs = len(first)
    design, y = np.zeros((3 * pairs, pairs + models)), counts.ravel()
    for k in range(pairs):
        for answer in range(3):
            row = design[3 * k + answer]
            row[k] = 1
            for model, sign in ((first[k], 0.5), (second[k], -0.5)):
                if model > 0:  # the first model's strength is 0
                    row[pairs + model - 1] += sign * (1 - answer)
            row[-1] = answer == 1
    mean = y + 0.5
    for _ in range(100):
        working = np.log(mean) + (y - mean) / mean
        root = np.sqrt(mean)
        solution, *_ = np.linalg.lstsq(design * root[:, None], working * root, rcond=None)
        mean = np.exp(design @ solution)
    s = np.concatenate([[0.0], solution[pairs:-1]])
    return s - s.mean(), math.exp(solution[-1])


@pytest.mark.parametrize("models", [2, 3, 6, 10])
def test_the_fit_is_that_of_the_log_linear_poisson_model(seed, models):
    generator = np.random.default_rng(seed)
    first, second = pairs_of(models)
    counts = generator.integers(1, 40, (len(first), 3)).astype(float)
    found = fit(counts, first, second)
    s, nu = by_poisson(counts, first, second, models)
    assert found.strengths == pytest.approx(s, abs=1e-7)
    assert math.exp(found.log_tie) == pytest.approx(nu, rel=1e-7)


def test_not_all_pairs_need_to_be_compared(seed):
    generator = np.random.default_rng(seed)
    first, second = np.array([0, 1, 2, 1]), np.array([1, 2, 3, 4])  # a tree
    counts = generator.integers(1, 40, (4, 3)).astype(float)
    s, nu = by_poisson(counts, first, second, 5)
    found = fit(counts, first, second)
    assert found.strengths == pytest.approx(s, abs=1e-7) and math.exp(found.log_tie) == pytest.approx(nu, rel=1e-7)


def test_the_fit_expects_as_many_wins_and_ties_as_there_were(seed):
    """Davidson's equations (3.2): a model's wins and half its ties, and all ties, are those that the fit expects."""
    generator = np.random.default_rng(seed)
    first, second = pairs_of(5)
    counts = generator.integers(0, 30, (len(first), 3)) + 0.25
    found = fit(counts, first, second)
    expected = counts.sum(1, keepdims=True) * chances(found.strengths, math.exp(found.log_tie), first, second)
    for model in range(5):
        points = [
            (of[first == model] @ [1, 0.5, 0]).sum() + (of[second == model] @ [0, 0.5, 1]).sum()
            for of in (counts, expected)
        ]
        assert points[0] == pytest.approx(points[1], rel=1e-9)
    assert counts[:, 1].sum() == pytest.approx(expected[:, 1].sum(), rel=1e-9)
    assert found.strengths.sum() == pytest.approx(0, abs=1e-9)


def test_two_models_by_hand():
    """p/q = wins / losses, and nu = ties / sqrt(wins losses)."""
    found = fit(np.array([[60.0, 20.0, 15.0]]), np.array([0]), np.array([1]))
    assert found.strengths[0] - found.strengths[1] == pytest.approx(math.log(60 / 15))
    assert math.exp(found.log_tie) == pytest.approx(20 / math.sqrt(60 * 15))


@pytest.mark.parametrize("nu", [0.3, 1.5])
def test_simulated_strengths_are_recovered(seed, nu):
    generator = np.random.default_rng(seed)
    first, second = pairs_of(6)
    true = generator.normal(size=6)
    true -= true.mean()
    counts = np.stack([generator.multinomial(4000, p) for p in chances(true, nu, first, second)])
    found = fit(counts, first, second)
    errors = np.sqrt(found.covariance.diagonal())
    assert (np.abs(found.strengths - true) < SIGMAS * errors[:-1]).all()
    assert abs(found.log_tie - math.log(nu)) < SIGMAS * errors[-1]


def test_the_covariance_is_that_of_many_simulated_fits(seed):
    generator = np.random.default_rng(seed)
    first, second = pairs_of(3)
    true = np.array([-0.5, 0.1, 0.4])
    of = chances(true, 0.6, first, second)
    counts = np.stack([generator.multinomial(300, p, 4000) for p in of], 1)
    found = fit(counts, first, second)
    parameters = np.concatenate([found.strengths, found.log_tie[:, None]], 1)
    exact = fit(300 * of, first, second)
    assert exact.strengths == pytest.approx(true, abs=1e-9)
    assert np.cov(parameters.T) == pytest.approx(exact.covariance, abs=0.12 * exact.covariance.max())


def test_many_tables_at_once_are_each_alone(seed):
    generator = np.random.default_rng(seed)
    first, second = pairs_of(4)
    counts = generator.integers(0, 50, (30, len(first), 3)) + 0.3
    at_once = fit(counts, first, second)
    for k in range(30):
        alone = fit(counts[k], first, second)
        assert at_once.strengths[k] == pytest.approx(alone.strengths, abs=1e-8)
        assert at_once.covariance[k] == pytest.approx(alone.covariance, abs=1e-8)


@pytest.mark.parametrize("size", [1, 1e3, 1e6])
def test_lopsided_tables_are_fitted(size):
    """Newton's steps are bounded: from 0 a full one would overshoot."""
    counts = np.array([[size, 0, 0], [size, 0, 0], [size, 0, 0]]) + 0.01
    found = fit(counts, *pairs_of(3))
    assert np.isfinite(found.strengths).all() and (np.diff(found.strengths) < -0.5).all()


def test_a_likelihood_without_a_maximum_is_not_taken_for_one():
    with pytest.raises(ArithmeticError, match="no maximum"):
        fit(np.array([[9.0, 1, 0]]), np.array([0]), np.array([1]))


def rows_of(votes):
    return {row["model"]: row for row in ranking(votes)["ranking"]}


def test_the_ranking_is_the_fit_with_the_votes_of_the_prior(seed):
    """M - 1 votes, half of them won by each side, and half a tie, over the pairs that were compared."""
    votes = drawn(3, 30, 8, 5, np.random.default_rng(seed))
    first, second = pairs_of(3)
    counts = np.zeros((3, 3))
    for v in votes:
        pair = [("model 0", "model 1"), ("model 0", "model 2"), ("model 1", "model 2")].index(v.models)
        counts[pair, round(2 - 2 * v.outcome)] += 1
    s, nu = by_poisson(counts + np.array([1, 0.5, 1]) / 3, first, second, 3)
    found = ranking(votes)
    of = rows_of(votes)
    assert [of[f"model {k}"]["strength"] for k in range(3)] == pytest.approx(s, abs=1e-7)
    assert found["tie_parameter"] == pytest.approx(nu, rel=1e-7) and found["ranking_note"] is None
    for row in found["ranking"]:
        assert row["ci95"][0] < row["strength"] < row["ci95"][1] and not row["unbounded"]
        p = math.exp(row["strength"])
        assert row["win_rate_against_average"] == pytest.approx((p + nu * p**0.5 / 2) / (p + 1 + nu * p**0.5))
    strengths_ = [row["strength"] for row in found["ranking"]]
    assert strengths_ == sorted(strengths_, reverse=True)


def test_the_ranking_knows_neither_order_nor_which_model_is_first(seed):
    generator = np.random.default_rng(seed)
    votes = drawn(4, 10, 6, 3, generator)
    found = ranking(votes)
    shuffled = ranking([votes[k] for k in generator.permutation(len(votes))])
    flips = generator.random(len(votes)) < 0.5
    flipped = ranking(
        [
            v._replace(models=v.models[::-1], outcome=1 - v.outcome) if f else v
            for v, f in zip(votes, flips, strict=True)
        ]
    )
    assert found == shuffled == flipped == ranking(votes)


def test_renamed_voters_and_models_change_no_more_than_the_draws(seed):
    generator = np.random.default_rng(seed)
    votes = drawn(3, 15, 6, 3, generator)
    new = {v.voter: f"{generator.random()}" for v in votes}
    name = {"model 0": "z", "model 1": "a", "model 2": "m"}
    other = rows_of([v._replace(voter=new[v.voter], models=tuple(name[m] for m in v.models)) for v in votes])
    for model, row in rows_of(votes).items():
        assert other[name[model]]["strength"] == pytest.approx(row["strength"], abs=1e-8)
        widths = [np.diff(of["ci95"])[0] for of in (row, other[name[model]])]
        assert widths[0] == pytest.approx(widths[1], rel=0.25)


def test_reversed_votes_reverse_the_strengths(seed):
    votes = drawn(3, 15, 6, 3, np.random.default_rng(seed))
    reversed_ = rows_of([v._replace(outcome=1 - v.outcome) for v in votes])
    for model, row in rows_of(votes).items():
        assert reversed_[model]["strength"] == pytest.approx(-row["strength"], abs=1e-8)
        assert reversed_[model]["ci95"] == pytest.approx([-end for end in reversed(row["ci95"])], abs=1e-6)


def test_a_model_that_always_wins_is_strongest_and_unbounded():
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    votes = [
        vote(3 * p + k, v, 1.0 if "a" in models else (p % 2), f"{p}", models)
        for p in range(20)
        for k, models in enumerate(pairs)
        for v in "xyz"
    ]
    found = ranking(votes)
    of = rows_of(votes)
    assert found["ranking"][0]["model"] == "a" and of["a"]["unbounded"]
    assert not of["b"]["unbounded"] and not of["c"]["unbounded"] and "a" in found["ranking_note"].split(": ")[-1]
    assert all(np.isfinite([row["strength"], *row["ci95"]]).all() for row in found["ranking"])
    low, high = of["a"]["ci95"]
    assert low > of["b"]["strength"] and high - low > 1  # far, but how far is not known
    one_tie = [*votes[:-1], votes[-1]._replace(outcome=0.5)]
    assert not any(row["unbounded"] for row in ranking(one_tie)["ranking"])
    assert ranking(one_tie)["ranking_note"] is None


def test_a_chain_of_winners_is_unbounded_everywhere():
    models = [("a", "b"), ("b", "c"), ("a", "c")]
    votes = [vote(3 * p + k, v, 1.0, f"{p}", of) for p in range(9) for k, of in enumerate(models) for v in "xy"]
    found = ranking(votes)
    assert [row["model"] for row in found["ranking"]] == ["a", "b", "c"]
    assert all(row["unbounded"] for row in found["ranking"])


def test_models_without_a_chain_of_comparisons_have_no_ranking():
    votes = [vote(p, v, p % 2, models=of) for p, of in enumerate([("a", "b"), ("c", "d")] * 5) for v in "xy"]
    found = ranking(votes)
    assert found["ranking"] is None and found["tie_parameter"] is None
    assert found["ranking_note"] == "no ranking: no comparison links (a, b) with (c, d)"


def test_two_models_have_no_ranking(seed):
    none = {"ranking": None, "tie_parameter": None, "ranking_note": None}
    assert ranking(drawn(2, 9, 5, 3, np.random.default_rng(seed))) == none == ranking([])


def test_one_voter_and_one_prompt_are_said(seed):
    votes = drawn(3, 12, 5, 3, np.random.default_rng(seed))
    assert ranking([v._replace(voter="me") for v in votes])["ranking_note"].startswith(ONE_VOTER)
    assert ranking([v._replace(prompt="one") for v in votes])["ranking_note"].startswith(ONE_PROMPT)


def test_all_ties_and_no_ties_are_fitted(seed):
    votes = drawn(3, 12, 5, 3, np.random.default_rng(seed))
    ties = ranking([v._replace(outcome=0.5) for v in votes])
    assert ties["tie_parameter"] > 10
    for row in ties["ranking"]:
        assert row["strength"] == pytest.approx(0, abs=1e-6) and row["ci95"][1] > 0.05
    clear = ranking([v._replace(outcome=1.0 if v.outcome == 0.5 else v.outcome) for v in votes])
    assert 0 < clear["tie_parameter"] < 0.1


def test_the_parts_of_the_interval_are_those_of_loops(seed):
    """Prompts and voters resampled one at a time, and single votes by the change when each voter's votes on a prompt
    count a little more."""
    votes = drawn(3, 12, 5, 4, np.random.default_rng(seed))
    table = tabled(votes)

    def fitted(weights):  # of the votes, one list a fit
        counts = np.zeros((len(weights), 3, 3))
        for row, of in zip(counts, weights, strict=True):
            np.add.at(row, (table.pair, table.answer), of)
        return fit(counts + table.prior, table.first, table.second).strengths

    part = {}
    for name, group in (("prompts", table.prompt), ("voters", table.voter)):
        groups = group.max() + 1
        bootstrap = Bootstrap([str(k) for k in range(groups)], RESAMPLES)
        drawn_ = fitted(bootstrap.counts.numpy().astype(float)[:, group])
        sizes = np.bincount(group)
        free = sizes.sum() ** 2 / np.square(sizes).sum()
        part[name] = drawn_.var(0, ddof=1) * free / (free - 1), free - 1
    single = np.zeros(3)
    for prompt in range(12):
        for voter in range(table.voter.max() + 1):
            own = (table.prompt == prompt) & (table.voter == voter)
            more, less = fitted([1 + 1e-4 * own, 1 - 1e-4 * own])
            single += ((more - less) / 2e-4) ** 2
    independent = fit(table.counts() + table.prior, table.first, table.second).covariance.diagonal()[:-1]
    halves = np.sqrt(
        students_t(part["prompts"][1]) ** 2 * np.maximum(part["prompts"][0], independent)
        + students_t(part["voters"][1]) ** 2 * np.maximum(part["voters"][0] - single, 0)
    )
    assert [of.high - of.value for of in strengths(table)] == pytest.approx(halves, rel=1e-4)


@pytest.mark.exhaustive
def test_strengths_are_held_by_their_intervals():
    """Of three models, on 40 prompts and by 8 voters; more: benchmarks/vote_intervals.py."""
    generator, world = np.random.default_rng(0), WORLDS[1]
    true = fit(chances_of(world), *pairs_of(3)).strengths
    found = [strengths(draw_table(world, 40, 8, generator)) for _ in range(200)]
    share = np.mean([held(of, value).share for of, value in zip(zip(*found, strict=True), true, strict=True)])
    assert 0.925 <= share <= 0.99, share


def test_against_average():
    assert against_average(0.0, 0.7) == 0.5
    assert against_average(2.0, 0.0) == pytest.approx(1 / (1 + math.exp(-2)))
    assert 0.5 < against_average(2.0, 3.0) < against_average(2.0, 0.1)


def test_a_thousand_resamples_of_ten_models_take_seconds(seed):
    """Tables of 10 models at once: the loop over them would be minutes."""
    generator = np.random.default_rng(seed)
    first, second = pairs_of(10)
    counts = generator.integers(1, 60, (1000, len(first), 3)).astype(float)
    assert torch.from_numpy(fit(counts, first, second).strengths).isfinite().all()
