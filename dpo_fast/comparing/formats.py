"""An overview as text: for the terminal, as CSV, Markdown and LaTeX. Names come from files and folders: all is escaped.

terminal    aligned columns; those that do not fit beside each other follow in further blocks
CSV         one line for each row, all columns, full precision; text that a spreadsheet would run is quoted
Markdown    a table for each part, as GitHub renders it
LaTeX       a tabular for each part, with booktabs; characters that pdflatex lacks become [U+XXXX]
"""

import csv
import io
import re
import textwrap
from collections.abc import Callable, Sequence

from dpo_fast.comparing.options import BEGINS
from dpo_fast.comparing.overview import Column, Overview, Table
from dpo_fast.comparing.rows import Spread
from dpo_fast.errors import printable
from dpo_fast.evaluation.formats import counted
from dpo_fast.plain_table import BETWEEN, plain_table
from dpo_fast.statistics import Interval

WIDTH = 80  # columns of a terminal whose width is not known
LINE = 72  # characters that fit beside each other in a column of LaTeX's article
_LONG_NAME = 28  # characters: where a name is longer, the terminal's tables number the runs


def texts(column: Column, cell: object) -> tuple[str, str]:
    """A cell's value and what is shown beside it: the interval, or the lowest and highest of several seeds."""
    if cell is None:
        return "", ""
    if isinstance(cell, str):
        return cell, ""
    if isinstance(cell, (Interval, Spread)):
        value, low, high = (format(number, column.form) for number in cell)
        return value, f"[{low}, {high}]" if isinstance(cell, Interval) else f"({low} to {high})"
    return format(cell, column.form), ""


def joined(column: Column, cell: object) -> str:
    """A cell's value with what is shown beside it."""
    return " ".join(filter(None, texts(column, cell)))


def name_of(table: Table, row: int) -> str:
    """A row's name, with the number of the note that says why it is not compared with the others."""
    return f"{table.columns[0].cells[row]}" + (f" ({table.marks[row]})" if row in table.marks else "")


def lines_below(of: Overview) -> dict[str, list[str]]:
    """Title -> the lines below the tables, without empty parts."""
    numbered = [f"({number}) {line}" for number, line in enumerate(of.incomparable, start=1)]
    parts = {"Not comparable": numbered, "Missing": of.missing, "Warnings": of.warnings, "Notes": of.notes}
    return {title: lines for title, lines in parts.items() if lines}


def said_of_all(of: Overview) -> str:
    """What all runs have in common, in one line; empty where nothing is known."""
    if not of.common:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in of.common.items())
    return f"all with {settings}" if len(of.rows) > 1 else settings


# ---- the terminal ------------------------------------------------------------------------------------------------


def terminal(of: Overview, width: int = WIDTH) -> str:
    """The overview for a terminal of `width` columns."""
    names = [name_of(table, row) for table in of.tables for row in table.rows]
    numbered = len(of.rows) > 1 and max(map(len, names)) > _LONG_NAME
    parts = [_filled(f"{counted(len(of.rows), 'run')}: {said_of_all(of)}".rstrip(": "), width)]
    if numbered:
        parts.append("\n".join(f"{number}  {printable(row.name)}" for number, row in enumerate(of.rows, start=1)))
    for table in of.tables:
        blocks = _blocks(table, width, numbered)
        parts += [f"{printable(table.title)}\n{blocks[0]}", *blocks[1:]]
    for title, lines in lines_below(of).items():
        parts.append("\n".join([f"{title}:", *(_filled(line, width) for line in lines)]))
    return "\n\n".join(parts)


def _filled(line: str, width: int) -> str:
    return textwrap.fill(printable(line), width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _blocks(table: Table, width: int, numbered: bool) -> list[str]:
    """The table with as many columns beside each other as fit into `width`, the others in blocks below it."""
    names = [name_of(table, row) for row in table.rows]
    if numbered:
        names = [
            f"{row + 1}" + name_of(table, row).removeprefix(str(table.columns[0].cells[row])) for row in table.rows
        ]
    blocks = []
    for columns in packed(table, width, names):
        cells = ([joined(column, column.cells[row]) or "-" for column in columns] for row in table.rows)
        rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
        blocks.append(plain_table([table.columns[0].head, *(column.head for column in columns)], rows))
    return blocks


def packed(
    table: Table,
    width: int,
    names: Sequence[str],
    measure: Callable[[Column, object], int] | None = None,
) -> list[list[Column]]:
    """A table's columns, but for that of the names, in groups that fit into `width` characters beside the names.

    measure: how wide a cell, or the heading, is in a column. None: the value and what is shown beside it, in one line.
    A column that does not fit by itself is a group of its own. There is at least one group.
    """
    measure = measure or (lambda column, cell: len(printable(joined(column, cell))))
    used = room = max(map(len, [table.columns[0].head, *names]))
    groups: list[list[Column]] = [[]]
    for column in table.columns[1:]:
        needed = BETWEEN + max(
            measure(column, cell) for cell in (column.head, *(column.cells[row] for row in table.rows))
        )
        if groups[-1] and used + needed > width:
            groups.append([])
            used = room
        groups[-1].append(column)
        used += needed
    return groups


# ---- CSV ---------------------------------------------------------------------------------------------------------


def as_csv(of: Overview) -> str:
    """The overview as CSV with a line of column names: one line for each row, empty where nothing is known."""
    head, lines = (
        ["run", "folder"],
        [[row.name, " ".join(str(entry.folder) for entry in row.members)] for row in of.rows],
    )
    for table in of.tables:
        prefix = next((f"{scorer}: " for scorer, one in of.scorers.items() if one is table), "")
        for column in table.columns[1:]:
            cells = [column.cells[row] if row in table.rows else None for row in range(len(of.rows))]
            kinds = {type(cell) for cell in cells}
            head.append(f"{prefix}{column.key}")
            for line, cell in zip(lines, cells, strict=True):
                line.append(cell[0] if isinstance(cell, (Interval, Spread)) else cell)
            for kind, ends in ((Interval, ("low", "high")), (Spread, ("lowest", "highest"))):
                for place, end in enumerate(ends, start=1) if kind in kinds else ():
                    head.append(f"{prefix}{column.key}_{end}")
                    for line, cell in zip(lines, cells, strict=True):
                        line.append(cell[place] if isinstance(cell, kind) else None)
        if table.marks:
            head.append(f"{prefix}not_comparable")
            for row, line in enumerate(lines):
                line.append(of.incomparable[table.marks[row] - 1] if row in table.marks else None)
    head.append("notes")
    for row, line in zip(of.rows, lines, strict=True):
        line.append("; ".join(row.notes) or None)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_csv_cell, head))
    writer.writerows([_csv_cell(cell) for cell in line] for line in lines)
    return buffer.getvalue()


