"""The published protocol end to end on a tiny pipeline, with simulated voters: every part of it, and its table.

    python -m benchmarks.protocol [--prompts 40] [--voters 12] [--output_dir DIR]

Images are noise, and scorers have random weights: what is shown is that the protocol works, not that anything is
better. The voters prefer the policy's image by the logits of PREFERENCE, each differing by a little, and call small
differences a tie; the table should find the win rates that these give.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dpo_fast.evaluate import main as evaluate
from dpo_fast.evaluation.image_names import file_stem
from dpo_fast.evaluation.protocol_table import ProtocolTable, write_table
from dpo_fast.train import main as train
from dpo_fast.voting.folders import read_folders
from tests.helpers import pipelines, scorer_files
from tests.helpers.pairs import write_pickapic
from tests.helpers.voters import Taste, session, vote

PREFERENCE = {"general": 1.0, "appeal": 0.4, "alignment": 0.0}  # logits of one vote for the policy's image
SPREAD = 0.3  # of these, between voters
TIE_BELOW = 0.3  # logits
SUBJECTS = ("a fox", "a woman", "two men", "a tower", "a lake", "a red car", "a child", "an old map")
PLACES = ("in snow", "at night", "by the sea", "in a box", "on a hill")
CATEGORIES = {"a woman": "People", "two men": "People", "a child": "People", "a fox": "Animals"}
STYLES = ("anime", "concept-art", "paintings", "photo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40, help="of each set, at most 40")
    parser.add_argument("--voters", type=int, default=12)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/protocol"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    table = run(arguments.output_dir, arguments.prompts, arguments.voters)
    print(f"\n{table}\n\n{time.perf_counter() - started:.0f} s")


def run(home: Path, prompts: int, voters: int) -> ProtocolTable:
    """Train, evaluate, vote and make the table, in `home`; what is finished there is not repeated."""
    texts = [f"{subject} {place}" for place in PLACES for subject in SUBJECTS][:prompts]
    policy, sets = prepared(home, texts)
    argv = ["--protocol", "diffusion-dpo", "--policy", policy, "--prompts", *sets, "--scorer_models", home / "scorers"]
    argv += ["--closed", f"midjourney={home / 'midjourney'}", f"emu={home / 'emu'}", "--layout", home / "layouts"]
    argv += ["--sampling_steps", 2, "--resolution", 64, "--output_dir", home / "protocol"]
    if evaluate([str(word) for word in argv]):
        raise SystemExit("dpo_fast.evaluate failed")
    file = home / "protocol" / "votes.sqlite"
    if not file.exists():
        session(file, read_folders([home / "protocol"]).comparisons)
    draw = random.Random(0)
    vote(file, {f"voter {k + 1}": taste(policy.name, draw) for k in range(voters)}, tie_below=TIE_BELOW)
    return write_table(home / "protocol", again=True)


def taste(policy: str, draw: random.Random) -> Taste:
    """A voter who prefers the policy's images about as PREFERENCE says."""
    own = {question: mean + draw.gauss(0, SPREAD) for question, mean in PREFERENCE.items()}
    return lambda question, prompt, file: own[question] if file.parent.name == policy else 0.0


def prepared(home: Path, texts: Sequence[str]) -> tuple[Path, list[str]]:
    """A run, the scorers' files, copies of the prompt sets, and folders of others' images and of layouts.

    Returns the run and the prompt sets, as the flag takes them.
    """
    hps = [f"{text}, {style}" for text, style in zip(texts, STYLES * len(texts), strict=False)]
    policy = home / "dpo"
    if not (home / "layouts").exists():
        home.mkdir(parents=True, exist_ok=True)
        pipelines.make_sdxl(home / "sdxl")
        pairs = write_pickapic(home / "pairs.parquet", n=12, size=72)
        argv = ["--pretrained_model_name_or_path", home / "sdxl", "--dataset_name", pairs, "--output_dir", policy]
        argv += ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 4, "--learning_rate", 1e-2]
        if train([str(word) for word in (*argv, "--seed", 0, "--no-prove", "--overwrite")]):
            raise SystemExit("dpo_fast.train failed")
        scorer_files.write_all(home / "scorers")
        rows = [f"{text}\t{next((of for who, of in CATEGORIES.items() if who in text), 'Other')}" for text in texts]
        (home / "parti.tsv").write_text("Prompt\tCategory\n" + "".join(f"{row}\n" for row in rows))
        (home / "hps").mkdir(exist_ok=True)
        for k, style in enumerate(STYLES):
            (home / "hps" / f"{style}.json").write_text(json.dumps(hps[k::4]))
        images_for([*texts, *hps], home / "midjourney")
        images_for(texts[::2], home / "emu")
        images_for([f"a drawing of {text}" for text in texts], home / "layouts")
    return policy, [f"partiprompts={home / 'parti.tsv'}", f"hps={home / 'hps'}"]


def images_for(texts: Sequence[str], folder: Path) -> None:
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for text in texts:
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{file_stem(text)}.png")


if __name__ == "__main__":
    main()
