"""Does training follow the scorer that labelled? The built-in pairs relabelled by each of two, and filtered by margin.

    python benchmarks/relabel.py [--seeds 1 2 3] [--keep_fractions 1 0.5 0.25] [--json FILE] [-- FLAGS]

Human labels play no part: `python -m dpo_fast.relabel` labels all pairs by one scorer and keeps the fraction with the
largest margins; each set is trained on with as many steps as the preset takes, and FLAGS. Runs that are finished in
--output_dir are not repeated. The win rates over the base, by both scorers, are pooled over seeds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the alignment benchmark runs the training

from benchmarks.alignment import PAIRS, finished, pooled
from dpo_fast.files import write_json

SCORERS = ("faithfulness", "appeal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--keep_fractions", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/relabel"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"{'labelled by':14}{'kept':>6}{'pairs':>7}{'margins from':>14}   " +
          "".join(f"{f'win rate by {name}':28}" for name in SCORERS) + "base -> policy")  # fmt: skip
    rows = []
    for scorer in SCORERS:
        for fraction in arguments.keep_fractions:
            labelled, report = relabelled(scorer, fraction, arguments.output_dir)
            summaries, folders = [], []
            for seed in arguments.seeds:
                flags = ["--dataset_name", str(labelled), "--label_column", "label_0", "--seed", str(seed)]
                flags += ["--eval_scorers", scorer, *(other for other in SCORERS if other != scorer), *more]
                folders.append(arguments.output_dir / f"{scorer}-{fraction:g}-{seed}")
                summary = finished(folders[-1], flags, jobs=1)
                summaries.append(summary)
                rows.append({"scorer": scorer, "seed": seed, "labels": report, "flags": more, **summary})
            print(line(scorer, fraction, report, summaries, folders), flush=True)
    if arguments.json:
        packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        command = "python benchmarks/relabel.py " + " ".join(sys.argv[1:])
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        write_json(arguments.json, {"command": command, "machine": machine, "versions": packages, "rows": rows})


def relabelled(scorer: str, fraction: float, root: Path) -> tuple[Path, dict]:
    """Label the built-in pairs by a scorer; return the file and the counts. Scores are shared by all fractions.

    Raises SystemExit if the command fails.
    """
    path = root / f"{scorer}-{fraction:g}.parquet"
    command = [
        sys.executable,
        "-m",
        "dpo_fast.relabel",
        "--dataset_name",
        PAIRS,
        "--label_column",
        "label_faithfulness",
    ]
    command += ["--scorer", scorer, "--keep_fraction", str(fraction), "--output", path, "--scores_dir", root / "scores"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{path} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def line(scorer: str, fraction: float, report: dict, summaries: list[dict], folders: list[Path]) -> str:
    """Format a row of the table: pooled win rates by every scorer, and the mean scores by the one that labelled."""
    rates = [pooled(folders, name) for name in SCORERS]
    means = [sum(s["scores"][scorer][which] for s in summaries) / len(summaries) for which in ("base", "policy")]
    return (
        f"{scorer:14}{fraction:6g}{report['kept']:7}{report['smallest_kept_margin']:14.4f}   "
        + "".join(f"{rate:28}" for rate in rates)
        + f"{means[0]:.4f} -> {means[1]:.4f}"
    )


if __name__ == "__main__":
    main()
