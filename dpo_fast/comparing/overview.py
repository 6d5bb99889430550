"""The content of a comparison: tables of runs, what all runs share, and notes; the formats only write it down.

A table has a column of names and a cell for every row. What is not known is None. Rows that cannot be compared with the
one that the others are compared with are marked, and a note says why.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from dpo_fast.comparing.pairing import Contrast, contrast, why_not
from dpo_fast.comparing.reading import Entry
from dpo_fast.comparing.rows import Row, Value, rows_of
from dpo_fast.comparing.settings import OF_LORA, SEED, common, differing, shown, shown_distinct
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.formats import counted, decimals
from dpo_fast.statistics import RESAMPLES, Interval

NAMED = 3  # runs that a note names, at most
STEPS = "max_train_steps"  # shown as the steps that were done


@dataclass(frozen=True)
class Column:
    """Values under a heading, one for each row of the overview."""

    head: str
    key: str  # its name in a CSV file
    cells: list[Value | str | int]
    form: str = ""  # how numbers read: a format such as ".3f"


@dataclass(frozen=True)
class Table:
    """Some columns of some rows."""

    title: str
    columns: list[Column]
    rows: list[int]  # which of the overview's rows are shown
    marks: dict[int, int] = field(default_factory=dict)  # row -> number of the note that it cannot be compared


@dataclass(frozen=True)
class Overview:
    """Everything that a comparison says."""

    rows: list[Row]
    common: dict[str, str]  # setting -> its value in all runs
    reference: Row | None  # with which the others are compared; None: nothing was evaluated
    training: Table
    scorers: dict[str, Table]
    signals: Table | None
    incomparable: list[str]  # the notes that marks number, from 1
    notes: list[str]  # how to read the numbers
    missing: list[str]  # what is missing, by run
    warnings: list[str]  # signs of over-optimisation, by run

    @property
    def tables(self) -> list[Table]:
        return [self.training, *self.scorers.values(), *([self.signals] if self.signals else [])]


def overview(entries: Sequence[Entry], *, against: str | None = None, pool_seeds: bool = False) -> Overview:
    """Compare runs and evaluations. against: the name or folder of one, with which the others are compared.

    Raises BadInput if `against` is none of them, or has no evaluation.
    """
    rows = rows_of(entries, pool_seeds=pool_seeds)
    reference = _reference(rows, against)
    scorers = list(dict.fromkeys(scorer for row in rows for scorer in row.scorers))
    reasons: dict[str, dict[str, None]] = {}  # why rows cannot be compared with the reference -> their names
    tables = {scorer: _of_scorer(scorer, rows, reference, reasons) for scorer in scorers}
    known = [row.settings for row in rows if row.settings is not None]
    every = [entry.settings for row in rows for entry in row.members if entry.settings is not None]
    not_compared = ((_listed(names), reason) for reason, names in reasons.items())
    return Overview(
        rows,
        common={name: shown(value) for name, value in common(every).items()},
        reference=reference,
        training=_training(rows, differing(known)),
        scorers=tables,
        signals=_signals(rows),
        incomparable=[f"{names}: not compared with {reference.name}: {reason}" for names, reason in not_compared],
        notes=_notes(rows, tables, reference),
        missing=[f"{row.name}: {line}" for row in rows for line in (*row.notes, *_unevaluated(row, scorers))],
        warnings=_warnings(rows),
    )


def _reference(rows: Sequence[Row], against: str | None) -> Row | None:
    """The row that the others are compared with."""
    if against is None:
        return next((row for row in rows if row.evaluation and row.evaluation.scored), None)
    place = os.path.realpath(against)
    for row in rows:
        names = (row.name, *(entry.name for entry in row.members))
        if against in names or any(place == os.path.realpath(entry.folder) for entry in row.members):
            if row.evaluation is None or row.evaluation.scored is None:
                raise BadInput(f"--against {against} has no scores of single images to compare with: name another run")
            return row
    raise BadInput(f"--against {against} is none of the runs: name one of {', '.join(row.name for row in rows)}")


def _unevaluated(row: Row, scorers: Sequence[str]) -> list[str]:
    """What is said of a finished run that was not evaluated, where others were."""
    return ["no evaluation"] if scorers and row.first.finished and row.evaluation is None and not row.notes else []


def _column(head: str, key: str, rows: Sequence[Row], of: Callable[[Entry], Value], form: str) -> Column:
    return Column(head, key, [row.combined(of) for row in rows], form)


def _training(rows: Sequence[Row], apart: Sequence[str]) -> Table:
    """How the runs were trained, and what training says of itself."""
    columns = [Column("run", "run", [row.name for row in rows])]
    pooled = any(len(row.members) > 1 for row in rows)
    for name in dict.fromkeys([*apart, *([SEED] if pooled else [])]):
        if name == STEPS:
            continue
        texts = shown_distinct([row.settings[name] if row.settings else None for row in rows])
        known = [row.settings is not None and not (name in OF_LORA and row.settings[name] is None) for row in rows]
        cells = [text if is_known else None for text, is_known in zip(texts, known, strict=True)]
        if name == SEED:
            cells = [row.seeds if row.settings else None for row in rows]
        columns.append(Column(name, name, cells))
    columns += [
        _column("steps", "steps", rows, lambda entry: entry.steps, ","),
        _column("result of step", "result_of", rows, lambda entry: entry.result_of, ","),
        _column("strength", "strength", rows, lambda entry: entry.strength, "g"),
        _column("pairs", "pairs", rows, lambda entry: entry.pairs, ","),
        _column("loss", "loss", rows, lambda entry: entry.loss, ".4f"),
        _column("accuracy", "implicit_accuracy", rows, lambda entry: entry.accuracy, ".3f"),
        _column("held-out accuracy", "validation_accuracy", rows, lambda entry: entry.held_out, ".3f"),
        _column("seconds", "seconds", rows, lambda entry: entry.seconds, ",.0f"),
    ]
    return Table("Training", _known(columns), [*range(len(rows))])


def _of_scorer(scorer: str, rows: Sequence[Row], reference: Row | None, reasons: dict[str, dict[str, None]]) -> Table:
    """Win rates and gains by a scorer; adds to `reasons` why rows cannot be compared with the reference."""
    judged = [row.judged(scorer) for row in rows]
    pairs = list(zip(rows, judged, strict=True))
    shown_rows = [number for number, of in enumerate(judged) if of is not None]
    columns = [
        Column("run", "run", [row.name for row in rows]),
        Column("win rate", "win_rate", [of and of.win_rate for of in judged], ".3f"),
    ]
    if any(len(row.members) > 1 for row in rows):
        each = [[f"{rate:.3f}" for rate in row.of_each_seed(scorer)] if of else [] for row, of in pairs]
        columns.append(Column("of each seed", "win_rate_of_each_seed", [", ".join(rates) or None for rates in each]))
    gains = [of and of.gain for of in judged]
    means = [mean for of in judged if of is not None for mean in (of.base, of.policy) if mean is not None]
    form = f".{decimals(*means)}f" if means else ".4g"
    columns += [
        Column("base", "score_base", [of and of.base for of in judged], form),
        Column("policy", "score_policy", [of and of.policy for of in judged], form),
        Column("gain", "gain", gains, _signed(gains)),
    ]
    contrasts: list[Contrast | None] = [None] * len(rows)
    marks: dict[int, int] = {}
    others = [number for number in shown_rows if rows[number] is not reference]
    if reference is not None and scorer in reference.scorers and others:
        theirs = reference.evidence(scorer)
        for number in others:
            row = rows[number]
            reason = why_not(row.evaluation, reference.evaluation, scorer)
            if reason is None:
                contrasts[number] = contrast(row.evidence(scorer), theirs)
                continue
            reasons.setdefault(reason, {})[row.name] = None
            marks[number] = [*reasons].index(reason) + 1
        changes = [of and of.gain for of in contrasts]
        columns += [
            Column("win rate, difference", "win_rate_difference", [of and of.win_rate for of in contrasts], "+.3f"),
            Column("gain, difference", "gain_difference", changes, _signed(changes)),
            Column("wins over it", "wins_over_reference", [of and of.direct for of in contrasts], ".3f"),
        ]
    title = f"{scorer}, differences against {reference.name}" if any(contrasts) else scorer
    return Table(title, _known(columns), shown_rows, marks)


def _known(columns: Sequence[Column]) -> list[Column]:
    """The columns of which anything is known."""
    return [column for column in columns if any(cell is not None for cell in column.cells)]


def _listed(names: Collection[str]) -> str:
    """The first few names, and how many others there are."""
    first = ", ".join([*names][:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED} more"


def _signed(of: Sequence[Interval | None]) -> str:
    """A format for differences that shows the largest of them to three digits."""
    ends = [abs(end) for one in of if one is not None for end in one]
    return f"+.{decimals(max(ends), digits=3)}f" if ends else "+.3g"


def _signals(rows: Sequence[Row]) -> Table | None:
    """Signs of over-optimisation: what changed in the images, and when training showed it; None: nothing is known."""
    evaluations = [row.evaluation for row in rows if row.evaluation]
    columns = []
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.signals):
        relative = any(name in evaluation.signals and evaluation.signals[name].base for evaluation in evaluations)
        form = "+.1%" if relative else ".4f"
        columns.append(_column(name, name.replace(" ", "_"), rows, partial(_change, name=name), form))
    columns.append(
        _column("over-optimised at step", "overoptimised_at", rows, lambda entry: entry.overoptimised_at, ",")
    )
    columns = _known(columns)
    shown_rows = [number for number in range(len(rows)) if any(one.cells[number] is not None for one in columns)]
    names = Column("run", "run", [row.name for row in rows])
    return Table("Signs of over-optimisation", [names, *columns], shown_rows) if shown_rows else None


def _change(entry: Entry, name: str) -> Interval | None:
    """How much a measure changed, as a share of the base's; a distance as it is."""
    signal = entry.evaluation.signals.get(name) if entry.evaluation else None
    if signal is None or signal.base is None:
        return signal and signal.difference
    return Interval(*(end / signal.base for end in signal.difference)) if signal.base > 0 else None


