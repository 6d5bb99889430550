"""Tables for the terminal: aligned columns of text."""

from collections.abc import Sequence

from dpo_fast.errors import printable

BETWEEN = 2  # spaces between columns


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a plain table: first column left-aligned, the others right-aligned, two spaces between."""
    head, *rows = ([printable(cell) for cell in row] for row in (head, *rows))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for first, *others in [head, *rows]:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append((" " * BETWEEN).join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)


def side_by_side(head: Sequence[str], rows: Sequence[Sequence[str]], *, fixed: int, width: int) -> str:
    """Format a table in as many as `width` characters take: each has the first `fixed` columns, and as many of the
    others, in their order, as fit, at least one."""

    def part(columns: range) -> str:
        top, *others = ([*row[:fixed], *(row[k] for k in columns)] for row in (head, *rows))
        return plain_table(top, others)

    tables, start, number = [], fixed, len(head)
    while start < number:
        ends = range(number, start, -1)
        end = next((end for end in ends if width_of(part(range(start, end))) <= width), start + 1)
        tables.append(part(range(start, end)))
        start = end
    return "\n\n".join(tables)


def width_of(text: str) -> int:
    """The characters of the longest line."""
    return max(map(len, text.splitlines()))
