"""A picture of what votes say: win rates with intervals for each question and pair of models, and strengths."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from dpo_fast.captions import LINE, caption
from dpo_fast.pictures import save_png
from dpo_fast.plot import COLOURS, scale
from dpo_fast.votes.tally import counted

WIDTH, MARGIN, NAMES = 1100, 24, 330  # pixels
LEFT, RIGHT = MARGIN + NAMES + 20, 890  # of the axis
AXIS, GAP = 44, 18  # heights
FONT = 15
PALE = "#9a9a9a"


class Bar(NamedTuple):
    """A value with its interval, as a row shows it."""

    value: float
    low: float
    high: float
    colour: str

    def text(self, digits: int) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Row(NamedTuple):
    """One line of a panel."""

    names: list[str]  # one below the other; the last of several is grey
    bars: list[Bar]


class Panel(NamedTuple):
    """Rows on one axis."""

    title: str
    rows: list[Row]
    low: float
    high: float
    step: float
    even: float  # the value at which nobody is ahead
    digits: int

    @property
    def height(self) -> int:
        return LINE + 8 + (self.row * len(self.rows) + AXIS if self.rows else 0) + GAP

    @property
    def row(self) -> int:
        """The height of a row."""
        return LINE * max(2, *(len(row.names) for row in self.rows)) + 10


def picture_of(summary: Mapping[str, Any]) -> Image.Image:
    """Draw the summary of `tally.summary_of`: a panel of rates for each question, and one of strengths where there are
    more than two models. Each pair has two intervals: the majority's above that of single votes."""
    panels = []
    for question in summary["questions"].values():
        panels += _panels(question)
    top = MARGIN + 2 * LINE
    sheet = Image.new("RGB", (WIDTH, top + sum(panel.height for panel in panels) + MARGIN), "white")
    _legend(sheet, summary)
    for panel in panels:
        _draw(sheet, panel, top)
        top += panel.height
    return sheet


def save_picture(summary: Mapping[str, Any], path: Path) -> None:
    """Write the picture as PNG, atomically."""
    save_png(picture_of(summary), path)


def _panels(question: Mapping[str, Any]) -> list[Panel]:
    if not question["pairs"]:
        return [Panel(f"{question['text']}: no votes yet", [], 0, 1, 0.25, 0.5, 3)]
    grouped = len({pair["group"] for pair in question["pairs"]}) > 1
    rows = [
        Row(
            [
                pair["models"][1],
                f"against {pair['models'][0]}",
                f"{counted(pair['comparisons'], 'comparison')}, {counted(pair['votes'], 'vote')}"
                + (f", {pair['group']}" if grouped else ""),
            ],
            [
                Bar(pair["win_rate"], *pair["ci95"], COLOURS[0]),
                Bar(pair["by_votes"], *pair["by_votes_ci95"], PALE),
            ],
        )
        for pair in question["pairs"]
    ]
    panels = [Panel(question["text"], rows, 0.0, 1.0, 0.25, 0.5, 3)]
    if question["ranking"]:
        rows = [Row([of["model"]], [Bar(of["strength"], *of["ci95"], COLOURS[1])]) for of in question["ranking"]]
        ends = [end for row in rows for end in row.bars[0][1:3]]
        panels.append(Panel("Strengths, log scale, 0: the average", rows, *scale(min(ends), max(ends)), 0.0, 2))
    if question["ranking_note"]:
        panels.append(Panel(f"Strengths: {question['ranking_note']}", [], 0, 1, 1, 0, 2))
    return panels


def _legend(sheet: Image.Image, summary: Mapping[str, Any]) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    counts = f"{summary['votes']:,} votes of {summary['voters']:,} voters; 95% intervals over prompts and voters"
    sheet.paste(caption(counts, LEFT + 260, 1), (MARGIN, MARGIN))
    x = WIDTH - MARGIN
    for text, colour in (("single votes", PALE), ("majority", COLOURS[0])):
        draw.text((x, MARGIN + LINE / 2), text, fill="black", font=font, anchor="rm")
        x -= round(font.getlength(text)) + 12
        draw.ellipse([(x - 6, MARGIN + LINE / 2 - 5), (x + 4, MARGIN + LINE / 2 + 5)], fill=colour)
        x -= 30


def _draw(sheet: Image.Image, panel: Panel, top: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    sheet.paste(caption(panel.title, WIDTH - 2 * MARGIN, 1), (MARGIN, top))
    if not panel.rows:
        return
    first = top + LINE + 8
    bottom = first + panel.row * len(panel.rows)

    def x_of(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - panel.low) / (panel.high - panel.low)

    for k in range(round((panel.high - panel.low) / panel.step) + 1):
        value = panel.low + k * panel.step
        draw.line([(x_of(value), first), (x_of(value), bottom)], fill="#e4e4e4")
        text = f"{value:.10g}" if not math.isclose(value, 0, abs_tol=1e-9) else "0"
        draw.text((x_of(value), bottom + 8), text, fill="black", font=font, anchor="ma")
    draw.line([(x_of(panel.even), first), (x_of(panel.even), bottom)], fill="#555555")
    draw.line([(LEFT, bottom), (RIGHT, bottom)], fill="black")
    for number, row in enumerate(panel.rows):
        middle = first + panel.row * number + panel.row // 2
        for line, text in enumerate(row.names):
            fill = "gray" if 0 < line == len(row.names) - 1 else "black"
            sheet.paste(caption(text, NAMES, 1, fill), (MARGIN, middle - len(row.names) * LINE // 2 + line * LINE))
        for place, bar in enumerate(row.bars):
            y = middle + 16 * (place - (len(row.bars) - 1) / 2)
            draw.line([(x_of(bar.low), y), (x_of(bar.high), y)], fill=bar.colour, width=3)
            for end in (bar.low, bar.high):
                draw.line([(x_of(end), y - 5), (x_of(end), y + 5)], fill=bar.colour, width=2)
            draw.ellipse([(x_of(bar.value) - 5, y - 5), (x_of(bar.value) + 5, y + 5)], fill=bar.colour)
            draw.text((RIGHT + 16, y), bar.text(panel.digits), fill="black", font=font, anchor="lm")
