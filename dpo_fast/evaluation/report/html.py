"""What the pages share: a document that loads nothing, sections, tables, numbers with intervals, escaped text."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dpo_fast.statistics import Interval

STYLE = Path(__file__).with_name("base.css")  # of all pages


def document(title: str, body: Sequence[str], *, made_by: str, style: Sequence[Path] = (), script: str = "") -> str:
    """Return a page as text, to be written as UTF-8.

    title: plain text. body: HTML, its empty parts left out. made_by: the command, without anything to escape. style:
    files of CSS that follow STYLE. script: runs at the end of the page; its security policy allows that one alone, or
    without it none, and nothing may be loaded but images that are in the page.
    """
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        allowed += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        script = f"<script>{script}</script>\n"
    css = "".join(file.read_text(encoding="utf-8") for file in (STYLE, *style))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{made_by}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(allowed)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n{script}</body>\n</html>\n"
    )


def section(title: str, content: str, name: str = "") -> str:
    """A part of the page under a heading. title, content: HTML. name: its id."""
    return f"<section{f' id={name}' if name else ''}>\n<h2>{title}</h2>\n{content}\n</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:  # rows: HTML; the first cell names the row
    """A table. On a narrow screen each row becomes a block, and each cell shows its column's name."""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td data-name="{text(name)}">{cell}</td>' for name, cell in zip(head[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<table class="wide"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def facts(of: dict[str, str]) -> str:
    """A list of names and values, both plain text."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in of.items())
    return f"<dl>{rows}</dl>"


def notes(lines: Sequence[str], kind: str = "notes") -> str:
    """A list of lines of plain text; nothing where there are none. kind: notes or warnings."""
    return f'<ul class="{kind}">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>' if lines else ""


def with_interval(of: Interval, form: str) -> str:
    """A value above the ends of its interval, in a format such as ".3f"."""
    return minus(f"{of.value:{form}}<small>{of.low:{form}} to {of.high:{form}}</small>")


def minus(numbers: str) -> str:
    """The same with minus signs, which are as wide as a plus."""
    return numbers.replace("-", "−")


def text(outside: str) -> str:
    """Escape text from outside for HTML, with characters that HTML forbids replaced by U+FFFD."""
    return escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", outside))
