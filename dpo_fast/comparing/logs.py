"""The metrics of a run over its steps, read from its logs and made thin enough to be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dpo_fast.comparing.untrusted import number
from dpo_fast.files import parse_json, regular_file

LONGEST_LINE = 1 << 20  # bytes: far more than any line of a log
END = 1 << 16  # bytes that hold the last line of a log


class Point(NamedTuple):
    step: int
    value: float


Curve = list[Point]  # by rising steps


@dataclass(frozen=True)
class Log:
    """The lines of a log."""

    curves: dict[str, Curve]  # metric -> its values, where it has any
    last: dict[str, object] = field(default_factory=dict)  # the last line
    unusable: int = 0  # lines that are no object with a later step than the line before

    @property
    def step(self) -> int | None:
        """The last step, None where there is no line."""
        step = self.last.get("step")
        return step if isinstance(step, int) else None


def read_log(path: Path, metrics: Sequence[str]) -> Log:
    """Read some metrics from a log, line by line; a line that a running process has not finished is left out.

    Raises OSError, and BadInput for anything but a regular file.
    """
    curves: dict[str, Curve] = {name: [] for name in metrics}
    last: dict[str, object] = {}
    before, unusable = 0, 0
    with regular_file(path).open("rb") as file:
        while data := file.readline(LONGEST_LINE):
            if not data.endswith(b"\n"):
                unusable += len(data) == LONGEST_LINE
                continue
            line = _object(data)
            step = line.get("step")
            if type(step) is not int or not before < step < 2**53:
                unusable += 1
                continue
            before, last = step, line
            for name in metrics:
                if (value := number(line.get(name))) is not None:
                    curves[name].append(Point(step, value))
    return Log({name: curve for name, curve in curves.items() if curve}, last, unusable)


def last_step(path: Path) -> int | None:
    """The step of a log's last whole line; None where there is none, or it cannot be read."""
    try:
        with regular_file(path).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - END))
            lines = file.read().split(b"\n")[:-1]
    except (OSError, ValueError):
        return None
    step = _object(lines[-1]).get("step") if lines else None
    return step if type(step) is int else None


def _object(data: bytes) -> dict[str, object]:
    try:
        line = parse_json(data)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def thinned(curve: Curve, parts: int) -> Curve:
    """At most 4 x `parts` points of a curve that look the same when drawn.

    The steps are cut into `parts` equal parts; of each the first, the lowest, the highest and the last point are kept.
    """
    if len(curve) <= 4 * parts:
        return curve
    kept: Curve = []
    for part in _parts(curve, parts):
        kept += sorted({part[0], min(part, key=_value), max(part, key=_value), part[-1]})
    return kept


def averaged(curve: Curve, parts: int) -> Curve:
    """The means over `parts` equal parts of the steps, each at the mean of its steps."""
    points = []
    for part in _parts(curve, parts):
        size = len(part)
        points.append(Point(round(sum(p.step for p in part) / size), sum(p.value for p in part) / size))
    return points


def _value(point: Point) -> float:
    return point.value


def _parts(curve: Curve, parts: int) -> list[Curve]:
    """The points by equal parts of the steps, without the parts that hold none."""
    first, span = curve[0].step, curve[-1].step - curve[0].step + 1
    found: dict[int, Curve] = {}
    for point in curve:
        found.setdefault((point.step - first) * parts // span, []).append(point)
    return list(found.values())
