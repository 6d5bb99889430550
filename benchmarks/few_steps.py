"""Does training on a few-step grid align a model that is sampled in few steps? The built-in world, against its base.

    python benchmarks/few_steps.py [--seeds 1 2 3] [--output_dir DIR] [--json FILE]

The built-in pipeline is trained on three of the four timesteps of the grid of `--is_turbo` (249, 499, 749) and sampled
without guidance: four steps take the timesteps 751, 501, 251 and 1. It has not been distilled. The fourth timestep of
the grid, 999, is left out: there is next to no signal there, so both images of a pair are the same noise.
Every evaluation is `python -m dpo_fast.evaluate`.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.alignment import finished, pooled
from dpo_fast.evaluate import main as evaluate
from dpo_fast.files import write_json

STEPS = (4, 2, 1)
FLAGS = "--no-prove --is_turbo --zero_terminal_snr off --max_timestep 999 --sampling_steps 4 --sampling_guidance 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/few_steps"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed-{seed}"
        finished(folder, [*FLAGS.split(), "--seed", str(seed)], jobs=1)
        for steps in STEPS:
            out = folder / f"in-{steps}-steps"
            argv = ["--policy", str(folder), "--sampling_steps", str(steps), "--sampling_guidance", "0"]
            if evaluate([*argv, "--output_dir", str(out)]):
                raise SystemExit(f"dpo_fast.evaluate {' '.join(argv)} failed")
            rows.append({"seed": seed, "steps": steps, "folder": out})
    print(f"\n{'steps':>5}  {'seed':>4}  {'win rate [95%]':22}  quality, base and policy  right, base and policy")
    results = []
    for steps in STEPS:
        for row in (row for row in rows if row["steps"] == steps):
            summary = json.loads((row["folder"] / "summary.json").read_text(encoding="utf-8"))
            results.append({"seed": row["seed"], "steps": steps, "scores": summary["scores"]})
            print(f"{steps:>5}  {row['seed']:>4}  {shown(summary['scores'])}")
        print(f"{steps:>5}   all  {pooled([row['folder'] for row in rows if row['steps'] == steps])}\n")
    if arguments.json:
        packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        about = {"command": "python benchmarks/few_steps.py " + " ".join(sys.argv[1:]), "versions": packages}
        write_json(arguments.json, {**about, "machine": platform.processor() or platform.machine(), "rows": results})


def shown(scores: dict) -> str:
    first, right = scores["quality"], scores["right"]
    rate = first["win_rate"]
    return (
        f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]  {first['base']:10.4f} -> {first['policy']:.4f}"
        f"  {right['base']:10.3f} -> {right['policy']:.3f}"
    )


if __name__ == "__main__":
    main()
