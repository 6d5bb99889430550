"""Is one person's own preference learned from that person's votes? The built-in world, two voters of opposite taste.

    python -m benchmarks.personal [--seed 0] [--output_dir DIR] [--json FILE]

The base draws every training caption several times; two simulated voters compare these images in a session of
`dpo_fast.vote`. One likes appealing images (vivid colours without speckles), the other dislikes them; both are noisy
and call small differences a tie. The votes of each are exported (`dpo_fast.vote export --voter`) and the base is
trained on them. Then both voters compare each policy with the base on captions that are in no pair: the policy that was
trained on a voter's votes should win by that voter's, and lose by the other's.

What is finished in DIR is not repeated.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.alignment import finished
from dpo_fast import shapes
from dpo_fast.files import write_json, write_text
from dpo_fast.generate import main as generate
from dpo_fast.shapes.pairs import split
from dpo_fast.shapes.score import appeal
from dpo_fast.statistics import Interval
from dpo_fast.vote import main as vote_command
from dpo_fast.votes.records import Vote
from dpo_fast.votes.store import VoteStore
from dpo_fast.votes.tally import rates_of
from dpo_fast.voting.folders import read_folders
from tests.helpers.voters import session, vote

QUESTION = {"appeal": "Which image looks better, whatever the text says?"}
VOTERS = {"vivid": 1.0, "plain": -1.0}  # what appeal is worth to each
SHARPNESS = 200.0  # logits for a difference in appeal of 1: half of all pairs differ by more than 0.012, or 2.3
TIE_BELOW = 0.5  # logits
SEEDS = ("0,1,2", "3,4,5")  # of the images compared with each other
FLAGS = "--no-prove --label_column label_0 --learning_rate 1e-5 --eval_scorers appeal faithfulness quality"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the voters' noise and of training")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/personal"))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    home, started = arguments.output_dir, time.perf_counter()
    home.mkdir(parents=True, exist_ok=True)
    folders = [images_of_the_base(home / f"images-{k}", seeds) for k, seeds in enumerate(SEEDS)]
    file = home / "votes.sqlite"
    number = voted(file, folders, arguments.seed)
    rows = []
    for name in VOTERS:
        pairs = home / f"{name}.parquet"
        if vote_command(["export", str(file), "--to", str(pairs), "--voter", name, "--overwrite"]):
            raise SystemExit("the export failed")
        run = home / f"run-{name}"
        summary = finished(run, ["--dataset_name", str(pairs), *FLAGS.split(), "--seed", str(arguments.seed)], jobs=1)
        voted(run / "votes.sqlite", [run], arguments.seed + 1)
        for judge, of in votes_by_voter(run / "votes.sqlite").items():
            rate = rates_of(of).votes
            rows.append({"trained_on": name, "judged_by": judge, "win_rate": rate.value, "ci95": [*rate[1:]],
                         "votes": len(of), "prompts": len({one.prompt for one in of}),
                         "ties": sum(one.outcome == 0.5 for one in of),
                         "appeal": [summary["scores"]["appeal"][side] for side in ("base", "policy")],
                         "ties_dropped": summary["ties_dropped"]})  # fmt: skip
    print(
        f"\n{'trained on':12}{'judged by':12}{'win rate over the base [95%]':32}votes  prompts  appeal, base and policy"
    )
    for row in rows:
        rate = Interval(row["win_rate"], *row["ci95"])
        before, after = row["appeal"]
        print(f"{row['trained_on']:12}{row['judged_by']:12}{rate!s:32}{row['votes']:5}{row['prompts']:9}"
              f"{before:10.4f} -> {after:.4f}")  # fmt: skip
    print(f"\n{number} votes to train on; {time.perf_counter() - started:.0f} s")
    if arguments.json:
        packages = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        command = "python -m benchmarks.personal " + " ".join(sys.argv[1:])
        about = {"command": command, "machine": machine, "versions": packages, "flags": FLAGS, "votes": number}
        write_json(arguments.json, {**about, "rows": rows})


def images_of_the_base(out: Path, seeds: str) -> Path:
    """Generate the base's images of all training captions, unless they are there."""
    prompts = out.parent / "captions.txt"
    write_text(prompts, "".join(f"{caption}\n" for caption in split()[0]))
    argv = ["--policy", Path(shapes.__file__).parent / "pipeline", "--prompts", prompts, "--seeds", seeds]
    argv += ["--sampling_steps", 10, "--sampling_guidance", 3, "--batch_size", 64, "--output_dir", out]
    if generate([str(word) for word in argv]):
        raise SystemExit("dpo_fast.generate failed")
    return out


def voted(file: Path, folders: list[Path], seed: int) -> int:
    """Let both voters vote on all comparisons of the folders, unless they have; return the number of votes."""
    if not file.exists():
        session(file, read_folders(folders).comparisons, votes=len(VOTERS), questions=QUESTION)
    vote(file, {name: taste(worth) for name, worth in VOTERS.items()}, tie_below=TIE_BELOW, seed=seed)
    with VoteStore.read(file) as store:
        return len(store.votes())


def taste(worth: float) -> Callable[[str, str, Path], float]:
    known: dict[Path, float] = {}

    def logits(question: str, prompt: str, file: Path) -> float:
        if file not in known:
            pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy())
            known[file] = appeal(pixels.permute(2, 0, 1)[None] / 255).item()
        return SHARPNESS * worth * known[file]

    return logits


def votes_by_voter(file: Path) -> dict[str, list[Vote]]:
    with VoteStore.read(file) as store:
        votes = store.votes()
    return {name: [one for one in votes if one.voter == name] for name in VOTERS}


if __name__ == "__main__":
    main()
