"""Sample images from the policy and from the base, and the picture that shows one above the other."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from dpo_fast.files import atomic_file
from dpo_fast.models.family import Family

MARGIN, CAPTION_LINES, FONT_SIZE = 8, 3, 14


@torch.no_grad()
def sample(
    family: Family,
    prompts: list[str],
    seeds: list[int],  # one a prompt: of its initial noise
    *,
    resolution: int,
    steps: int | None = None,  # None: the family's usual
    guidance: float | None = None,  # guidance_scale of the pipeline; None: the family's usual
    batch_size: int = 1,
    describe: str | None = None,  # title of a progress bar; None: no bar
) -> torch.Tensor:
    """One image a prompt: uint8 [N, 3, resolution, resolution] on the CPU.

    The pipeline's own UNet is used with the weights it holds now. An image depends on its prompt and seed alone, up to
    the rounding of another batch size.
    """
    family.pipeline.set_progress_bar_config(disable=True)
    images = []
    bar = tqdm(total=len(prompts), desc=describe, unit=" images", disable=describe is None)
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        latents = family.pipeline(
            prompts[rows],
            num_inference_steps=steps or family.sampling_steps,
            guidance_scale=family.sampling_guidance if guidance is None else guidance,
            height=resolution,
            width=resolution,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]],
            output_type="latent",  # decoded by the family: the VAE may be fp32 beside a half-precision UNet
        ).images
        images.append(family.decode_latents(latents).cpu())
        bar.update(len(latents))
    bar.close()
    return torch.cat(images)


def to_picture(pixels: torch.Tensor) -> Image.Image:  # uint8 [3, H, W]
    """The image as Pillow has it."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def before_after(before: list[Image.Image], after: list[Image.Image], captions: list[str]) -> Image.Image:
    """A picture with one column a prompt: the base's image above the policy's, the caption under both."""
    cell = max(before[0].width, 160)
    # A tiny image stays what it is, squares of one colour; blurred, it would look like a bad photograph.
    enlarge = Image.Resampling.NEAREST if before[0].width < cell / 2 else Image.Resampling.LANCZOS
    font = ImageFont.load_default(FONT_SIZE)
    label = FONT_SIZE + 6
    height = 2 * (cell + label) + CAPTION_LINES * (FONT_SIZE + 4) + 4 * MARGIN
    sheet = Image.new("RGB", (MARGIN + len(captions) * (cell + MARGIN), height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = MARGIN + column * (cell + MARGIN)
        for row, (title, image) in enumerate((("before", before[column]), ("after", after[column]))):
            y = MARGIN + row * (cell + label + MARGIN)
            draw.text((x, y), title, fill="gray", font=font)
            sheet.paste(image.resize((cell, cell), enlarge), (x, y + label))
        width = int(cell / (FONT_SIZE * 0.55))  # in characters
        lines = textwrap.wrap(caption, width, max_lines=CAPTION_LINES, placeholder=" ...")
        panel = Image.new("RGB", (cell, CAPTION_LINES * (FONT_SIZE + 4)), "white")  # wide letters end at its edge
        ImageDraw.Draw(panel).multiline_text((0, 0), "\n".join(lines), fill="black", font=font)
        sheet.paste(panel, (x, 2 * (cell + label) + 3 * MARGIN))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
