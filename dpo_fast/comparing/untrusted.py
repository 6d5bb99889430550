"""Values from files that anybody may have written: what is not of the kind that it should be counts as missing."""

import math
from pathlib import Path
from typing import Any

from dpo_fast.checksums import Damaged, read_signed_json
from dpo_fast.files import human_bytes
from dpo_fast.statistics import Interval

LARGEST = 64 << 20  # bytes of a JSON or YAML file: far more than any that is written here
REMEDY = "put it back from a copy, or make it again"
COUNT_LIMIT = 2**63
LARGEST_NUMBER = 1e30  # in size: sums and squares of such numbers are still finite


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of `write_signed_json`. Raises Damaged, and also for a file that is far too large."""
    check_size(path)
    return read_signed_json(path, REMEDY)


def check_size(path: Path) -> None:
    """Raise Damaged for a file larger than LARGEST."""
    try:
        size = path.stat().st_size
    except OSError:  # reading it will report the error
        return
    if size > LARGEST:
        raise Damaged(f"{path} has {human_bytes(size)}, more than any such file: {REMEDY}")


def number(value: object) -> float | None:
    """A finite number of a size that can be computed with, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and abs(value) <= LARGEST_NUMBER else None


def count(value: object) -> int | None:
    """A whole number, 0 or more, or None."""
    return value if type(value) is int and 0 <= value < COUNT_LIMIT else None


def words(value: object) -> list[str]:
    """The texts in a list."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def mapping(value: object) -> dict[str, Any]:
    """An object, or an empty one."""
    return value if isinstance(value, dict) else {}


def texts(value: object) -> dict[str, str]:
    """The texts in an object."""
    return {name: text for name, text in mapping(value).items() if isinstance(text, str)}


def interval(value: object, ends: object) -> Interval | None:
    """A value with the two ends of its interval, [low, high]; None where they are none."""
    middle = number(value)
    low, high = map(number, ends) if isinstance(ends, (list, tuple)) and len(ends) == 2 else (None, None)
    if middle is None or low is None or high is None or low > high:
        return None
    return Interval(middle, low, high)


def share(value: object, ends: object) -> Interval | None:
    """A share with the two ends of its interval, all in [0, 1]; None where they are none."""
    found = interval(value, ends)
    return (
        found
        if found is not None and found.low <= found.value <= found.high and 0 <= found.low and found.high <= 1
        else None
    )
