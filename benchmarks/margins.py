"""Two runs of the same settings beside each other, such as a CPU's and a GPU's: how far their margins drift apart.

    python benchmarks/margins.py RUN RUN

The runs are output folders of `python -m dpo_fast.train`. Both train on the same pairs, timesteps and noise, so all
that separates them is rounding, which grows with the steps.
"""

import json
import math
import sys
from pathlib import Path


def compare(one: Path, other: Path) -> list[str]:
    """A line for each logged step that both runs have, and one with the largest difference."""
    runs = [_lines(folder) for folder in (one, other)]
    steps = sorted(runs[0].keys() & runs[1].keys())
    if not steps:
        raise SystemExit(f"{one} and {other} have no logged step in common")
    lines = [f"{'step':>6}{'loss':>12}{'':>12}{'margin':>12}{'':>12}{'margin rms':>12}{'difference / rms':>18}"]
    worst = 0.0
    for step in steps:
        a, b = runs[0][step], runs[1][step]
        rms = max(a["margin_rms"], b["margin_rms"])
        difference = abs(a["margin"] - b["margin"])
        share = difference / rms if rms else (0.0 if difference == 0 else math.inf)
        worst = max(worst, share)
        lines.append(
            f"{step:6}{a['loss']:12.6f}{b['loss']:12.6f}{a['margin']:12.6f}{b['margin']:12.6f}{rms:12.6f}{share:18.2e}"
        )
    return [*lines, f"the margins differ by at most {worst:.2e} of their rms, over {steps[-1]} steps"]


def _lines(folder: Path) -> dict[int, dict]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/margins.py RUN RUN")
    print("\n".join(compare(*map(Path, sys.argv[1:]))))
