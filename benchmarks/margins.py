"""Two runs of the same settings beside each other, such as a CPU's and a GPU's: how far their margins drift apart.

    python benchmarks/margins.py RUN RUN [--json FILE]

The runs are output folders of `python -m dpo_fast.train`. Both train on the same pairs, timesteps and noise, so all
that separates them is rounding, which grows with the steps.
"""

import argparse
import json
import math
from pathlib import Path


def compare(one: Path, other: Path) -> list[dict[str, float]]:
    """Return a row for each step that both runs logged: losses, margins, their rms, and the difference relative to it.

    Raises SystemExit if the runs have no logged step in common.
    """
    runs = [_lines(folder) for folder in (one, other)]
    steps = sorted(runs[0].keys() & runs[1].keys())
    if not steps:
        raise SystemExit(f"{one} and {other} have no logged step in common")
    rows = []
    for step in steps:
        a, b = runs[0][step], runs[1][step]
        rms = max(a["margin_rms"], b["margin_rms"])
        difference = abs(a["margin"] - b["margin"])
        rows.append(
            {
                "step": step,
                "loss": [a["loss"], b["loss"]],
                "margin": [a["margin"], b["margin"]],
                "margin_rms": rms,
                "difference_over_rms": difference / rms if rms else (0.0 if difference == 0 else math.inf),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Format the rows for a terminal, with the largest difference."""
    lines = [f"{'step':>6}{'loss':>12}{'':>12}{'margin':>12}{'':>12}{'margin rms':>12}{'difference / rms':>18}"]
    for row in rows:
        (a, b), (m, n) = row["loss"], row["margin"]
        lines.append(
            f"{row['step']:6}{a:12.6f}{b:12.6f}{m:12.6f}{n:12.6f}{row['margin_rms']:12.6f}"
            f"{row['difference_over_rms']:18.2e}"
        )
    worst = max(row["difference_over_rms"] for row in rows)
    return "\n".join([*lines, f"the margins differ by at most {worst:.2e} of their rms, over {rows[-1]['step']} steps"])


def _lines(folder: Path) -> dict[int, dict]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = compare(*arguments.runs)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
