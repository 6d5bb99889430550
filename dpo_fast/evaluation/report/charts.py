"""Win rates as bars with intervals: inline SVG in HTML lists, with lengths in percent so that they fit any width."""

from collections.abc import Sequence
from html import escape
from typing import Protocol

from dpo_fast.statistics import Interval

EVEN = 0.5
MIDDLE = 15  # of a bar's height, pixels
AXIS = (
    (0.0, "0", "start"),
    (0.25, "0.25", "middle"),
    (0.5, "0.5", "middle"),
    (0.75, "0.75", "middle"),
    (1.0, "1", "end"),
)


class Shown(Protocol):
    """A share with its interval, centred on 0.5."""

    @property
    def interval(self) -> Interval: ...

    @property
    def decided(self) -> bool: ...  # whether the interval excludes 0.5


def bars(
    rows: Sequence[tuple[str, str, Shown]],  # name and the line beneath it, both plain text; the share
    measure: str = "win rate",  # what the share is, for screen readers
) -> str:
    """Return HTML with a bar from 0.5 to each share, overlaid with its interval."""
    items = "".join(_item(*row, measure) for row in rows)
    lines = "".join(f'<line x1="{x:.0%}" x2="{x:.0%}" y1="0" y2="5"/>' for x, _, _ in AXIS)
    texts = "".join(f'<text x="{x:.0%}" y="19" text-anchor="{anchor}">{text}</text>' for x, text, anchor in AXIS)
    axis = f'<li class="axis" aria-hidden="true"><svg height="24">{lines}{texts}</svg></li>'
    return f'<ul class="bars">{items}{axis}</ul>'


def legend(ahead: str = "policy ahead", behind: str = "base ahead") -> str:
    """Return HTML that says what the colours of `bars` mean; both are plain text without anything to escape."""
    return (
        f'<p class="legend"><span><i class="win"></i>{ahead}</span><span><i class="loss"></i>{behind}</span>'
        '<span><i class="open"></i>pale: the interval holds 0.5</span></p>'
    )


def _item(name: str, beneath: str, shown: Shown, measure: str) -> str:
    of = shown.interval
    left, width = min(of.value, EVEN), abs(of.value - EVEN)
    kind = ("win" if of.value > EVEN else "loss") + ("" if shown.decided else " open")
    spoken = f"{name}: {measure} {of.value:.3f}, 95% interval {of.low:.3f} to {of.high:.3f}"
    ends = "".join(
        f'<line class="whisker" x1="{x:.2%}" x2="{x:.2%}" y1="{MIDDLE - 5}" y2="{MIDDLE + 5}"/>' for x in of[1:]
    )
    return (
        f'<li><span class="name"><bdi>{escape(name)}</bdi><small>{escape(beneath)}</small></span>'
        f'<svg class="bar" height="{2 * MIDDLE}" role="img" aria-label="{escape(spoken)}">'
        f"<title>{escape(spoken)}</title>"
        f'<rect class="track" x="0" width="100%" y="{MIDDLE - 1}" height="2"/>'
        f'<rect class="{kind}" x="{left:.2%}" width="{width:.2%}" y="{MIDDLE - 8}" height="16"/>'
        f'<line class="even" x1="50%" x2="50%" y1="0" y2="{2 * MIDDLE}"/>'
        f'<line class="whisker" x1="{of.low:.2%}" x2="{of.high:.2%}" y1="{MIDDLE}" y2="{MIDDLE}"/>{ends}'
        f'<circle class="dot" cx="{of.value:.2%}" cy="{MIDDLE}" r="4.5"/></svg>'
        f'<span class="value"><b>{of.value:.3f}</b><small>{of.low:.3f}–{of.high:.3f}</small></span></li>'
    )
