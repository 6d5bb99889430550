"""Decide between candidates by their proofs and times."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_fast.choices.trial import WORDS


@dataclass(frozen=True)
class Row:
    """One candidate."""

    candidate: str
    reason: str  # why it is not proven; "" if it is, or is the baseline
    median: float | None = None  # milliseconds; None: not timed
    low: float | None = None  # quartiles
    high: float | None = None

    @property
    def unusable(self) -> bool:
        """Whether it cannot run on this machine, which is not an error."""
        return self.reason.startswith(WORDS["unusable"])


@dataclass(frozen=True)
class Outcome:
    """The chosen candidate, and the measurements behind the choice."""

    choice: str  # what is chosen, in words
    baseline: str  # needs no proof: what every candidate is measured against
    chosen: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """A table: proof, milliseconds with quartiles, and times faster than the baseline."""
        base = next(row.median for row in self.rows if row.candidate == self.baseline)
        lines = [self.choice]
        for row in self.rows:
            state = "baseline" if row.candidate == self.baseline else row.reason or "proven"
            mark = "*" if row.candidate == self.chosen else " "
            text = f"{mark} {row.candidate:12}{state}"
            if row.median is not None:
                text = f"{text:26}{row.median:10.3f} ms ({row.low:.3f} to {row.high:.3f})"
                if base and row.candidate != self.baseline:
                    text += f"   {base / row.median:.2f} times as fast"
            lines.append(text)
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(choice: str, baseline: str, reasons: Mapping[str, str], seconds: Mapping[str, Sequence[float]]) -> Outcome:
    """Choose the fastest proven candidate whose slower quartile is below the baseline's faster one; else the baseline.

    reasons: candidate -> why it is not proven, "" if it is (`trial.prove`); seconds: of baseline and proven candidates
    (`trial.times`). A candidate without times is not chosen, since it did not run to the end.
    """
    rows = []
    for candidate in (baseline, *(name for name in reasons if name != baseline)):
        reason = "" if candidate == baseline else reasons[candidate]
        of = seconds.get(candidate, ()) if not reason else ()
        if len(of) > 1:
            low, median, high = (1e3 * value for value in statistics.quantiles(of, n=4))
            rows.append(Row(candidate, reason, median, low, high))
        else:
            rows.append(Row(candidate, reason or ("" if candidate == baseline else "was not timed to the end")))
    base, *others = rows
    faster = [row for row in others if row.median is not None and base.low is not None and row.high < base.low]
    chosen = min(faster, key=lambda row: row.median, default=base)
    return Outcome(choice, baseline, chosen.candidate, tuple(rows))