def _csv_cell(cell: object) -> object:
    """A cell for a CSV file. Spreadsheets run text that begins with = + - @ as a formula: an apostrophe prevents it."""
    if not isinstance(cell, str):
        return "" if cell is None else repr(cell)
    text = printable(cell).encode("utf-8", "replace").decode()
    return f"'{text}" if text[:1] in tuple("=+-@") else text


# ---- Markdown and LaTeX ------------------------------------------------------------------------------------------


def markdown(of: Overview) -> str:
    """The overview as Markdown, as GitHub renders it."""
    parts = [
        BEGINS["markdown"].decode(),
        _in_markdown(f"{counted(len(of.rows), 'run')}: {said_of_all(of)}".rstrip(": ")),
    ]
    for table in of.tables:
        head = " | ".join(_in_markdown(column.head) for column in table.columns)
        rule = "|".join(["---", *("---:" for _ in table.columns[1:])])
        lines = [f"| {head} |", f"|{rule}|"]
        for row in table.rows:
            cells = [name_of(table, row), *(joined(column, column.cells[row]) for column in table.columns[1:])]
            lines.append(f"| {' | '.join(map(_in_markdown, cells))} |")
        parts += [f"**{_in_markdown(table.title)}**", "\n".join(lines)]
    for title, lines in lines_below(of).items():
        parts.append("\n".join([f"{title}:", "", *(f"- {_in_markdown(line)}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def latex(of: Overview) -> str:
    """The overview as LaTeX, to be read by \\input in a document that loads booktabs."""
    parts = [f"{BEGINS['latex'].decode()}; needs \\usepackage{{booktabs}}"]
    parts.append(_in_latex(f"{counted(len(of.rows), 'run')}: {said_of_all(of)}".rstrip(": ")) + "\n")
    for table in of.tables:
        parts.append(f"\\medskip\\noindent\\textbf{{{_in_latex(table.title)}}}\\par\\nopagebreak\\smallskip")
        names = [name_of(table, row) for row in table.rows]
        for columns in packed(table, LINE, names):
            head = " & ".join(_in_latex(column.head) for column in [table.columns[0], *columns])
            cells = ([joined(column, column.cells[row]) for column in columns] for row in table.rows)
            rows = ([name, *row] for name, row in zip(names, cells, strict=True))
            parts += [
                f"\\noindent\\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}",
                f"\\toprule\n{head} \\\\\n\\midrule",
                *(" & ".join(map(_in_latex, row)) + r" \\" for row in rows),
                "\\bottomrule\n\\end{tabular}\\par\\smallskip",
            ]
    for title, lines in lines_below(of).items():
        items = "\n".join(f"\\item {_in_latex(line)}" for line in lines)
        parts.append(f"\\medskip\\noindent {title}:\n\\begin{{itemize}}\n{items}\n\\end{{itemize}}")
    return "\n".join(parts) + "\n"


def _in_markdown(text: str) -> str:
    """Escape what Markdown would read as markup, HTML or a link; a lone half of a surrogate pair becomes ?."""
    text = printable(text).encode("utf-8", "replace").decode()
    text = re.sub(r"[&<>]", lambda found: {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[found[0]], text)
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    # no link is made of an address or of @name
    return re.sub(r"(?i)(https?:)(//)|\b(www)(\.)|(@)(?=\w)", _unlinked, text)


def _unlinked(found: re.Match[str]) -> str:
    return "&#8203;".join(part for part in found.groups() if part) + ("&#8203;" if found[5] else "")


_IN_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_\allowbreak{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\ttfamily\char34}",
    "`": "{`}",
    "'": r"{'}",  # two of them would become one
    "[": "{[}",  # at the start of a row it would be an option of the line before it
    "]": "{]}",
    "-": "{-}",  # two of them would become a dash
}


def _in_latex(text: str) -> str:
    """Escape what LaTeX would obey or set as something else; signs of numbers become minus signs."""
    text = re.sub(r"(?<![\w.-])-(?=\d)", "\0", printable(text))
    return "".join(
        "$-$" if c == "\0" else _IN_LATEX.get(c, c if _is_set(c) else f"{{[}}U+{ord(c):04X}{{]}}") for c in text
    )


def _is_set(character: str) -> bool:
    """Whether pdflatex sets a character in its usual fonts: printable ASCII, and the Latin letters with accents."""
    return " " <= character <= "~" or ("\u00c0" <= character <= "\u00ff" and character not in "ÐÞðþ×÷")
