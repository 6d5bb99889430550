"""Sample images from the policy and from the base, and the picture that shows one above the other."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from dpo_fast.files import atomic_file
from dpo_fast.models.family import Family

MARGIN, CAPTION_LINES, FONT_SIZE = 8, 3, 14


@torch.no_grad()
def sample(family: Family, prompts: list[str], seed: int, resolution: int) -> list[Image.Image]:
    """One image a prompt with the family's usual steps and guidance; prompt k starts from the noise of seed + k.

    The pipeline's own UNet is used with the weights it holds now. Images are resolution x resolution RGB.
    """
    family.pipeline.set_progress_bar_config(disable=True)
    images = []
    for k, prompt in enumerate(prompts):
        latents = family.pipeline(
            prompt,
            num_inference_steps=family.sampling_steps,
            guidance_scale=family.sampling_guidance,
            height=resolution,
            width=resolution,
            generator=torch.Generator("cpu").manual_seed(seed + k),
            output_type="latent",  # decoded by the family: the VAE may be fp32 beside a half-precision UNet
        ).images
        pixels = family.decode_latents(latents)[0]
        images.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
    return images


def before_after(before: list[Image.Image], after: list[Image.Image], captions: list[str]) -> Image.Image:
    """A picture with one column a prompt: the base's image above the policy's, the caption under both."""
    cell = max(before[0].width, 160)
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
            sheet.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (x, y + label))
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
