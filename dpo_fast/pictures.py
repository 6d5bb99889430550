"""Sheets of images with their captions, and PNG files that carry a checksum and descriptive texts."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dpo_fast.checksums import signed_png
from dpo_fast.errors import printable
from dpo_fast.files import atomic_file

MARGIN, CAPTION_LINES, FONT_SIZE = 8, 3, 14


def to_picture(pixels: torch.Tensor) -> Image.Image:  # uint8 [3, H, W]
    """Convert pixels to a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def before_after(before: list[Image.Image], after: list[Image.Image], captions: list[str]) -> Image.Image:
    """Draw one column per prompt: the base's image above the policy's, the caption under both."""
    return picture_grid({"before": before, "after": after}, captions)


def picture_grid(
    rows: Mapping[str, Sequence[Image.Image]],  # title -> one image per caption, all of one size
    captions: Sequence[str],
    largest: int | None = None,  # side of a cell in pixels, at most; None: the images' width
) -> Image.Image:
    """Draw one column per caption, with the caption under the images of all rows. Cells are at least 160 pixels."""
    width = next(iter(rows.values()))[0].width
    cell = max(min(width, largest or width), 160)
    # Keep the pixels of a tiny image visible as squares; blurred, it would look like a bad photograph.
    enlarge = Image.Resampling.NEAREST if width < cell / 2 else Image.Resampling.LANCZOS
    font = ImageFont.load_default(FONT_SIZE)
    label = FONT_SIZE + 6
    bottom = len(rows) * (cell + label) + (len(rows) + 1) * MARGIN
    height = bottom + CAPTION_LINES * (FONT_SIZE + 4) + MARGIN
    sheet = Image.new("RGB", (MARGIN + len(captions) * (cell + MARGIN), height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = MARGIN + column * (cell + MARGIN)
        for row, (title, images) in enumerate(rows.items()):
            y = MARGIN + row * (cell + label + MARGIN)
            draw.text((x, y), printable(title), fill="gray", font=font)
            sheet.paste(images[column].resize((cell, cell), enlarge), (x, y + label))
        width = int(cell / (FONT_SIZE * 0.55))  # in characters
        lines = textwrap.wrap(printable(caption, keep="\t\n"), width, max_lines=CAPTION_LINES, placeholder=" ...")
        panel = Image.new("RGB", (cell, CAPTION_LINES * (FONT_SIZE + 4)), "white")  # clips wide letters at its edge
        ImageDraw.Draw(panel).multiline_text((0, 0), "\n".join(lines), fill="black", font=font)
        sheet.paste(panel, (x, bottom))
    return sheet


def save_png(image: Image.Image, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with its checksum and the texts `about` it, if any (`Image.open(path).text`)."""
    texts = PngInfo()
    for name, text in (about or {}).items():
        texts.add_text(name, text)
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=texts)
    with atomic_file(path) as temporary:
        temporary.write_bytes(signed_png(data.getvalue()))
