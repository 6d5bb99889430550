"""How each voter voted: pace, sides, ties, agreement with the others, attention checks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dpo_fast.votes.records import Check, Vote


def by_voter(votes: Sequence[Vote], checks: Sequence[Check], excluded: Mapping[str, str]) -> list[dict[str, Any]]:
    """One JSON-ready row for each voter, in the order of names. excluded: voter -> the owner's reason.

    `left_share`: of the votes that are no ties, how many were for the image on the left. `agrees_with_majority`: over
    the comparisons on which the other voters are not even, the mean of 1 where the voter sides with their majority, 1/2
    for a tie and 0 against it; votes at random get 1/2. The others are those who are not excluded.
    """
    lead: dict[tuple[str, int], float] = defaultdict(float)  # of the first model
    votes_of: dict[str, list[Vote]] = defaultdict(list)
    checks_of: dict[str, list[Check]] = defaultdict(list)
    for vote in votes:
        votes_of[vote.voter].append(vote)
        if vote.voter not in excluded:
            lead[vote.question, vote.comparison] += vote.outcome - 0.5
    for check in checks:
        checks_of[check.voter].append(check)
    return [
        _row(name, votes_of.get(name, []), checks_of.get(name, []), lead, excluded.get(name))
        for name in sorted({*votes_of, *checks_of, *excluded})
    ]


def _row(
    name: str,
    votes: Sequence[Vote],
    checks: Sequence[Check],
    lead: Mapping[tuple[str, int], float],
    reason: str | None,
) -> dict[str, Any]:
    decided = [vote for vote in votes if vote.outcome != 0.5]
    left = sum((vote.outcome == 1) == vote.first_left for vote in decided)
    sided = []
    for vote in votes:
        others = lead.get((vote.question, vote.comparison), 0.0) - (vote.outcome - 0.5 if reason is None else 0.0)
        if others != 0:
            sided.append(vote.outcome if others > 0 else 1 - vote.outcome)
    return {
        "name": name,
        "votes": len(votes),
        "seconds_median": median(vote.seconds for vote in votes) if votes else None,
        "left_share": left / len(decided) if decided else None,
        "tie_share": (len(votes) - len(decided)) / len(votes) if votes else None,
        "agrees_with_majority": sum(sided) / len(sided) if sided else None,
        "checks": len(checks),
        "checks_failed": sum(not check.passed for check in checks),
        "excluded": reason,
    }