def _warnings(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for entry in row.members:
            if entry.overoptimised_at is not None:
                lines.append(
                    f"{entry.name}: over-optimisation in training at step {entry.overoptimised_at}: accuracy was high"
                    " while the policy had become worse than the reference on both images"
                )
            lines += [f"{entry.name}: {warning}" for warning in (entry.evaluation.warnings if entry.evaluation else ())]
    return lines


def _notes(rows: Sequence[Row], tables: dict[str, Table], reference: Row | None) -> list[str]:
    """How to read the numbers."""
    lines = []
    if tables:
        lines.append(
            "win rate: share of images won over the run's base, ties half; gain: mean score of the policy minus that of"
            " the base; in brackets: 95% intervals over prompts"
        )
        sizes = {}
        for row in rows:
            if row.evaluation is not None and row.evaluation.images is not None:
                of = f"{counted(row.evaluation.images, 'image')} of {counted(row.evaluation.prompts or 0, 'prompt')}"
                of += ", by the medians of each prompt's" if row.evaluation.medians else ""
                sizes.setdefault(of, []).append(row.name)
        if len(sizes) == 1:
            lines.append(f"images: {next(iter(sizes))}, of each side")
        else:
            lines += [f"images: {of}, of each side: {_listed(names)}" for of, names in sizes.items()]
    if any(len(table.columns) > 1 and table.columns[-1].key == "wins_over_reference" for table in tables.values()):
        lines.append(
            f"differences: the run's win rate and gain minus those of {reference.name}; wins over it: share of images"
            f" that beat its images; both on the same prompts and noise, with a paired bootstrap over prompts"
            f" ({RESAMPLES} resamples); intervals are not corrected for the number of runs"
        )
    if any(len(row.members) > 1 for row in rows):
        lines.append(
            "several seeds: win rates and gains over the images of all of them, with intervals over the prompts that"
            " they share, which say nothing of other seeds; in parentheses: the lowest and highest seed"
        )
    held_out = {entry.held_out_of for row in rows for entry in row.members if entry.held_out is not None}
    if held_out:
        lines.append(
            "accuracy: implicit, of the last logged training pairs; held-out: of pairs that were not trained on"
        )
    if len(held_out) > 1:
        lines.append("held-out accuracies are of different pairs, since other seeds hold out others: compare with care")
    return lines
