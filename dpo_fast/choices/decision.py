"""Decide between candidates by their proofs and times."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_fast.choices.trial import UNPROVABLE, WORDS, Evidence

LEAST_GAIN = 0.01  # fraction of the baseline's time


@dataclass(frozen=True)
class Row:
    """One candidate."""

    candidate: str
    reason: str  # why it is not proven; "" if it is, or is the baseline
    median: float | None = None  # milliseconds; None: not timed
    low: float | None = None  # quartiles
    high: float | None = None
    first: float | None = None  # milliseconds of the first call, which compiles

    @property
    def unusable(self) -> bool:
        """Whether it cannot run on this machine, which is not an error."""
        return self.reason.startswith(WORDS["unusable"])

    @property
    def refuted(self) -> bool:
        """Whether it was tried here and did not pass."""
        return bool(self.reason) and not self.reason.startswith((WORDS["unusable"], UNPROVABLE, WORDS["skipped"]))


@dataclass(frozen=True)
class Outcome:
    """The chosen candidate, and the measurements behind the choice."""

    choice: str  # what is chosen, in words
    baseline: str  # needs no proof: what every candidate is measured against
    chosen: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """A table: proof, milliseconds with quartiles, and times faster than the baseline."""
        base = self.row(self.baseline).median
        width = 2 + max(10, *(len(row.candidate) for row in self.rows))
        lines = [self.choice]
        for row in self.rows:
            state = "baseline" if row.candidate == self.baseline else row.reason or "proven"
            mark = "*" if row.candidate == self.chosen else " "
            text = f"{mark} {row.candidate:{width}}{state}"
            if row.median is not None:
                text = f"{text:{width + 14}}{row.median:10.3f} ms ({row.low:.3f} to {row.high:.3f})"
                if base and row.candidate != self.baseline:
                    text += f"   {base / row.median:.2f} times as fast"
                if row.first > 1e3 and row.first > 3 * row.median:
                    text += f", first call {row.first / 1e3:.0f} s"
            lines.append(text)
        return "\n".join(lines)

    def row(self, candidate: str) -> Row:
        """Return the row of a candidate."""
        return next(row for row in self.rows if row.candidate == candidate)

    @property
    def settled(self) -> bool:
        """Whether anything was found out: times, or a candidate that is refuted. Otherwise nothing is chosen."""
        return self.row(self.baseline).median is not None or any(row.refuted for row in self.rows)

    @property
    def gain(self) -> float | None:
        """How many times as fast as the baseline the chosen candidate is; None if it was not timed."""
        base, chosen = self.row(self.baseline).median, self.row(self.chosen).median
        return base / chosen if base and chosen else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(choice: str, baseline: str, evidence: Evidence, calls: float | None = None) -> Outcome:
    """Choose the fastest proven candidate, if it beats the baseline by LEAST_GAIN in three rounds of four.

    Rounds are compared one by one, since what disturbs the machine in a round disturbs all that is timed in it.
    calls: how many calls the run will make; what the first call of each candidate costs is then counted too, and a
    candidate must save more than it costs. None: only later calls count. A candidate without times is not chosen, since
    it did not run to the end.
    """
    rows = []
    for candidate in (baseline, *(name for name in evidence.reasons if name != baseline)):
        reason = "" if candidate == baseline else evidence.reasons[candidate]
        of = evidence.rounds.get(candidate, ()) if not reason else ()
        if len(of) > 1:
            low, median, high = (1e3 * value for value in statistics.quantiles(of, n=4))
            rows.append(Row(candidate, reason, median, low, high, 1e3 * evidence.first.get(candidate, 0.0)))
        else:
            rows.append(Row(candidate, reason or ("" if candidate == baseline else "was not timed to the end")))

    def wins(row: Row) -> bool:
        ratios = _ratios(evidence.rounds[row.candidate], evidence.rounds[baseline])
        return statistics.quantiles(ratios, n=4)[2] < 1 - LEAST_GAIN

    def cost(row: Row) -> float:
        return row.median if calls is None else row.median * calls + max(0.0, row.first - row.median)

    base, *others = rows
    faster = [row for row in others if row.median is not None and base.median is not None and wins(row)]
    chosen = min((row for row in faster if cost(row) < cost(base)), key=cost, default=base)
    return Outcome(choice, baseline, chosen.candidate, tuple(rows))


def merged(evidence: Mapping[str, Evidence], baseline: str) -> Evidence:
    """Join what several machines found: a candidate is proven if all of them prove it.

    It gains as much as where it gains least: its rounds are those of the baseline on the slowest machine, times its
    largest share of the baseline's.

    evidence: a machine's name -> what it found; all were asked about the same candidates.
    """
    if len(evidence) == 1:
        return next(iter(evidence.values()))
    reasons: dict[str, str] = {}
    rounds: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for candidate in next(iter(evidence.values())).reasons:
        against = {name: one.reasons[candidate] for name, one in evidence.items() if one.reasons[candidate]}
        reasons[candidate] = next((f"{reason} (on {name})" for name, reason in against.items()), "")
    timed = set.intersection(*(set(one.rounds) for one in evidence.values()))
    if baseline in timed:
        slowest = max((one.rounds[baseline] for one in evidence.values()), key=statistics.median)
        for candidate in timed:
            shares = [_ratios(one.rounds[candidate], one.rounds[baseline]) for one in evidence.values()]
            worst = max(shares, key=statistics.median)
            rounds[candidate] = [share * seconds for share, seconds in zip(worst, slowest, strict=False)]
            first[candidate] = max(one.first.get(candidate, 0.0) for one in evidence.values())
    return Evidence(reasons, rounds, first)


def _ratios(rounds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [of / other for of, other in zip(rounds, others, strict=False)]
