"""What votes say: majorities, win rates by question, pair and category, strengths, and how each voter voted."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from dpo_fast.votes.agreement import agreement
from dpo_fast.votes.intervals import Rates, rates
from dpo_fast.votes.ranking import ranking
from dpo_fast.votes.records import Check, Vote

RULE = (
    "the model with more votes wins a comparison; ties count for neither, and as many votes for each are a tie,"
    " half a win for both"
)


def summary_of(
    votes: Sequence[Vote],
    checks: Sequence[Check],
    settings: Mapping[str, Any],
    excluded: Mapping[str, str] | None = None,  # voter -> the owner's reason
) -> dict[str, Any]:
    """All that pages, terminal and files show of a session, JSON-ready.

    settings: `questions`, id -> text; `votes`, wanted of a comparison and question; `comparisons`, how many the session
    has (those voted on, where it is not there). Votes of excluded voters count nowhere; these voters are listed.
    """
    excluded = excluded or {}
    counted = [vote for vote in votes if vote.voter not in excluded]
    wanted = int(settings.get("votes", 5))
    texts = dict(settings.get("questions") or {}) or {vote.question: vote.question for vote in votes}
    of_question = {name: [vote for vote in counted if vote.question == name] for name in texts}
    comparisons = max(int(settings.get("comparisons", 0)), len({vote.comparison for vote in votes}))
    had = defaultdict(int)
    for vote in counted:
        had[vote.question, vote.comparison] += 1
    return {
        "votes": len(counted),
        "comparisons": comparisons,
        "complete": sum(number >= wanted for number in had.values()),
        "wanted": comparisons * len(texts),
        "voters": len({vote.voter for vote in counted}),
        "rule": RULE,
        "questions": {name: _question(texts[name], of, wanted) for name, of in of_question.items()},
        "by_voter": _by_voter(votes, checks, excluded),
        "seconds_median": median(vote.seconds for vote in counted) if counted else None,
    }


def _question(text: str, votes: Sequence[Vote], wanted: int) -> dict[str, Any]:
    agreed = agreement(votes)
    pairs = _grouped(votes, lambda vote: (vote.group, *vote.models))
    return {
        "text": text,
        "votes": len(votes),
        "alpha": agreed.alpha,
        "alpha_ci95": list(agreed.interval[1:]) if agreed.interval else None,
        "pairs": [_pair(*key, of, wanted) for key, of in pairs.items()],
    } | ranking(votes)


def _pair(group: str, first: str, second: str, votes: Sequence[Vote], wanted: int) -> dict[str, Any]:
    """One pair of models of one group, with the rates of the second."""
    found = rates_of(votes)
    majorities = majority_of(votes)
    numbers = defaultdict(int)
    for vote in votes:
        numbers[vote.comparison] += 1
    by_category = _grouped((vote for vote in votes if vote.category is not None), lambda vote: vote.category)
    return {
        "group": group,
        "models": [first, second],
        "win_rate": found.majority.value,
        "ci95": list(found.majority[1:]),
        "by_votes": found.votes.value,
        "by_votes_ci95": list(found.votes[1:]),
        "wins": sum(outcome == 0 for outcome in majorities.values()),
        "ties": sum(outcome == 0.5 for outcome in majorities.values()),
        "losses": sum(outcome == 1 for outcome in majorities.values()),
        "comparisons": len(majorities),
        "votes": len(votes),
        "undecided": sum(number < wanted for number in numbers.values()),
        "categories": {name: _category(of) for name, of in sorted(by_category.items())},
    }


def _category(votes: Sequence[Vote]) -> dict[str, Any]:
    of = rates_of(votes).majority
    return {"win_rate": of.value, "ci95": list(of[1:]), "comparisons": len({vote.comparison for vote in votes})}


def majority_of(votes: Iterable[Vote]) -> dict[int, float]:
    """The majority's outcome for each comparison, in the sense of `Vote.outcome`, of votes on one question."""
    lead = defaultdict(float)
    for vote in votes:
        lead[vote.comparison] += vote.outcome - 0.5
    return {comparison: (1.0 if of > 0 else 0.0 if of < 0 else 0.5) for comparison, of in lead.items()}


def rates_of(votes: Sequence[Vote]) -> Rates:
    """The rates of the second model, of votes on one question about comparisons of two models."""
    second = 1 - np.array([vote.outcome for vote in votes])
    codes = (_codes(getattr(vote, of) for vote in votes) for of in ("comparison", "prompt", "voter"))
    return rates(second, *codes)


def _codes(names: Iterable[Any]) -> np.ndarray:
    """Numbers from 0 in the order in which the names first appear."""
    number: dict[Any, int] = {}
    return np.array([number.setdefault(name, len(number)) for name in names], np.int64)


def _by_voter(votes: Sequence[Vote], checks: Sequence[Check], excluded: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each voter, in the order of names. Agreement is with the other voters that count: an excluded voter's votes are
    compared with the others', and never the others' with them."""
    lead: dict[tuple[str, int], float] = defaultdict(float)  # of the first model
    for vote in votes:
        if vote.voter not in excluded:
            lead[vote.question, vote.comparison] += vote.outcome - 0.5
    of_voter = _grouped(votes, lambda vote: vote.voter)
    of_check = _grouped(checks, lambda check: check.voter)
    return [
        _voter(name, of_voter.get(name, []), of_check.get(name, []), lead, excluded.get(name))
        for name in sorted({*of_voter, *of_check, *excluded})
    ]


def _voter(
    name: str,
    votes: Sequence[Vote],
    checks: Sequence[Check],
    lead: Mapping[tuple[str, int], float],
    reason: str | None,
) -> dict[str, Any]:
    decided = [vote for vote in votes if vote.outcome != 0.5]
    left = sum((vote.outcome == 1) == vote.first_left for vote in decided)
    agrees = []
    for vote in votes:
        others = (
            lead[vote.question, vote.comparison] if reason is None else lead.get((vote.question, vote.comparison), 0.0)
        )
        others -= vote.outcome - 0.5 if reason is None else 0.0
        if others != 0:
            agrees.append(vote.outcome if others > 0 else 1 - vote.outcome)
    return {
        "name": name,
        "votes": len(votes),
        "seconds_median": median(vote.seconds for vote in votes) if votes else None,
        "left_share": left / len(decided) if decided else None,
        "tie_share": 1 - len(decided) / len(votes) if votes else None,
        "agrees_with_majority": sum(agrees) / len(agrees) if agrees else None,
        "checks": len(checks),
        "checks_failed": sum(not check.passed for check in checks),
        "excluded": reason,
    }


def _grouped(rows: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)
