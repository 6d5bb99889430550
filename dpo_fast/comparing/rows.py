"""The rows of a comparison: a run, an evaluation, or with pooling all runs that differ only in the seed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dpo_fast.comparing.pairing import Evidence, bootstrap_of, evidence_of, together, why_not
from dpo_fast.comparing.reading import Entry, Evaluation, Judged
from dpo_fast.comparing.settings import SEED, Settings, alike_but_for_the_seed
from dpo_fast.statistics import Interval


class Spread(NamedTuple):
    """The mean of several seeds, with the lowest and the highest."""

    value: float
    lowest: float
    highest: float


Value = Interval | Spread | float | None


@dataclass(frozen=True)
class Row:
    """One run, or several that are shown as one."""

    name: str
    members: list[Entry]
    notes: list[str] = field(default_factory=list)  # what is missing or was left out, in words

    @property
    def first(self) -> Entry:
        return self.members[0]

    @property
    def settings(self) -> Settings | None:
        """The settings of all members; of several the first one's, which differs from theirs in the seed."""
        return self.first.settings

    @property
    def seeds(self) -> str:
        """The seeds of the members."""
        return ", ".join(str(entry.settings[SEED]) for entry in self.members if entry.settings)

    @property
    def evaluation(self) -> Evaluation | None:
        """How its images were made and judged: of several members the first one's."""
        return self.first.evaluation

    @property
    def scorers(self) -> list[str]:
        """The scorers of its evaluation."""
        return list(self.evaluation.judged) if self.evaluation else []

    def combined(self, of: Callable[[Entry], Value]) -> Value:
        """A value of the row's members: of one as it is, of several the mean with the lowest and highest."""
        values = [of(entry) for entry in self.members]
        if len(values) == 1 or None in values:
            return values[0] if len(values) == 1 else None
        plain = [value[0] if isinstance(value, tuple) else value for value in values]
        return plain[0] if len(set(plain)) == 1 else Spread(sum(plain) / len(plain), min(plain), max(plain))

    def evidence(self, scorer: str) -> Evidence:
        """What a scorer says of all images of all members. Their scores must have been read."""
        return together([evidence_of(entry.evaluation, scorer) for entry in self.members])

    def judged(self, scorer: str) -> Judged | None:
        """A scorer's verdict: of one run as it was reported, of several over the prompts that they share."""
        if self.evaluation is None or scorer not in self.evaluation.judged:
            return None
        if len(self.members) == 1:
            return self.evaluation.judged[scorer]
        of = self.evidence(scorer)
        bootstrap = bootstrap_of(of.prompts)
        return Judged(
            bootstrap.share(of.looks),
            bootstrap.mean(of.gains.mean(1)),
            of.base.mean().item(),
            of.policy.mean().item(),
        )

    def of_each_seed(self, scorer: str) -> list[float]:
        """The win rate of each member."""
        return [entry.evaluation.judged[scorer].win_rate.value for entry in self.members]


def rows_of(entries: Sequence[Entry], *, pool_seeds: bool) -> list[Row]:
    """One row for each entry, or with `pool_seeds` for each group of finished ones that differ only in the seed.

    A group's evaluations must be comparable with its first one's, by every scorer; what is not stays a row of its own,
    with a note.
    """
    if not pool_seeds:
        return [Row(entry.name, [entry], entry.missing) for entry in entries]
    rows: dict[tuple, Row] = {}
    for place, entry in enumerate(entries):
        alone = (place,)
        row = Row(entry.name, [entry], entry.missing)
        if entry.settings is None or not entry.finished:
            rows[alone] = row
            continue
        key = (entry.kind, entry.strength, entry.evaluation is None, *alike_but_for_the_seed(entry.settings))
        reason = _why_apart(entry, rows[key].members) if key in rows else None
        if reason is not None:
            rows[alone] = replace(row, notes=[*row.notes, f"not pooled with {rows[key].first.name}: {reason}"])
        elif key in rows:
            rows[key] = replace(rows[key], members=[*rows[key].members, entry])
        else:
            rows[key] = row
    pooled = [_named(row) if len(row.members) > 1 else row for row in rows.values()]
    names = [row.name for row in pooled]
    return [replace(row, name=row.first.name) if names.count(row.name) > 1 else row for row in pooled]


def _why_apart(entry: Entry, members: Sequence[Entry]) -> str | None:
    """Why a run cannot be pooled with others of its settings; None: it can."""
    same = next((other.name for other in members if other.settings[SEED] == entry.settings[SEED]), None)
    if same is not None:
        return f"{same} has its seed, too"
    if entry.evaluation is None:
        return None
    first = members[0].evaluation
    if list(first.judged) != list(entry.evaluation.judged):
        return "other scorers"
    for scorer in first.judged:
        if (reason := why_not(entry.evaluation, first, scorer)) is not None:
            return reason
    return None


def _named(row: Row) -> Row:
    """A row of several members under what their names share, word by word."""
    names = [re.split(r"([-_. /]+)", entry.name) for entry in row.members]  # words with what stands between them
    shared = row.first.name
    if len({len(words) for words in names}) == 1:
        same = [len(set(words)) == 1 for words in zip(*names, strict=True)]
        left = [word for word, alike in zip(names[0], same, strict=True) if alike]
        joined = re.sub(r"([-_. /])\1+", r"\1", "".join(left))
        shared = re.sub(r"([-_. /]seed)?[-_. /]?$", "", joined).lstrip("-_. /") or shared
    lacking = [f"{entry.name}: {line}" for entry in row.members for line in entry.missing]
    return replace(row, name=f"{shared} ({len(row.members)} seeds)", notes=lacking)
