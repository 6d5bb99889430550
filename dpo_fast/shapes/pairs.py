"""Preference pairs of the shapes world: `python -m dpo_fast.shapes.pairs`.

The base generates some images of every caption. The best of them by quality is paired with the worst, the second best
with the second worst, and so on: two images of a pair then differ in what the labels are about. Each pair has the
preference of each scorer. A fifth of the captions are held out: no pair has them, and `held_out.txt` lists them for the
evaluation.
"""

import argparse
import io
from collections.abc import Callable, Sequence
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
from dpo_fast.shapes.score import appeal, faithfulness, quality

HELD_OUT = 72  # captions
BATCH = 64  # images generated or scored at once
Score = Callable[[torch.Tensor, list[str]], torch.Tensor]
PREFERENCES: dict[str, Score] = {
    "quality": quality,
    "faithfulness": faithfulness,
    "appeal": lambda images, captions: appeal(images),
}
TIE = {
    "quality": 0.0,
    "faithfulness": 0.05,
    "appeal": 0.01,
}  # scores closer than this are a tie: a label would be noise


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="python -m dpo_fast.shapes.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, default=here / "pipeline")
    parser.add_argument("--output_dir", type=Path, default=here)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102])
    parser.add_argument("--images_per_seed", type=int, default=16, help="images of every caption from each seed")
    parser.add_argument("--pairs_per_caption", type=int, default=8, help="at most half of its images")
    arguments = parser.parse_args()
    most = len(arguments.seeds) * arguments.images_per_seed // 2
    if not 0 < arguments.pairs_per_caption <= most:
        parser.error(f"--pairs_per_caption ({arguments.pairs_per_caption}) must be 1 to {most}, half of the images")
    try:
        check_pipeline(arguments.pipeline, weights=True)
    except BadInput as error:
        parser.error(str(error))
    with no_loading_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.pipeline)
    train, held_out = split()
    table = make_pairs(pipeline, train, arguments.seeds, arguments.images_per_seed, arguments.pairs_per_caption)
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


def make_pairs(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    seeds: Sequence[int],
    images: int,  # of each caption from each seed
    pairs: int,  # of each caption
) -> pa.Table:
    """Generate images and pair them up (`paired`)."""
    pipeline.set_progress_bar_config(disable=True)
    each = [caption for caption in captions for _ in range(images)]
    made = []
    with tqdm(total=len(seeds) * len(each), desc="pairs", unit=" images") as bar:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for first in range(0, len(each), BATCH):
                made.append(
                    pipeline(
                        each[first : first + BATCH],
                        num_inference_steps=SAMPLING_STEPS,
                        guidance_scale=GUIDANCE,
                        generator=generator,
                        output_type="pt",
                    ).images
                )
                bar.update(len(made[-1]))
    pixels = (torch.cat(made) * 255).round().to(torch.uint8).unflatten(0, (len(seeds), len(captions), images))
    return paired(pixels.transpose(0, 1).flatten(1, 2), captions, pairs)


def paired(pixels: torch.Tensor, captions: list[str], pairs: int) -> pa.Table:  # uint8 [captions, images, 3, H, W]
    """Pair the best images of each caption with the worst, and label them per scorer: 1 if the first is better, 0 the
    second, 0.5 a tie. Which of the two is the first is drawn.

    The columns are jpg_0 and jpg_1 (PNG bytes), caption, and label_<scorer> for each of PREFERENCES.
    """
    number, images = pixels.shape[:2]
    pixels, each = pixels.flatten(0, 1), [caption for caption in captions for _ in range(images)]
    order = _scores(quality, pixels, each).view(number, images).argsort(dim=1, descending=True, stable=True)
    order = order + torch.arange(0, len(each), images)[:, None]
    best, worst = order[:, :pairs].flatten(), order.flip(1)[:, :pairs].flatten()
    swapped = torch.rand(len(best), generator=torch.Generator().manual_seed(0)) < 0.5
    first, second = torch.where(swapped, worst, best), torch.where(swapped, best, worst)
    named = [caption for caption in captions for _ in range(pairs)]
    columns = {
        "jpg_0": [_png(image) for image in pixels[first]],
        "jpg_1": [_png(image) for image in pixels[second]],
        "caption": named,
    }
    for name, score in PREFERENCES.items():
        one, other = (_scores(score, pixels[rows], named) for rows in (first, second))
        labels = torch.where((one - other).abs() < TIE[name], 0.5, (one > other).double())
        columns[f"label_{name}"] = labels.tolist()
    return pa.table(columns)


def _scores(score: Score, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Score uint8 images, a batch at a time: all at once would take gigabytes."""
    batches = range(0, len(captions), BATCH)
    return torch.cat([score(pixels[k : k + BATCH] / 255, captions[k : k + BATCH]) for k in batches])


def _png(image: torch.Tensor) -> bytes:  # uint8 [3, H, W]
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
