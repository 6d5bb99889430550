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


def width_of(text: str) -> int:
    """The characters of the longest line."""
    return max(map(len, text.splitlines()))
