"""Render rows as a table, a JSON object and a picture."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont

from benchmarks.step.profiling import CLASSES, Profile
from benchmarks.step.proof import Proof


@dataclass
class Row:
    """A provider's measurements."""

    provider: str
    pairs: int  # per step
    seconds: list[float]  # of each timed step
    waited: list[float]  # the part of each spent waiting for data
    flops: float  # executed per pair
    peak_memory: int  # bytes
    proof: Proof
    profile: Profile
    opening: float  # seconds to open
    warm_up: float  # seconds of the first six steps, compilation included
    problems: list[str]  # found by the proof

    @property
    def ms(self) -> tuple[float, float, float]:
        """Milliseconds per pair: median, least, most."""
        each = [1e3 * s / self.pairs for s in self.seconds]
        return median(each), min(each), max(each)

    @property
    def pairs_per_second(self) -> float:
        return 1e3 / self.ms[0]

    @property
    def tflops(self) -> float:
        """TFLOP/s at the median time."""
        return self.flops / self.ms[0] / 1e9

    @property
    def data_wait(self) -> float:
        """The fraction of the time spent waiting for data."""
        return sum(self.waited) / sum(self.seconds)


@dataclass
class Result:
    """The measurements of one case."""

    case: str
    machine: str
    versions: dict[str, str]
    command: str
    dtype: str
    batch_size: int
    ceiling: float  # TFLOP/s
    needed_flops: float  # per pair: policy forward and backward, reference forward
    truth: dict[str, Proof]  # by optimizer
    rows: list[Row]
    unmeasured: list[str] = field(default_factory=list)  # providers still to come

    @property
    def floor_ms(self) -> float:
        """Milliseconds per pair if the needed FLOPs ran at the ceiling."""
        return self.needed_flops / self.ceiling / 1e9


def ratio(one: Row, other: Row) -> float:
    """Return how many times as fast `one` is as `other`."""
    return other.ms[0] / one.ms[0]


def table(result: Result) -> str:
    """Format a result for a terminal."""
    lines = [
        f"{result.case}, {result.dtype}, {result.rows[0].pairs} pairs a step ({result.batch_size} a forward pass)",
        f"{result.machine}; " + ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        f"matmul ceiling {_flops(1e12 * result.ceiling)}/s; needed {_flops(result.needed_flops)} a pair:"
        f" floor {result.floor_ms:.3g} ms a pair",
        "",
        f"{'':16}{'ms a pair':>10}{'min':>9}{'max':>9}{'pairs/s':>9}{'GFLOP':>10}{'TFLOP/s':>9}{'of ceil.':>9}"
        f"{'data wait':>10}{'syncs':>7}{'launches':>9}{'peak GiB':>9}",
    ]
    for row in result.rows:
        mid, least, most = row.ms
        lines.append(
            f"{row.provider:16}{mid:10.1f}{least:9.1f}{most:9.1f}{row.pairs_per_second:9.3g}{row.flops / 1e9:10.4g}"
            f"{row.tflops:9.3g}{row.tflops / result.ceiling:9.2f}{row.data_wait:10.1%}{row.profile.host_syncs:7}"
            f"{row.profile.launches:9}{row.peak_memory / 2**30:9.2f}"
        )
    lines += ["", f"{'times as fast as':16}" + "".join(f"{row.provider:>17}" for row in result.rows)]
    for row in result.rows:
        lines.append(f"{row.provider:16}" + "".join(f"{ratio(row, other):17.2f}" for other in result.rows))
    lines += ["", f"{'equal work':16}{'policy MSE':>12}{'ref. MSE':>12}{'grad norm':>12}{'loss, step 6':>14}  |margin|"]
    for name, proof in result.truth.items():
        lines.append(_proof_line(f"fp32, {name}", proof, ""))
    for row in result.rows:
        lines.append(_proof_line(row.provider, row.proof, "  DIFFERS" if row.problems else "  equal"))
    for row in result.rows:
        lines += [f"{row.provider} did other work: {problem}" for problem in row.problems]
    return "\n".join(lines)


