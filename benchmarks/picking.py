"""Does `dpo_fast.pick` find the right point? Healthy and over-trained runs of the built-in world.

    python benchmarks/picking.py [--kinds healthy overtrained] [--seeds 1 2 3] [--output_dir DIR] [--json FILE]

Each run is trained and picked from by the plain commands. Then every point of its grid is measured on the prompts that
judge, with as many images as the pick's own judgement has: "best" is the largest gain there. The pick is right if its
gain lies within the interval of the best. Runs and images that are there already are not made again.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.alignment import finished
from dpo_fast import parallel
from dpo_fast.evaluation.generation import ImageRequest
from dpo_fast.evaluation.pick_options import parse
from dpo_fast.evaluation.picking import BASE, Point, plan, scores_of
from dpo_fast.evaluation.sides import seeds_in_training
from dpo_fast.files import write_json
from dpo_fast.pick import main as pick
from dpo_fast.statistics import Bootstrap

KINDS = {
    "healthy": "",
    "overtrained": "--learning_rate 3e-4 --beta_dpo 500",
}
TRAINING = "--no-prove --max_train_steps 80 --checkpointing_steps 20 --eval_images 72"
STRENGTHS = ("0.5", "0.75", "1", "1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=72, help="of each point in the last round")
    parser.add_argument("--judge_images", type=int, default=108, help="of each point to judge by")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/picking"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in arguments.kinds:
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{kind}-{seed}"
            finished(folder, [*TRAINING.split(), *KINDS[kind].split(), "--seed", str(seed)], jobs=1)
            rows.append({"kind": kind, "seed": seed, **measured(folder, arguments.images, arguments.judge_images)})
            print(line(rows[-1]), flush=True)
    print("\n" + "\n".join(map(line, rows)))
    if arguments.json:
        packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        about = {"command": "python benchmarks/picking.py " + " ".join(sys.argv[1:]), "versions": packages}
        write_json(arguments.json, {**about, "machine": platform.processor() or platform.machine(), "rows": rows})


def measured(folder: Path, images: int, judge_images: int) -> dict[str, object]:
    """Pick from a run, then measure all points of its grid on the prompts that judge."""
    flags = [str(folder), "--strengths", *STRENGTHS, "--images", str(images), "--judge_images", str(judge_images)]
    if pick(flags):
        raise SystemExit(f"dpo_fast.pick {' '.join(flags)} failed")
    found = json.loads((folder / "pick" / "pick.json").read_text(encoding="utf-8"))
    planned, ranks = plan(parse(flags)), parallel.start("none")
    asked, seeds, without_last = seeds_in_training(planned.judging, judge_images)
    prompts = [prompt for prompt in planned.judging if prompt.text in asked]
    points = {BASE: Point(planned.points[0].step, 0.0)} | {point.name: point for point in planned.points}
    models = {name: planned.source(point) for name, point in points.items()}
    request = ImageRequest(models, prompts, seeds, without_last, batch_size=planned.batch_size)
    texts, scores = scores_of(planned, request, folder / "whole-grid", planned.scorers[:1], ranks)
    ranks.close()
    of, over_prompts = scores[planned.scorers[0]], Bootstrap(texts)
    gains = {name: of[name] - of[BASE] for name in points if name != BASE}
    best = max(gains, key=lambda name: float(gains[name].mean()))
    picked, trained = Point(**found["pick"]).name, planned.result.name
    interval = over_prompts.mean(gains[best])
    shown = {name: over_prompts.mean(gains[name]) for name in dict.fromkeys((picked, best, trained))}
    return {
        "picked": {"point": picked, **shown[picked]._asdict()},
        "best": {"point": best, **interval._asdict()},
        "as_trained": {"point": trained, **shown[trained]._asdict()},
        "best_minus_picked": over_prompts.mean(gains[best] - gains[picked])._asdict(),
        "within": interval.low <= shown[picked].value <= interval.high,
        "images": found["images"],
        "points": {name: float(value.mean()) for name, value in gains.items()},
    }


def line(row: dict) -> str:
    def shown(name: str) -> str:
        one = row[name]
        return f"{one['point']} {one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"

    images = row["images"]
    return (
        f"{row['kind']:12}{row['seed']:>2}  picked {shown('picked')}  best {shown('best')}  as trained"
        f" {shown('as_trained')}  {'within' if row['within'] else 'OUTSIDE'}  {images['to_pick']} of"
        f" {images['of_the_whole_grid']} images"
    )


if __name__ == "__main__":
    main()
