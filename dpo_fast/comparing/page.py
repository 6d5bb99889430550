"""An overview as a self-contained page: tables, win rates, and the metrics over the steps. It loads nothing."""

from dataclasses import dataclass
from pathlib import Path

from dpo_fast.comparing.formats import lines_below, name_of, packed, texts
from dpo_fast.comparing.lines import Line, chart, legend
from dpo_fast.comparing.overview import Column, Overview, Table
from dpo_fast.comparing.reading import ACCURACY, HELD_OUT, LOSS, MARGIN
from dpo_fast.evaluation.formats import counted
from dpo_fast.evaluation.report import charts
from dpo_fast.evaluation.report.html import document, facts, minus, notes, section, table, text
from dpo_fast.statistics import Interval

WIDTH = 126  # characters beside each other in a table on a wide screen
LONGEST = 34  # characters of a name or a setting that are not broken
SHORT = 12  # characters of a setting that stand where numbers stand on a narrow screen
SMALL = 0.85  # width of the characters beneath a value, to those of the value
# metric in a run's logs -> the title of its chart, and a level to compare with
CHARTS = {
    LOSS: ("Loss", None),
    ACCURACY: ("Implicit accuracy, training pairs", 0.5),
    HELD_OUT: ("Implicit accuracy, held-out pairs", 0.5),
    MARGIN: ("Margin", 0.0),
}


_HINT = "<p class=\"hint\">Changes relative to the base; distances of the policy's images from the base's, 0 to 1.</p>"


@dataclass(frozen=True)
class _Share:
    """A share with its interval, as `charts.bars` draws it."""

    interval: Interval

    @property
    def decided(self) -> bool:
        return not self.interval.low <= 0.5 <= self.interval.high


def page(of: Overview, date: str) -> str:
    """Return the page as text, to be written as UTF-8. date: of the comparison, in words."""
    below = lines_below(of)
    body = [
        _head(of, date, below),
        section("Training", _table(of.training)),
        section("Win rates", _win_rates(of)) if of.scorers else "",
        section("Over the steps", _over_the_steps(of)) if _curves(of) else "",
        section("Held-out accuracy", _held_out(of)) if _shares(of) else "",
        section("Signs of over-optimisation", f"{_table(of.signals)}{_HINT}") if of.signals else "",
        section("How to read this", notes(below.get("Notes", []))) if of.notes else "",
        f"<footer><p>Made by dpo_fast, {text(date)}, from the folders of the runs.</p></footer>",
    ]
    names = ", ".join(row.name for row in of.rows)
    return document(
        f"Comparison: {names}", body, made_by="dpo_fast.compare", style=[Path(__file__).with_name("page.css")]
    )


def _head(of: Overview, date: str, below: dict[str, list[str]]) -> str:
    against = ""
    if of.reference is not None and len(of.rows) > 1:
        against = f' <small>against</small> <span class="policy">{text(of.reference.name)}</span>'
    problems = [*below.get("Missing", []), *below.get("Not comparable", []), *below.get("Warnings", [])]
    common = {name.replace("_", " "): value for name, value in of.common.items()}
    return (
        f'<header>\n<p class="kind">Comparison, {text(date)}</p>\n<h1>{counted(len(of.rows), "run")}{against}</h1>\n'
        f"{notes(problems, 'warnings')}\n"
        + (f'<p class="hint">In all runs:</p>{facts(common)}' if common else "")
        + "\n</header>"
    )


def _win_rates(of: Overview) -> str:
    """For each scorer the win rates as bars, and the table with gains and differences."""
    parts = []
    for place, (scorer, one) in enumerate(of.scorers.items()):
        rates = next(column for column in one.columns if column.key == "win_rate")
        wins = next((column for column in one.columns if column.key == "wins_over_reference"), None)
        beaten = [] if wins is None else [row for row in one.rows if wins.cells[row] is not None]
        direct = ""
        if beaten:
            direct = f"<h3>Wins over {text(of.reference.name)}, image by image</h3>{_bars(of, one, wins, beaten)}"
        parts.append(
            f"<details{'' if place else ' open'}><summary>{text(scorer)}</summary>{_bars(of, one, rates, one.rows)}"
            f"{_table(one)}{direct}</details>"
        )
    return charts.legend("policy ahead", "base, or the other run, ahead") + "".join(parts)


def _bars(of: Overview, one: Table, column: Column, rows: list[int]) -> str:
    bars = [(name_of(one, row), _of_what(of, row), _Share(column.cells[row])) for row in rows]
    return charts.bars(bars, column.head)


def _of_what(of: Overview, row: int) -> str:
    evaluation = of.rows[row].evaluation
    return counted(evaluation.prompts, "prompt") if evaluation.prompts is not None else ""


def _over_the_steps(of: Overview) -> str:
    lines = _curves(of)
    shown = {line.number: of.rows[line.number].name for curves in lines.values() for line in curves}
    drawn = "".join(
        f"{chart(title, lines[metric], even)}" for metric, (title, even) in CHARTS.items() if metric in lines
    )
    return (
        f'{legend(sorted(shown.items()))}<div class="charts">{drawn}</div><p class="hint">Pale: every logged value;'
        " strong: means over equal parts of the steps, where there are many.</p>"
    )


def _curves(of: Overview) -> dict[str, list[Line]]:
    """Metric -> the lines of the runs that have it; all members of a row have its colour."""
    found: dict[str, list[Line]] = {}
    for number, row in enumerate(of.rows):
        for entry in row.members:
            for metric, curve in entry.curves.items():
                found.setdefault(metric, []).append(Line(number, entry.name, curve))
    return found


def _shares(of: Overview) -> list[tuple[str, str, _Share]]:
    """The held-out accuracies that have an interval, run by run."""
    members = [entry for row in of.rows for entry in row.members]
    return [(entry.name, "", _Share(entry.held_out)) for entry in members if isinstance(entry.held_out, Interval)]


def _held_out(of: Overview) -> str:
    return charts.legend("above chance", "below chance") + charts.bars(_shares(of), "accuracy")


def _table(one: Table) -> str:
    """A table; what does not fit beside each other on a wide screen follows in another."""
    names = [name_of(one, row) for row in one.rows]

    def measure(column: Column, cell: object) -> int:
        if isinstance(cell, str):
            return min(max(map(len, cell.split()), default=0), LONGEST)
        value, beneath = texts(column, cell)
        return max(len(value), round(SMALL * len(beneath)))

    parts = []
    for columns in packed(one, WIDTH, [name[:LONGEST] for name in names], measure):
        head = [column.head.replace("_", " ") for column in [one.columns[0], *columns]]
        cells = ([_cell(column, column.cells[row]) for column in columns] for row in one.rows)
        parts.append(table(head, [[text(name), *row] for name, row in zip(names, cells, strict=True)]))
    return "".join(parts)


def _cell(column: Column, cell: object) -> str:
    """A cell with what is shown beside it beneath it; text, such as a setting, may be broken anywhere."""
    value, beside = (text(part) for part in texts(column, cell))
    if isinstance(cell, str):
        return value if len(cell) <= SHORT else f'<span class="long">{value}</span>'
    return minus(value) + (f"<small>{minus(beside.strip('[]()')).replace(', ', ' to ')}</small>" if beside else "")