def _proof_line(name: str, proof: Proof, verdict: str) -> str:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    sizes = sorted(abs(margin) for margin in proof.margin)
    return (
        f"{name:16}{mean(proof.policy_error):12.6f}{mean(proof.ref_error):12.6f}{proof.grad_norm:12.5g}"
        f"{proof.loss:14.6f}  {sizes[0]:.3g} to {sizes[-1]:.3g}{verdict}"
    )


def profile_table(result: Result) -> str:
    """Format the milliseconds per pair by class, and the operators that take most time."""
    lines = [f"{'ms a pair':16}" + "".join(f"{name:>13}" for name in CLASSES)]
    for row in result.rows:
        each = (1e3 * row.profile.classes[name] / row.pairs for name in CLASSES)
        lines.append(f"{row.provider:16}" + "".join(f"{ms:13.1f}" for ms in each))
    for row in result.rows:
        lines += ["", f"{row.provider}: most time in"]
        for name, kind, seconds, calls in row.profile.top:
            lines.append(f"  {1e3 * seconds / row.pairs:9.2f} ms a pair {calls:6} x {kind:12} {name[:90]}")
    return "\n".join(lines)


def as_json(result: Result) -> dict:
    """Return everything that was measured and what follows from it, as plain values."""
    value = asdict(result)
    value["floor_ms"] = result.floor_ms
    value["truth"] = {name: asdict(proof) | {"loss": proof.loss} for name, proof in result.truth.items()}
    for row, plain in zip(result.rows, value["rows"], strict=True):
        plain["ms_a_pair"] = dict(zip(("median", "min", "max"), row.ms, strict=True))
        plain["pairs_per_second"] = row.pairs_per_second
        plain["tflops_per_second"] = row.tflops
        plain["of_ceiling"] = row.tflops / result.ceiling
        plain["data_wait"] = row.data_wait
        plain["times_as_fast_as"] = {other.provider: ratio(row, other) for other in result.rows}
        plain["proof"]["loss"] = row.proof.loss
    return _finite(value)


def _finite(value: object) -> object:
    """Return `value` with None for non-finite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(results: list[Result], path: Path) -> None:
    """Write the pictures of the cases, one below the other, to a PNG."""
    pictures = [picture(result) for result in results]
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for part in pictures:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.save(path, "PNG")


def picture(result: Result) -> Image.Image:
    """Draw bars of milliseconds per pair with their spread, and the floor as a line."""
    width, left, bar, gap, top = 1000, 190, 44, 26, 90
    height = top + len(result.rows) * (bar + gap) + 60
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    small = ImageFont.load_default(14)
    longest = max(row.ms[2] for row in result.rows)
    scale = (width - left - 120) / longest
    draw.text((20, 16), f"{result.case}, {result.dtype}: ms a pair (median; whisker: least to most)", "black", font)
    draw.text((20, 44), result.machine, "#555555", small)
    for index, row in enumerate(result.rows):
        y = top + index * (bar + gap)
        mid, least, most = row.ms
        colour = "#2a6fbb" if row.provider.startswith("ours") else "#b0b7bf"
        draw.text((20, y + 10), row.provider, "black", font)
        draw.rectangle((left, y, left + mid * scale, y + bar), colour)
        draw.line((left + least * scale, y + bar // 2, left + most * scale, y + bar // 2), "black", 2)
        draw.text((left + most * scale + 10, y + 11), f"{mid:.4g}", "black", font)
    x, bottom = left + result.floor_ms * scale, top + len(result.rows) * (bar + gap)
    draw.line((x, top - 12, x, bottom), "#c0392b", 3)
    text = f"floor {result.floor_ms:.4g} ms: the needed FLOPs at the matmul ceiling, {_flops(1e12 * result.ceiling)}/s"
    draw.text((left, bottom + 14), text, "#c0392b", small)
    return image


def _flops(count: float) -> str:
    return f"{count / 1e12:.4g} TFLOP" if count >= 1e12 else f"{count / 1e9:.4g} GFLOP"
