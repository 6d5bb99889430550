"""How the numbers of an evaluation are written, alike in the terminal, on the page and in sentences."""

import math

from dpo_fast.statistics import Interval


def decimals(*values: float, digits: int = 4) -> int:
    """Return how many decimals (0 to 9) show the largest of the values to `digits` significant digits."""
    largest = max(map(abs, values))
    return min(max(digits - 1 - math.floor(math.log10(largest)), 0), 9) if largest > 0 else digits - 1


def difference(of: Interval) -> str:
    """Return a difference with its sign and interval."""
    places = decimals(*of, digits=3)
    return f"{of.value:+.{places}f} [{of.low:+.{places}f}, {of.high:+.{places}f}]"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Return the number with its noun: 1 prompt, 2 prompts."""
    return f"{number} {noun}" + ("" if number == 1 else ending)
