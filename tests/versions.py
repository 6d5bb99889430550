"""Whether two versions of the code write the same files: `python -m tests.versions OTHER [CASE...]`.

OTHER is another checkout. Ten small runs (LoRA, the whole UNet, bf16, a cached reference, a stream, a resumed one, kto,
two processes, an evaluation, relabelled pairs) are made by this checkout and by the other one. Every file below their
folders must be the same: weights, checkpoints, metrics, caches, scores, images and pages, less times and memory.
Exit status 1 where one differs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from dpo_fast import shapes
from tests.faults.commands import contents, differences
from tests.helpers import pipelines
from tests.helpers.pairs import write_pickapic, write_table

ROOT = Path(__file__).parents[1]
SHAPES = Path(shapes.__file__).parent

TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2 -m "
TRAIN = (
    "dpo_fast.train --pretrained_model_name_or_path ../sdxl --dataset_name ../pairs.parquet --resolution 64"
    " --train_batch_size 2 --max_train_steps 4 --log_every 1 --dataloader_num_workers 0 --seed 0 --learning_rate 1e-3"
    " --checkpointing_steps 2 --latent_cache_dir cache --output_dir out"
)
WORLD = TRAIN.replace("../sdxl", "../world").replace("../pairs", "../scenes").replace("resolution 64", "resolution 16")
SAMPLED = " --run_validation --validation_steps 2 --validation_fraction 0.3 --sampling_steps 2"

# The command lines of each case, run one after another in a folder of its own beside the inputs.
CASES = {
    "lora": [WORLD + " --eval_scorers appeal --eval_prompts ../prompts.txt --eval_images 4" + SAMPLED],
    "full": [TRAIN.replace("sdxl", "sd15") + " --tuning full --use_ema --hflip"],
    "bf16": [TRAIN + " --mixed_precision bf16 --gradient_accumulation_steps 2 --gradient_checkpointing"],
    "cached reference": [TRAIN + " --cached_reference 2 --validation_fraction 0.3 --run_validation --sampling_steps 2"],
    "stream": [TRAIN + " --streaming"],
    "resumed": [TRAIN + SAMPLED, TRAIN.replace("steps 4", "steps 6") + SAMPLED + " --resume_from_checkpoint auto"],
    "kto": [TRAIN + " --objective kto --no-cache --proportion_empty_prompts 0.3 --time_ids real"],
    "two processes": [TORCHRUN + TRAIN.replace("batch_size 2", "batch_size 1")],
    "evaluation": [
        WORLD,
        "dpo_fast.generate --policy out --baseline base --prompts ../prompts.txt --seeds 2 --sampling_steps 2"
        " --output_dir images",
        "dpo_fast.evaluate --policy out --prompts ../prompts.txt --seeds 2 --sampling_steps 2 --scorers appeal"
        " faithfulness --dataset_name ../scenes.parquet --draws 2 --dataloader_num_workers 0 --output_dir evaluation",
    ],
    "relabelled": [
        "dpo_fast.relabel --dataset_name ../scenes.parquet --scorer appeal:1 --scorer faithfulness:0.5"
        " --temperature 0.5 --batch_size 2 --output labelled.parquet",
        WORLD.replace("../scenes", "labelled") + " --soft_labels",
    ],
}


def run(checkout: Path, inputs: Path, case: str) -> dict[str, bytes | str]:
    """The files that a case writes, run by a checkout's code."""
    folder = inputs / "run"  # the same name for both versions: some files name it
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for line in CASES[case]:
        done = subprocess.run(
            [sys.executable, "-m", *line.split()], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{checkout}: {case}: `{line}` ended with {done.returncode}:\n{done.stderr[-3000:]}")
        for path in folder.rglob("*"):  # times of change are in the names of some caches
            os.utime(path, (1e9, 1e9))
    found = contents(folder)
    shutil.rmtree(folder)
    return found


def write_scenes(inputs: Path) -> None:
    """The built-in pipeline, twelve of its pairs, and two captions that are held out."""
    (inputs / "world").symlink_to(SHAPES / "pipeline")
    table = pq.read_table(SHAPES / "pairs.parquet")
    rows = table.take(list(range(0, 12 * 120, 120))).to_pydict()
    rows["label_0"] = [float(label) for label in rows.pop("label_faithfulness")]
    del rows["label_appeal"]
    write_table(inputs / "scenes.parquet", rows)
    captions = (SHAPES / "held_out.txt").read_text().splitlines()
    (inputs / "prompts.txt").write_text("\n".join(captions[:2]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path, metavar="OTHER", help="a checkout of another version")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if not (arguments.other / "dpo_fast" / "train.py").is_file():
        parser.error(f"{arguments.other} is no checkout")
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place).resolve()
        pipelines.make_sdxl(inputs / "sdxl")
        pipelines.make_sd15(inputs / "sd15")
        write_pickapic(inputs / "pairs.parquet")
        write_scenes(inputs)
        for case in arguments.cases or CASES:
            other, this = (run(checkout.resolve(), inputs, case) for checkout in (arguments.other, ROOT))
            lines = differences(other, this)
            print(f"{case}: {len(other)} files, {len(lines)} differ", *lines, sep="\n    ", flush=True)
            wrong += bool(lines)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
