"""How strong each of several models is: Davidson's model of wins, ties and losses, with intervals.

    P(i beats j) = p_i / (p_i + p_j + nu sqrt(p_i p_j)),    P(tie) = nu sqrt(p_i p_j) / (the same)

(Davidson, Journal of the American Statistical Association 65, 1970, 317): Bradley and Terry's model with ties. With
strengths s = log p and t = log nu the logarithms of the three chances are, up to one constant, (s_i - s_j) / 2,
(s_j - s_i) / 2 and t: a log-linear model, whose likelihood is concave. Strengths are centred at 0; a difference of 1
means odds of e : 1 among votes that are no ties.

A model that won all of its votes has no finite strength of greatest likelihood (Ford, American Mathematical Monthly 64,
1957, 28, says when there is one). As Jeffreys' prior does for shares, a few votes are added therefore, spread evenly
over the pairs of models that were compared: M - 1 for M models, half of them won by each side, and half a tie. With
two models that is half a vote for each of the three answers. Such a model is marked `unbounded`: how far it lies from
the others, the votes do not say. Models that no chain of comparisons links have no common scale, and no ranking.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dpo_fast.statistics import Bootstrap, Interval, students_t
from dpo_fast.votes.intervals import ONE_PROMPT, ONE_VOTER, freedom_of
from dpo_fast.votes.records import Vote

RESAMPLES = 1000
LONGEST_STEP = 1.0  # of one strength in one of Newton's steps
PRECISION = 1e-9
MOST_STEPS = 200


class Fit(NamedTuple):
    """Parameters of greatest likelihood."""

    strengths: np.ndarray  # fp64 [..., M], their mean is 0
    log_tie: np.ndarray  # fp64 [...]: log nu
    covariance: np.ndarray  # fp64 [..., M + 1, M + 1], of both, if all votes were independent


def fit(counts: np.ndarray, first: np.ndarray, second: np.ndarray) -> Fit:
    """Fit Davidson's model to many tables of votes at once, by Newton's method.

    counts: fp64 [..., K, 3], for each pair of models votes for the first, ties, votes for the second. first, second:
    int64 [K], the models' numbers, every one of which occurs. The maximum must exist.
    """
    counts = np.asarray(counts, np.float64)
    models = int(max(first.max(), second.max())) + 1
    pairs = np.arange(len(first))
    half = np.zeros((len(first), models))  # the derivative of (s_i - s_j) / 2
    half[pairs, first], half[pairs, second] = 0.5, -0.5
    products = (half[:, :, None] * half[:, None, :]).reshape(len(first), -1)
    number, lead, ties = counts.sum(-1), counts[..., 0] - counts[..., 2], counts[..., 1].sum(-1)
    at = np.zeros((*counts.shape[:-2], models + 1))
    centre = np.zeros((models + 1, models + 1))
    centre[:-1, :-1] = 1.0  # holds the sum of strengths, which the likelihood leaves free
    for _ in range(MOST_STEPS):
        gap = at[..., :-1] @ half.T
        logs = np.stack([gap, np.broadcast_to(at[..., -1:], gap.shape), -gap], -1)
        chances = np.exp(logs - logs.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        ahead, tie = chances[..., 0] - chances[..., 2], chances[..., 1]
        slope = np.concatenate([(lead - number * ahead) @ half, (ties - (number * tie).sum(-1))[..., None]], -1)
        information = np.empty((*at.shape, models + 1))
        of_strengths = (number * (1 - tie - ahead**2)) @ products
        information[..., :-1, :-1] = of_strengths.reshape(*of_strengths.shape[:-1], models, models)
        information[..., :-1, -1] = information[..., -1, :-1] = -(number * ahead * tie) @ half
        information[..., -1, -1] = (number * tie * (1 - tie)).sum(-1)
        step = np.linalg.solve(information + centre, slope[..., None])[..., 0]
        longest = np.abs(step).max(-1, keepdims=True)
        at = at + step * np.minimum(1.0, LONGEST_STEP / np.maximum(longest, LONGEST_STEP))
        if longest.max() < PRECISION:
            break
    else:
        raise ArithmeticError(f"no maximum within {MOST_STEPS} steps: the likelihood has none, or nearly so")
    covariance = np.linalg.inv(information + centre)
    covariance[..., :-1, :-1] -= 1 / models**2  # what the added matrix put there
    return Fit(at[..., :-1], at[..., -1], covariance)


class Table(NamedTuple):
    """Votes on several models, in numbers."""

    models: list[str]  # M names
    first: np.ndarray  # int64 [K] each: the pairs of models that were compared, first < second
    second: np.ndarray
    pair: np.ndarray  # int64 [N] each: of each vote
    answer: np.ndarray  # 0: for the pair's first model, 1: tie, 2: for its second
    prompt: np.ndarray
    voter: np.ndarray

    def counts(self, group: np.ndarray | None = None) -> np.ndarray:
        """fp64 [K, 3], or of each group [G, K, 3]. group: int64 [N]."""
        pairs = len(self.first)
        cell = self.pair * 3 + self.answer
        if group is None:
            return np.bincount(cell, minlength=3 * pairs).reshape(pairs, 3).astype(np.float64)
        groups = int(group.max()) + 1
        cells = np.bincount(group * 3 * pairs + cell, minlength=groups * 3 * pairs)
        return cells.reshape(groups, pairs, 3).astype(np.float64)

    @property
    def prior(self) -> np.ndarray:
        """The votes that are added: fp64 [3], to each pair of models."""
        each_side = (len(self.models) - 1) / 2
        return np.array([each_side, 0.5, each_side]) / len(self.first)

    def fit(self, counts: np.ndarray) -> Fit:  # fp64 [..., K, 3]
        return fit(counts + self.prior, self.first, self.second)


def tabled(votes: Sequence[Vote]) -> Table:
    """The same table in whatever order votes come, and their models within a comparison."""
    models, model = np.unique([vote.models for vote in votes], return_inverse=True)
    model = model.reshape(-1, 2)
    outcome = np.array([vote.outcome for vote in votes])
    swapped = model[:, 0] > model[:, 1]
    outcome = np.where(swapped, 1 - outcome, outcome)
    model.sort(axis=1)
    pairs, pair = np.unique(model, axis=0, return_inverse=True)
    answer = np.rint(2 - 2 * outcome).astype(np.int64)
    prompt, voter = (
        np.unique([getattr(vote, of) for vote in votes], return_inverse=True)[1] for of in ("prompt", "voter")
    )
    columns = np.stack([pair.ravel(), answer, prompt, voter])
    return Table(models.tolist(), *pairs.T, *columns[:, np.lexsort(columns)])  # sums round by their order


def ranking(votes: Sequence[Vote]) -> dict[str, Any]:
    """`ranking`, the strongest model first, and `tie_parameter` (nu), JSON-ready; both None of two models or fewer, or
    without a common scale, which `ranking_note` says."""
    none = {"ranking": None, "tie_parameter": None, "ranking_note": None}
    if len({model for vote in votes for model in vote.models}) < 3:
        return none
    table = tabled(votes)
    counts = table.counts()
    linked = _reached(_links(table, counts.sum(-1) > 0, counts.sum(-1) > 0))
    if not linked.all():
        return none | {"ranking_note": f"no ranking: {_apart(table.models, linked)}"}
    found = table.fit(counts)
    # i won or tied against j: the maximum is finite if from every model a chain of these leads to every other
    reached = _reached(_links(table, counts[:, :2].sum(-1) > 0, counts[:, 1:].sum(-1) > 0))
    together = reached & reached.T
    sizes = together.sum(1)
    bounded = (sizes == sizes.max()) & (sizes > 1)
    tie = math.exp(float(found.log_tie))
    rows = [
        {
            "model": model,
            "strength": of.value,
            "ci95": [of.low, of.high],
            "win_rate_against_average": against_average(of.value, tie),
            "unbounded": not bool(fixed),
        }
        for model, of, fixed in zip(table.models, strengths(table, found), bounded, strict=True)
    ]
    rows.sort(key=lambda row: (-row["strength"], row["model"]))
    return {"ranking": rows, "tie_parameter": tie, "ranking_note": _note(table, bounded)}


def against_average(strength: float, tie: float) -> float:
    """How often a model wins against one of strength 0, ties half."""
    ahead, behind = math.exp(strength / 2), math.exp(-strength / 2)
    return (ahead + tie / 2) / (ahead + behind + tie)


def strengths(table: Table, found: Fit | None = None) -> list[Interval]:
    """The strength of each model, with its 95% interval over prompts and voters. found: the fit, where it is made.

    As in `intervals`, the variance has two parts, each with its own Student's t: the prompts' part is that of strengths
    fitted to resampled prompts, at least that of independent votes; the voters' part is that of resampled voters, less
    what it would be if each vote of a voter on another prompt were another person's.
    """
    found = found or table.fit(table.counts())
    prompts, freedom_of_prompts = _resampled(table, table.prompt)
    voters, freedom_of_voters = _resampled(table, table.voter)
    prompts = np.maximum(prompts, found.covariance.diagonal()[:-1])
    voters = np.maximum(voters - _of_single_votes(table, found), 0.0)
    halves = np.sqrt(students_t(freedom_of_prompts) ** 2 * prompts + students_t(freedom_of_voters) ** 2 * voters)
    return [Interval(s, s - half, s + half) for s, half in zip(found.strengths.tolist(), halves.tolist(), strict=True)]


def _resampled(table: Table, group: np.ndarray) -> tuple[np.ndarray, float]:
    """The variance of strengths over resampled groups, fp64 [M], and its degrees of freedom."""
    groups = int(group.max()) + 1
    freedom = freedom_of(group)
    if groups == 1:
        return np.zeros(len(table.models)), freedom
    bootstrap = Bootstrap([str(k) for k in range(groups)], RESAMPLES)
    of_group = table.counts(group)
    counts = bootstrap.sums(torch.from_numpy(of_group.reshape(groups, -1))).numpy()
    strengths = table.fit(counts.reshape(RESAMPLES, *of_group.shape[1:])).strengths
    return strengths.var(0, ddof=1) * (freedom + 1) / freedom, freedom


def _of_single_votes(table: Table, found: Fit) -> np.ndarray:
    """The variance of strengths if a voter's votes on different prompts were of different people, fp64 [M]: linearised
    (the sandwich of White, Econometrica 50, 1982, 1), by voter and prompt."""
    pairs = np.arange(len(table.first))
    gap = (found.strengths[table.first] - found.strengths[table.second]) / 2
    logs = np.stack([gap, np.full(len(gap), found.log_tie), -gap], 1)
    chances = np.exp(logs - logs.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    score = np.zeros((len(pairs), 3, len(table.models) + 1))  # the derivative of each answer's log chance
    for answer, sign in enumerate((0.5, 0.0, -0.5)):
        away = sign - (chances[:, 0] - chances[:, 2]) / 2
        score[pairs, answer, table.first], score[pairs, answer, table.second] = away, -away
        score[:, answer, -1] = (answer == 1) - chances[:, 1]
    influence = (score @ found.covariance)[..., :-1]  # [K, 3, M]
    _, cell = np.unique(table.prompt * (int(table.voter.max()) + 1) + table.voter, return_inverse=True)
    sums = np.stack([np.bincount(cell, of[table.pair, table.answer]) for of in np.moveaxis(influence, -1, 0)])
    return np.square(sums).sum(1)


def _links(table: Table, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:  # bool [K] each -> bool [M, M]
    links = np.eye(len(table.models), dtype=bool)
    links[table.first[forward], table.second[forward]] = True
    links[table.second[backward], table.first[backward]] = True
    return links


def _reached(links: np.ndarray) -> np.ndarray:
    """Which models a chain of links leads to, from each: bool [M, M]."""
    for _ in range(max(1, math.ceil(math.log2(len(links))))):
        links = links @ links
    return links


def _apart(models: Sequence[str], linked: np.ndarray) -> str:
    sets = sorted({tuple(np.flatnonzero(row).tolist()) for row in linked})
    return "no comparison links " + " with ".join("(" + ", ".join(models[k] for k in of) + ")" for of in sets)


def _note(table: Table, bounded: np.ndarray) -> str | None:
    notes = []
    if table.voter.max() == 0:
        notes.append(ONE_VOTER)
    if table.prompt.max() == 0:
        notes.append(ONE_PROMPT)
    if not bounded.all():
        names = ", ".join(model for model, fixed in zip(table.models, bounded, strict=True) if not fixed)
        notes.append(f"won or lost every vote against the others, so the votes do not bound the distance: {names}")
    return "; ".join(notes) or None
