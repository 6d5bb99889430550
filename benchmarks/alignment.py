"""Does training align? The built-in world trained in every way, each run the plain command, by win rate over its base.

    python benchmarks/alignment.py [--variants default swapped ...] [--seeds 1 2 3] [--output_dir DIR] [--json FILE]

Every run is `python -m dpo_fast.train` with the flags of its variant and what follows `--` on this command line. Runs
that are finished in DIR are not repeated. All are compared with the base on the same prompts and the same noise; the
line `all` is over the images of all seeds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpo_fast.evaluation.scored import COLUMNS
from dpo_fast.files import write_json
from dpo_fast.presets import PRESETS
from dpo_fast.statistics import win_rate

PAIRS = Path(str(PRESETS["shapes"]["dataset_name"]))
VARIANTS = {
    "default": "",
    "swapped": "--image_columns jpg_1 jpg_0",  # labels follow the columns' order, so the loser wins
    "random": "--dataset_name {random} --label_column label_random",
    "sft": "--objective sft",
    "ipo": "--objective ipo",
    "kto": "--objective kto",
    "hinge": "--objective hinge",
    "lora": "--tuning lora --rank 8 --learning_rate 5e-4",
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
    "appeal": "--preference appeal",
    **{f"cached{k}": f"--cached_reference {k}" for k in (1, 2, 4, 8)},  # draws per pair; the default runs online
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the threads")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    runs = [(variant, seed) for variant in arguments.variants for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda run: train(*run, arguments.output_dir, more, arguments.jobs), runs))
    print(f"\n{'variant':10}{'seed':>5}  {'win rate [95%]':24}{'base':>7}{'policy':>8}{'right':>16}{'appeal':>16}"
          f"{'diversity':>16}{'accuracy':>9}{'wall s':>8}")  # fmt: skip
    rows = []
    for variant in arguments.variants:
        mine = [(seed, summary) for (name, seed), summary in zip(runs, done, strict=True) if name == variant]
        for seed, summary in mine:
            print(line(variant, str(seed), summary))
            rows.append({"variant": variant, "seed": seed, "flags": VARIANTS[variant], **summary})
        folders = [arguments.output_dir / f"{variant}-{seed}" for seed, _ in mine]
        print(f"{variant:10} all  {pooled(folders)}\n")
    if arguments.json:
        packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        command = "python benchmarks/alignment.py " + " ".join(sys.argv[1:])
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        write_json(arguments.json, {"command": command, "machine": machine, "versions": packages, "rows": rows})


def train(variant: str, seed: int, root: Path, more: list[str], jobs: int) -> dict[str, object]:
    """Run one variant, unless it is finished; return its summary.json with the command's wall time in seconds."""
    flags = VARIANTS[variant].format(random=random_labels(root, seed)).split()
    return finished(root / f"{variant}-{seed}", [*more, *flags, "--seed", str(seed)], jobs)


def finished(folder: Path, flags: list[str], jobs: int) -> dict[str, object]:
    """Run the built-in world in `folder`, unless it is finished; return its summary.json with the wall time in seconds.

    Raises SystemExit if the command fails.
    """
    if not (folder / "wall.json").exists():
        command = [sys.executable, "-m", "dpo_fast.train", "--preset", "shapes", *flags, "--output_dir", folder]
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
        started = time.perf_counter()
        ran = subprocess.run([*map(str, command), "--overwrite"], env=os.environ | threads, capture_output=True)
        if ran.returncode:
            raise SystemExit(f"{folder} ended with {ran.returncode}:\n{ran.stderr.decode()[-2000:]}")
        write_json(folder / "wall.json", {"wall_seconds": time.perf_counter() - started})
        print(f"{folder.name}: done in {time.perf_counter() - started:.0f} s", flush=True)
    files = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("summary.json", "wall.json"))
    return next(files) | next(files)


def random_labels(root: Path, seed: int) -> Path:
    """Return the path of the built-in pairs with coin-flip labels in column label_random."""
    path = root / f"random-{seed}.parquet"
    if not path.exists():
        table = pq.read_table(PAIRS)
        coins = torch.rand(table.num_rows, generator=torch.Generator().manual_seed(seed)) < 0.5
        pq.write_table(table.append_column("label_random", pa.array(coins.double().tolist())), path)
    return path


def line(variant: str, seed: str, summary: dict) -> str:
    low, high = summary["win_rate_ci95"]
    scores = summary["scores"]
    accuracy = summary["implicit_accuracy"]
    two = [f"{scores[name]['base']:.3f} -> {scores[name]['policy']:.3f}" for name in ("right", "appeal")]
    diverse = f"{summary['diversity_base']:.3f} -> {summary['diversity_policy']:.3f}"
    return (
        f"{variant:10}{seed:>5}  {summary['win_rate']:.3f} [{low:.3f}, {high:.3f}]    {summary['score_base']:7.4f}"
        f"{summary['score_policy']:8.4f}{two[0]:>16}{two[1]:>16}{diverse:>16}"
        f"{'none' if accuracy is None else f'{accuracy:.3f}':>9}{summary['wall_seconds']:8.0f}"
    )


def pooled(folders: list[Path], scorer: str | None = None) -> str:
    """Format the win rate over the images of all runs, with its interval over prompts, which all runs share.

    scorer: None: the first.
    """
    tables = [pq.read_table(folder / "scores.parquet").to_pydict() for folder in folders]
    if any((table["prompt"], table["seed"]) != (tables[0]["prompt"], tables[0]["seed"]) for table in tables):
        raise SystemExit(f"{', '.join(map(str, folders))} were compared on different noise: delete the older ones")
    scorer = scorer or list(tables[0])[len(COLUMNS)]
    prompts, base, policy = [], [], []
    for table in tables:
        number = len(table["prompt"]) // 2  # the base's rows come first
        prompts += table["prompt"][:number]
        base += table[scorer][:number]
        policy += table[scorer][number:]
    return str(win_rate(torch.tensor(base, dtype=torch.float64), torch.tensor(policy, dtype=torch.float64), prompts))


if __name__ == "__main__":
    main()
