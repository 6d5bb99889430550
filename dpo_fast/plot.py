"""Plot a measure against a swept value with Pillow, with intervals and one line per series."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from dpo_fast.errors import printable

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 50, 80  # margins, pixels; the top one grows with the names of several series
COLOURS = ("#1f5fa8", "#c8501e", "#2e8b57", "#8a3ea8", "#a88a1f", "#555555")
FONT_SIZE = 16
STEPS = (1, 2, 2.5, 5, 10)  # of a readable scale, times a power of ten


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None  # ends of the interval; None: no interval
    high: float | None = None


class Series(NamedTuple):
    name: str
    points: list[Point]


def against(
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],  # of the horizontal axis: position and label
    *,
    title: str,
    x_label: str,
    log_x: bool = False,  # every x must then be positive
    even: float | None = None,  # a y value to compare with, drawn as a thin line
) -> Image.Image:
    """Draw the plot. Series are offset by a few pixels, so that their intervals do not hide each other."""
    points = [point for one in series for point in one.points]
    heights = [y for p in points for y in (p.y, p.low, p.high) if y is not None] + ([] if even is None else [even])
    low, high, step = scale(min(heights), max(heights))
    along = math.log if log_x else float
    xs = [along(x) for x, _ in ticks] + [along(p.x) for p in points]
    first, span = min(xs), (max(xs) - min(xs)) or 1.0

    def x_of(x: float) -> float:
        inner = (WIDTH - LEFT - RIGHT) * 0.9
        place = (along(x) - first) / span if max(xs) > first else 0.5
        return LEFT + (WIDTH - LEFT - RIGHT) * 0.05 + inner * place

    named = len(series) if len(series) > 1 else 0
    top = TOP + named * (FONT_SIZE + 6)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - top - BOTTOM) * (y - low) / (high - low)

    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    draw.text((LEFT, 14), printable(title), fill="black", font=font)
    for k in range(round((high - low) / step) + 1):
        y = low + k * step
        draw.line([(LEFT, y_of(y)), (WIDTH - RIGHT, y_of(y))], fill="#e4e4e4")
        draw.text((LEFT - 8, y_of(y)), f"{y:.10g}", fill="black", font=font, anchor="rm")
    if even is not None:
        draw.line([(LEFT, y_of(even)), (WIDTH - RIGHT, y_of(even))], fill="#888888")
    for x, text in ticks:
        draw.line([(x_of(x), HEIGHT - BOTTOM), (x_of(x), HEIGHT - BOTTOM + 6)], fill="black")
        draw.text((x_of(x), HEIGHT - BOTTOM + 10), printable(text), fill="black", font=font, anchor="ma")
    draw.line([(LEFT, top), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], fill="black")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 30), printable(x_label), fill="black", font=font, anchor="ma")
    for number, one in enumerate(series):
        colour, aside = COLOURS[number % len(COLOURS)], 8 * (number - (len(series) - 1) / 2)
        line = [(x_of(p.x) + aside, y_of(p.y)) for p in sorted(one.points)]
        draw.line(line, fill=colour, width=2)
        for point in one.points:
            x, y = x_of(point.x) + aside, y_of(point.y)
            if point.low is not None and point.high is not None:
                ends = y_of(point.low), y_of(point.high)
                draw.line([(x, ends[0]), (x, ends[1])], fill=colour, width=2)
                for end in ends:
                    draw.line([(x - 5, end), (x + 5, end)], fill=colour, width=2)
            draw.ellipse([(x - 4, y - 4), (x + 4, y + 4)], fill=colour)
        if named:
            y = TOP - 12 + number * (FONT_SIZE + 6)
            draw.rectangle([(WIDTH - RIGHT - 14, y), (WIDTH - RIGHT - 4, y + 10)], fill=colour)
            draw.text((WIDTH - RIGHT - 22, y + 5), printable(one.name), fill="black", font=font, anchor="rm")
    return sheet


def scale(low: float, high: float) -> tuple[float, float, float]:
    """Return low end, high end and step of a scale with about six readable lines that covers both values."""
    span = max(high - low, 1e-3 * max(abs(high), abs(low), 1e-6))
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(s * power for s in STEPS if s * power >= span / 5 * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, (last if last > first else first + 1) * step, step
