"""Preference pairs of the shapes world: `python -m dpo_fast.shapes.pairs`.

A pair is two generations of the base for one caption, with the preference of each scorer. A fifth of the captions are
held out: no pair has them, and `held_out.txt` lists them for the evaluation.
"""

import argparse
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from dpo_fast.errors import BadInput
from dpo_fast.files import atomic_file, write_text
from dpo_fast.models.untrusted import check_pipeline
from dpo_fast.quiet import no_loading_bars
from dpo_fast.shapes.pretrain import GUIDANCE, SAMPLING_STEPS
from dpo_fast.shapes.render import SCENES
from dpo_fast.shapes.score import appeal, faithfulness

HELD_OUT = 72  # captions
BATCH = 64  # images generated at once
PREFERENCES = {"faithfulness": faithfulness, "appeal": lambda images, captions: appeal(images)}
# Scores closer than this are a tie, which makes about half of the pairs ties: a label of equally good images is noise.
TIE = {"faithfulness": 0.05, "appeal": 0.01}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="python -m dpo_fast.shapes.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, default=here / "pipeline")
    parser.add_argument("--output_dir", type=Path, default=here)
    parser.add_argument("--pairs_per_caption", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        check_pipeline(arguments.pipeline, weights=True)
    except BadInput as error:
        parser.error(str(error))
    with no_loading_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.pipeline)
    train, held_out = split()
    captions = [caption for caption in train for _ in range(arguments.pairs_per_caption)]
    table = make_pairs(pipeline, captions, arguments.seed)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(arguments.output_dir / "pairs.parquet") as temporary:
        pq.write_table(table, temporary)
    write_text(arguments.output_dir / "held_out.txt", "".join(f"{caption}\n" for caption in held_out))
    ties = ", ".join(f"{table[f'label_{name}'].to_pylist().count(0.5)} by {name}" for name in PREFERENCES)
    print(f"{table.num_rows} pairs of {len(train)} captions, ties: {ties}; {len(held_out)} captions held out")


def split() -> tuple[list[str], list[str]]:
    """Return the captions to train on and those held out, always the same."""
    order = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = set(order[:HELD_OUT])
    captions = [scene.caption for scene in SCENES]
    return (
        [caption for row, caption in enumerate(captions) if row not in held_out],
        [caption for row, caption in enumerate(captions) if row in held_out],
    )


def make_pairs(pipeline: StableDiffusionPipeline, captions: list[str], seed: int) -> pa.Table:
    """Generate two images per caption and label them per scorer: 1 if the first is better, 0 the second, 0.5 a tie.

    The columns are jpg_0 and jpg_1 (PNG bytes), caption, label_faithfulness and label_appeal.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    twice = [caption for caption in captions for _ in (0, 1)]
    images = []
    for first in tqdm(range(0, len(twice), BATCH), desc="pairs", unit=f" x {BATCH} images"):
        images.append(
            pipeline(
                twice[first : first + BATCH],
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE,
                generator=generator,
                output_type="pt",
            ).images
        )
    pixels = (torch.cat(images) * 255).round().to(torch.uint8)
    columns = {
        "jpg_0": [_png(image) for image in pixels[0::2]],
        "jpg_1": [_png(image) for image in pixels[1::2]],
        "caption": captions,
    }
    for name, score in PREFERENCES.items():
        first, second = score(pixels / 255, twice).view(-1, 2).unbind(1)
        labels = torch.where((first - second).abs() < TIE[name], 0.5, (first > second).double())
        columns[f"label_{name}"] = labels.tolist()
    return pa.table(columns)


def _png(image: torch.Tensor) -> bytes:  # uint8 [3, H, W]
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
