"""Metrics over the steps as lines: inline SVG that fits any width, with its labels in HTML so that they stay readable.

Few points are drawn as they are. Of many, a pale line shows the values (thinned so that it looks the same: no peak is
lost) and a strong one their means over equal parts of the steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dpo_fast.comparing.logs import Curve, averaged, thinned
from dpo_fast.evaluation.report.html import minus, text
from dpo_fast.plot import scale

COLOURS, DASHES = 8, 3  # of lines; together they tell 24 runs apart
FEW = 40  # points: as many are drawn without means
PARTS, MEANS = 300, 40  # of the steps, for the values that are drawn and for their means
MOST_POINTS = 40_000  # drawn in one chart, all runs together
SIDE = 1000  # of the drawing, in its own units
TICKS = 6  # labels below the chart, at most


class Line(NamedTuple):
    """A curve of a run."""

    number: int  # of the run, which has its colour and dashes in all charts
    name: str
    curve: Curve


def legend(names: Sequence[tuple[int, str]]) -> str:
    """Return HTML that names the lines: number and name (plain text) of each run."""
    items = "".join(
        f'<li><svg class="swatch" aria-hidden="true"><line class="{_look(number)}" x1="0" x2="100%" y1="50%" y2="50%"/>'
        f"</svg><bdi>{text(name)}</bdi></li>"
        for number, name in names
    )
    return f'<ul class="series">{items}</ul>'


def chart(title: str, lines: Sequence[Line], even: float | None = None) -> str:
    """Return HTML with the lines over the steps, from step 0. even: a value to compare with, drawn as a thin line.

    There must be at least one point.
    """
    values = [point.value for line in lines for point in line.curve] + ([] if even is None else [even])
    low, high, step = scale(min(values), max(values))
    last = max(line.curve[-1].step for line in lines)
    parts = max(10, min(PARTS, MOST_POINTS // (4 * len(lines))))

    def place(curve: Curve) -> list[tuple[float, float]]:
        return [(point.step / last * SIDE, (high - point.value) / (high - low) * SIDE) for point in curve]

    drawn = []
    for line in lines:
        look = _look(line.number)
        if len(line.curve) <= FEW:
            drawn += [_path(place(line.curve), look), _dots(place(line.curve), look)]
        else:
            drawn.append(_path(place(thinned(line.curve, parts)), f"{look} pale"))
    many = [line for line in lines if len(line.curve) > FEW]
    drawn += [_path(place(averaged(line.curve, MEANS)), f"{_look(line.number)} mean") for line in many]
    pale = 0.4 / max(1, len(many)) ** 0.5  # of many runs, so that the means are seen
    rules = [low + k * step for k in range(round((high - low) / step) + 1)]
    across = "".join(_rule((high - y) / (high - low) * SIDE, "grid") for y in rules)
    across += "" if even is None else _rule((high - even) / (high - low) * SIDE, "level")
    labels = "".join(f'<li style="top:{(high - y) / (high - low):.2%}">{minus(f"{y:.10g}")}</li>' for y in rules)
    steps = "".join(f'<li style="left:{x / last:.2%}">{x:,}</li>' for x in _ticks(last))
    ends = "; ".join(f"{line.name}: {line.curve[-1].value:.4g}" for line in lines[: COLOURS * DASHES])
    spoken = f"{title} over the steps to {last}. At the end: {ends}"
    return (
        f'<figure class="lines"><figcaption>{text(title)}</figcaption><div class="plot">'
        f'<ul class="heights">{labels}</ul>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" style="--pale:{pale:.2f}" role="img"'
        f' aria-label="{text(spoken)}">'
        f'<title>{text(spoken)}</title>{across}{"".join(drawn)}</svg><ul class="steps">{steps}</ul></div></figure>'
    )


def _look(number: int) -> str:
    """The classes of a run's lines."""
    return f"c{number % COLOURS} d{number // COLOURS % DASHES}"


def _rule(y: float, kind: str) -> str:
    return f'<path class="{kind}" d="M0 {y:.1f}H{SIDE}"/>'


def _path(points: Sequence[tuple[float, float]], look: str) -> str:
    return f'<path class="{look}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _dots(points: Sequence[tuple[float, float]], look: str) -> str:
    """Points as lines without length and with round ends, which stay round however the drawing is stretched."""
    return f'<path class="{look} dots" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)}"/>'


def _ticks(last: int) -> list[int]:
    """Readable steps from 0 on, at most TICKS."""
    for size in (power * factor for power in (10**k for k in range(16)) for factor in (1, 2, 5)):
        if last // size < TICKS:
            return [*range(0, last + 1, size)]
    return [0, last]
