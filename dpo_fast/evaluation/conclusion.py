"""The verdict on a comparison, in one sentence: who decides, what that win rate shows, and at what cost.

The first scorer decides, unless enough people voted (`people.ENOUGH`): then they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_fast.evaluation.formats import counted, decimals, difference, p_value
from dpo_fast.evaluation.signals import Signal

if TYPE_CHECKING:
    from dpo_fast.evaluation.findings import Verdict
    from dpo_fast.evaluation.people import People

LEVEL = 0.05  # of the Holm-corrected p below which the win rate differs from one half
NOTHING = "no difference shown"
PEOPLE = "people"
REMEDY = "over-optimised: raise --beta_dpo, lower --learning_rate, or take fewer steps"


@dataclass(frozen=True)
class Conclusion:
    """The verdict of whoever decides.

    outcome: `aligned` (of a policy trained towards the scorer that decides) or `better`, `worse`, or `no difference
    shown`.
    """

    outcome: str
    scorer: str  # the one that decides, or PEOPLE
    grounds: str  # who decides, and by what numbers
    p_holm: float | None  # of its win rate; None: people decide, by the interval of theirs
    linked: str  # how the costs go with the outcome: "paid for with", "and worse by"
    costs: dict[str, str]  # scorer or signal that got worse -> by how much
    remedy: str | None

    @property
    def cost(self) -> str:
        """What got worse, as the end of the sentence; empty if nothing did."""
        *others, last = self.costs.values() or [""]
        return f"{self.linked} {', '.join(others)}{' and ' if others else ''}{last}" if last else ""

    def __str__(self) -> str:
        return "; ".join(filter(None, (f"{self.outcome}, {self.grounds}", self.cost, self.remedy)))

    def for_summary(self) -> dict[str, object]:
        """JSON-ready values: the sentence, and what tools want to read without parsing it."""
        return {
            "outcome": self.outcome,
            "scorer": self.scorer,
            "p_holm": self.p_holm,
            "costs": list(self.costs),
            "sentence": str(self),
        }


def conclude(
    overall: "Sequence[Verdict]",  # the first one decides
    signals: Sequence[Signal],
    *,
    trained: bool,  # the policy was trained from this base towards the first scorer
    people: "People | None" = None,  # None: nobody voted
) -> Conclusion:
    """Conclude from the win rate of the first scorer: it differs from one half if its 95% interval excludes that and,
    corrected by Holm for the number of scorers, p is below 0.05.

    Another scorer got worse if the interval of its win rate lies below one half, whatever the correction says: a false
    alarm costs less than a loss that is not mentioned. Where people decide, the interval of their win rate does, and
    every scorer is one of the others.
    """
    if people is not None and people.verdict is not None:
        return _by_people(people, overall, signals)
    first, others = overall[0], overall[1:]
    shown = first.decided and first.rate_p_holm < LEVEL
    won = first.interval.value > 0.5
    outcome = (("aligned" if trained else "better") if won else "worse") if shown else NOTHING
    return Conclusion(
        outcome,
        first.scorer,
        f"as {first.scorer} decides{f' (the first of {len(overall)} scorers)' if others else ''}:"
        f" {_grounds(first, len(overall), shown)}",
        first.rate_p_holm,
        _linked(outcome, won),
        _costs(others, signals),
        REMEDY if trained and outcome == "worse" else None,
    )


def _by_people(people: "People", overall: "Sequence[Verdict]", signals: Sequence[Signal]) -> Conclusion:
    said, first = people.verdict, overall[0]
    rate = said.win_rate
    won = rate.value > 0.5
    outcome = ("better" if won else "worse") if said.decided else NOTHING
    return Conclusion(
        outcome,
        PEOPLE,
        f"as people decide ({said.question}: {counted(said.votes, 'vote')} by {counted(people.voters, 'voter')} on"
        f" {counted(said.prompts, 'prompt')}): win rate {rate}{'' if said.decided else ' holds 0.5'}; by {first.scorer}"
        f" {first.interval}",
        None,
        _linked(outcome, won),
        _costs(overall, signals),
        None,
    )


def _linked(outcome: str, won: bool) -> str:
    return "and worse by" if outcome == NOTHING else "paid for with" if won else "worse by"


def _costs(others: "Sequence[Verdict]", signals: Sequence[Signal]) -> dict[str, str]:
    costs = {v.scorer: _loss(v) for v in others if v.interval.high < 0.5}
    return costs | {signal.name: _change(signal) for signal in signals if signal.suspect}


def _grounds(first: "Verdict", scorers: int, shown: bool) -> str:
    alone = " of a single prompt, which says nothing of others," if first.prompts == 1 else ""
    rate, p = f"win rate {first.interval}{alone}", p_value(first.rate_p_holm)
    if not first.decided:
        return f"{rate} holds 0.5"
    if not shown:
        return f"{rate} excludes 0.5, but corrected for {counted(scorers, 'scorer')} (Holm) p is {p}"
    return f"{rate}, {'Holm-corrected ' if scorers > 1 else ''}p {p}"


def _loss(of: "Verdict") -> str:
    places = decimals(of.base_mean.value, of.policy_mean.value)
    return (
        f"{of.scorer} (win rate {of.interval}, p {p_value(of.rate_p_holm)}, mean {of.base_mean.value:.{places}f} ->"
        f" {of.policy_mean.value:.{places}f}, {difference(of.gain)})"
    )


def _change(of: Signal) -> str:
    places = decimals(of.base, of.policy)
    return (
        f"{of.name} ({of.policy / of.base:.0%} of the base's, {of.base:.{places}f} -> {of.policy:.{places}f},"
        f" {difference(of.difference)})"
    )
