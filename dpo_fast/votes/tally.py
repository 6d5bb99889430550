"""What votes say: majorities, win rates by question, pair and category, strengths; as a summary and as text."""

import textwrap
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from dpo_fast.errors import printable
from dpo_fast.plain_table import plain_table
from dpo_fast.votes.agreement import agreement
from dpo_fast.votes.intervals import Rates, rates
from dpo_fast.votes.ranking import ranking
from dpo_fast.votes.records import Check, Vote
from dpo_fast.votes.voters import by_voter

RULE = (
    "the model with more votes wins a comparison, votes for a tie counting for neither; as many for each are a tie,"
    " half a win for both; comparisons that lack votes count by those they have"
)
WIDTH = 100  # of notes on a terminal


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
    kept = [vote for vote in votes if vote.voter not in excluded]
    wanted = int(settings.get("votes", 5))
    texts = {vote.question: vote.question for vote in votes} | dict(settings.get("questions") or {})
    of_question = {name: [vote for vote in kept if vote.question == name] for name in texts}
    comparisons = max(int(settings.get("comparisons", 0)), len({vote.comparison for vote in votes}))
    had = defaultdict(int)
    for vote in kept:
        had[vote.question, vote.comparison] += 1
    return {
        "votes": len(kept),
        "comparisons": comparisons,
        "complete": sum(number >= wanted for number in had.values()),
        "wanted": comparisons * len(texts),
        "voters": len({vote.voter for vote in kept}),
        "rule": RULE,
        "questions": {name: _question(texts[name], of, wanted) for name, of in of_question.items()},
        "by_voter": by_voter(votes, checks, excluded),
        "seconds_median": median(vote.seconds for vote in kept) if kept else None,
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
        "note": found.note,
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


def _grouped(votes: Iterable[Vote], key: Callable[[Vote], Hashable]) -> dict[Any, list[Vote]]:
    groups: dict[Any, list[Vote]] = defaultdict(list)
    for vote in votes:
        groups[key(vote)].append(vote)
    return dict(groups)


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: a table of rates for each question, strengths, voters, and how to read them."""
    pace = "" if summary["seconds_median"] is None else f", {summary['seconds_median']:.1f} s each (median)"
    parts = [
        f"{counted(summary['votes'], 'vote')} of {counted(summary['voters'], 'voter')}{pace};"
        f" complete: {summary['complete']:,} of {summary['wanted']:,} (comparisons x questions)"
    ]
    for name, question in summary["questions"].items():
        parts += _question_text(name, question)
    if summary["by_voter"]:
        head = ["voter", "votes", "seconds", "left", "ties", "agrees", "checks failed"]
        parts.append(plain_table(head, [_voter_cells(row) for row in summary["by_voter"]]))
    notes = [
        f"excluded, with {counted(row['votes'], 'vote')}: {printable(row['name'])} ({printable(row['excluded'])})"
        for row in summary["by_voter"]
        if row["excluded"] is not None
    ]
    notes += [
        f"win rate, won, tied, lost: of the model named first, by majority: {summary['rule']}",
        "by votes: how often one voter prefers the model named first, ties half",
        "intervals: 95%, over other prompts and other voters",
        "agreement: Krippendorff's alpha, 1 full, 0 as by chance",
        "left: votes for the image on the left, of those that are no ties; agrees: with the majority of the others",
    ]
    parts.append("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in notes))
    return "\n\n".join(parts)


def _label(pair: Mapping[str, Any], grouped: bool) -> str:
    """What a pair's rates are of. grouped: whether pairs of several groups are shown."""
    first, second = pair["models"]
    return f"{second} against {first}" + (f" ({pair['group']})" if grouped else "")


def _question_text(name: str, question: Mapping[str, Any]) -> list[str]:
    title = printable(question["text"]) + ("" if name == question["text"] else f" ({printable(name)})")
    if not question["votes"]:
        return [f"{title}\nno votes yet"]
    alpha = "not defined" if question["alpha"] is None else _rate(question, "alpha", "alpha_ci95")
    groups = {pair["group"] for pair in question["pairs"]}
    rows, notes = [], []
    for pair in question["pairs"]:
        label = _label(pair, len(groups) > 1)
        numbers = (pair["wins"], pair["ties"], pair["losses"], pair["undecided"], pair["votes"])
        rows.append(
            [label, _rate(pair, "win_rate", "ci95"), _rate(pair, "by_votes", "by_votes_ci95"), *map(str, numbers)]
        )
        for category, of in pair["categories"].items():
            blank = [""] * (len(numbers) + 1)
            rows.append([f"  {category} ({of['comparisons']})", _rate(of, "win_rate", "ci95"), *blank])
        if pair["note"]:
            notes.append(f"{label}: {pair['note']}")
    head = ["models", "win rate [95%]", "by votes [95%]", "won", "tied", "lost", "lacking votes", "votes"]
    parts = [f"{title}\n{counted(question['votes'], 'vote')}, agreement {alpha}\n\n{plain_table(head, rows)}"]
    if question["ranking"]:
        rows = [
            [row["model"], f"{row['strength']:+.2f}{_ends(row['ci95'], 2)}", f"{row['win_rate_against_average']:.3f}"]
            for row in question["ranking"]
        ]
        parts.append(plain_table(["model", "strength [95%]", "against the average"], rows))
    if question["ranking_note"]:
        notes.append(f"strengths: {question['ranking_note']}")
    if notes:
        parts.append("\n".join(textwrap.fill(printable(line), WIDTH, subsequent_indent="  ") for line in notes))
    return parts


def _rate(of: Mapping[str, Any], value: str, ends: str) -> str:
    return f"{round(of[value], 3) + 0.0:.3f}{_ends(of[ends], 3)}"  # + 0.0: no -0.000


def _ends(ends: Sequence[float] | None, digits: int) -> str:
    return "" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _voter_cells(row: Mapping[str, Any]) -> list[str]:
    shares = [
        "-" if row[of] is None else f"{row[of]:.2f}" for of in ("left_share", "tie_share", "agrees_with_majority")
    ]
    seconds = "-" if row["seconds_median"] is None else f"{row['seconds_median']:.1f}"
    name = row["name"] + ("" if row["excluded"] is None else " (excluded)")
    return [name, str(row["votes"]), seconds, *shares, f"{row['checks_failed']} of {row['checks']}"]


def counted(number: int, noun: str) -> str:
    """The number with its noun: 1 vote, 2 votes."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
