"""The table of a protocol, in the form of the paper: a row for each comparison, people's win rates, then the scorers'.

OUT/table.md  report.html  summary.json      the same in the terminal
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dpo_fast import output_folder
from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.errors import printable
from dpo_fast.evaluation.findings import REPORT, SUMMARY, WIDTH, About, judge
from dpo_fast.evaluation.formats import counted
from dpo_fast.evaluation.people import LEADS, People
from dpo_fast.evaluation.protocol import BASE, SDEDIT, Group, groups_of, is_protocol, remarks_of
from dpo_fast.evaluation.reopened import AGAIN, OF_RUN, is_evaluation, is_scored, names_of, pairs_of
from dpo_fast.evaluation.report.html import document, notes, section, table, text, with_interval
from dpo_fast.evaluation.scored import SCORES, Scored, read_scores
from dpo_fast.evaluation.voted import VOTES, people_of, refresh
from dpo_fast.files import write_text
from dpo_fast.plain_table import side_by_side
from dpo_fast.presets import SDXL_BASE
from dpo_fast.statistics import Interval

MARKDOWN = "table.md"
QUESTIONS = ("general", "appeal", "alignment")  # of the paper
VOTES_EACH = 5
# DPO-SDXL against SDXL by people's votes, general preference (arXiv 2311.12908, section 5)
PUBLISHED = {f"{BASE}-partiprompts": 0.700, f"{BASE}-hps": 0.647}


class Cell(NamedTuple):
    """A rate with its interval, or what there is in its place."""

    rate: Interval | None
    lacking: str = ""  # what is missing, where there is no rate or it is of less than all comparisons

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.rate) if self.rate else "", self.lacking)))

    def html(self) -> str:
        lacking = f"<small>{text(self.lacking)}</small>" if self.lacking else ""
        return (with_interval(self.rate, ".3f") if self.rate else "") + lacking


@dataclass(frozen=True)
class Row:
    """One comparison, or those of its prompts that are about people."""

    group: str
    name: str  # in words
    prompts: int
    people: dict[str, Cell]  # question -> win rate by majority
    scorers: dict[str, Cell]  # scorer -> win rate on the same images
    published: float | None  # general preference, where the comparison is the published one


@dataclass(frozen=True)
class ProtocolTable:
    """What a protocol found."""

    folder: Path
    policy: str
    questions: Sequence[str]
    scorers: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str]
    remarks: Sequence[str]  # what is missing
    reports: dict[str, str] = field(default_factory=dict)  # group -> its report, relative to the folder

    @property
    def head(self) -> list[str]:
        published = ["published"] if any(row.published for row in self.rows) else []
        return ["comparison", "prompts", *self.questions, *self.scorers, *published]

    def cells(self, row: Row) -> list[str]:
        """The texts of a row, under `head`."""
        published = [] if "published" not in self.head else [f"{row.published:.3f}" if row.published else ""]
        of_people = (str(row.people[question]) for question in self.questions)
        of_scorers = (str(row.scorers.get(scorer, "")) for scorer in self.scorers)
        return [row.name, str(row.prompts), *of_people, *of_scorers, *published]

    def __str__(self) -> str:
        """Text for the terminal."""
        lines = [*self.notes, *(f"missing: {remark}" for remark in self.remarks)]
        return "\n\n".join(
            [
                f"win rates of {printable(self.policy)} [95%]",
                side_by_side(self.head, [self.cells(row) for row in self.rows], fixed=2, width=WIDTH),
                "\n".join(textwrap.fill(printable(line), WIDTH, subsequent_indent="  ") for line in lines),
                f"report: {self.folder / REPORT}, {self.folder / MARKDOWN}",
            ]
        )

    def markdown(self) -> str:
        """The table in Markdown, with notes."""
        rows = [self.head, ["---"] * len(self.head), *(self.cells(row) for row in self.rows)]
        lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
        below = [*self.notes, *(f"Missing: {remark}" for remark in self.remarks)]
        return "\n".join(
            [
                f"Win rates of {_escaped(self.policy)} [95 %]",
                "",
                *lines,
                "",
                *(f"- {_escaped(one)}" for one in below),
                "",
            ]
        )

    def page(self) -> str:
        """The table as a page that loads nothing; each row leads to its evaluation's report."""
        rows = []
        for row in self.rows:
            name, report = text(row.name), self.reports.get(row.group)
            of_people = (row.people[question].html() for question in self.questions)
            of_scorers = (row.scorers[scorer].html() if scorer in row.scorers else "" for scorer in self.scorers)
            published = [text(cell) for cell in self.cells(row)[2 + len(self.questions) + len(self.scorers) :]]
            linked = f'<a href="{text(report)}">{name}</a>' if report else name
            rows.append([linked, str(row.prompts), *of_people, *of_scorers, *published])
        body = [
            f'<header>\n<p class="kind">Protocol diffusion-dpo</p>\n<h1><span class="policy">{text(self.policy)}</span>'
            "</h1>\n</header>",
            section("Win rates", table(self.head, rows) + notes(self.notes), "rates"),
            section("What is missing", notes(self.remarks, "warnings"), "missing") if self.remarks else "",
        ]
        return document(f"{self.policy}: protocol diffusion-dpo", body, made_by="dpo_fast.evaluate")

    def for_summary(self) -> dict[str, object]:
        """JSON-ready values."""

        def value(cell: Cell) -> dict[str, object]:
            rate = cell.rate
            return {"win_rate": rate and rate.value, "ci95": rate and [*rate[1:]], "lacking": cell.lacking or None}

        return {
            "protocol": "diffusion-dpo",
            "policy": self.policy,
            "rows": [
                {
                    "group": row.group,
                    "name": row.name,
                    "prompts": row.prompts,
                    "people": {question: value(cell) for question, cell in row.people.items()},
                    "scorers": {scorer: value(cell) for scorer, cell in row.scorers.items()},
                    "published": row.published,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            "missing": list(self.remarks),
        }


def show_votes(file: Path) -> str:
    """Write the reports again that show the votes of a file: in the folder of an evaluation or an evaluated run its
    own, in that of a protocol those of its groups, and its table. Returns what to print; empty for any other file.

    Raises BadInput for files that cannot be read.
    """
    folder = file.parent
    if file.name != VOTES:
        return ""
    if is_protocol(folder):
        return str(write_table(folder, again=True))
    found = next((home for home in (folder, folder / OF_RUN) if is_evaluation(home)), None)
    known = found is not None and (found / SUMMARY).is_file() and is_scored(found)
    return f"report: {refresh(found) / REPORT}" if known else ""


def write_table(folder: Path, *, again: bool = False) -> ProtocolTable:
    """Make the table from the evaluations and votes that are there, and write it. again: first the groups' reports.

    Raises BadInput for files that cannot be read.
    """
    groups = groups_of(folder)
    for group in groups if again else ():
        if is_scored(group.folder):
            refresh(group.folder)
    found = table_of(folder)
    with output_folder.hold(folder):
        write_text(folder / MARKDOWN, found.markdown())
        write_text(folder / REPORT, found.page())
        write_signed_json(folder / SUMMARY, found.for_summary())
    return found


def table_of(folder: Path) -> ProtocolTable:
    """The table from the evaluations and votes that are there. Raises BadInput for files that cannot be read."""
    groups = groups_of(folder)
    of_group = {group.name: people_of(group.folder, pairs_of(group.folder)) for group in groups}
    voted = [people for people in of_group.values() if people is not None]
    questions = list(dict.fromkeys([*QUESTIONS, *(name for people in voted for name in people.opinions)]))
    wanted = voted[0].wanted if voted else VOTES_EACH  # of one session, the same for all
    rows = [row for group in groups for row in _rows_of(group, of_group[group.name], questions, wanted)]
    voters = len({vote.voter for people in voted for vote in people.votes})
    lines = [
        f"{', '.join(questions)}: by the majority of people's votes, {wanted} a comparison, {counted(voters, 'voter')};"
        " ties half, intervals over prompts and voters; k of n: comparisons that have all their votes",
    ]
    scorers = list(dict.fromkeys(scorer for row in rows for scorer in row.scorers))
    if scorers:
        lines.append("then win rates on the same images by scorers, intervals over prompts")
    if any(row.published for row in rows):
        lines.append(
            f"published: {LEADS} preference for DPO-SDXL over SDXL by people, on all prompts (arXiv 2311.12908)"
        )
    missing = remarks_of(folder)
    if not voters:
        missing = [f"nobody has voted: python -m dpo_fast.vote {folder}", *missing]
    return ProtocolTable(
        folder,
        names_of(groups[0].folder)[1] if groups else folder.name,
        questions,
        scorers,
        rows,
        lines,
        missing,
        {group.name: f"{group.folder.name}/{REPORT}" for group in groups if (group.folder / REPORT).is_file()},
    )


def _rows_of(group: Group, people: People | None, questions: Sequence[str], wanted: int) -> list[Row]:
    """A group's row and, if it has prompts about people, theirs."""
    summary = read_signed_json(group.folder / SUMMARY, AGAIN, ("models",))
    scored, medians = read_scores(group.folder / SCORES, unscored=True), summary.get("medians_compared", False)
    against, _, on = group.name.rpartition("-")
    name = f"{against}, SDEdit from layouts" if group.kind == SDEDIT else f"{against}, {on}"
    from_sdxl = any(of.rsplit("/", 1)[-1] == SDXL_BASE.rsplit("/", 1)[-1] for of in summary["models"].get("base", ()))
    rows = [
        Row(
            group.name,
            name,
            len(set(scored.prompts)),
            {question: _cell(people, question, wanted) for question in questions},
            _rates(scored, medians),
            PUBLISHED.get(group.name) if from_sdxl else None,
        )
    ]
    about_people = set(group.people)
    if places := [row for row, prompt in enumerate(scored.prompts) if prompt in about_people]:
        of_people = people and people.of(about_people)
        rows.append(
            Row(
                group.name,
                f"{name}, people",
                len({scored.prompts[row] for row in places}),
                {question: _cell(of_people, question, wanted) for question in questions},
                _rates(scored.of_rows(places), medians),
                None,
            )
        )
    return rows


def _cell(people: People | None, question: str, wanted: int) -> Cell:
    said = people.opinions.get(question) if people is not None else None
    if said is None:
        return Cell(None, f"0 of {wanted} votes")
    complete, asked = said.comparisons - said.undecided, len(people.asked)
    return Cell(said.win_rate, "" if complete == asked else f"{complete} of {asked}")


def _rates(scored: Scored, medians: bool) -> dict[str, Cell]:
    if not scored.scorers:
        return {}
    found = judge(scored, [], About("", "", "", "", {}), compare_medians=medians)
    return {verdict.scorer: Cell(verdict.interval) for verdict in found.overall}


def _escaped(cell: str) -> str:
    """A text inside a Markdown table, with nothing in it that Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*<>|]|(?<=\])\()", r"\\\1", printable(cell))
