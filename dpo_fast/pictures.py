"""Sheets of captioned images, what changed between two images, and PNG files that carry a checksum and texts."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dpo_fast.captions import LINE, caption
from dpo_fast.checksums import signed_png
from dpo_fast.files import atomic_file

MARGIN, CAPTION_LINES = 8, 3
LABEL = LINE + 2  # height of a title
STRONGEST = 32  # factor of a difference: one level of 255 is then 32, which can be seen
CLIPPED = 0.05  # share of the pixels of all differences that may be too bright for their factor


def to_picture(pixels: torch.Tensor) -> Image.Image:  # uint8 [3, H, W]
    """Convert pixels to a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """Convert a Pillow image to pixels: uint8 [3, H, W]."""
    picture = picture.convert("RGB")
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1)


def difference(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:  # uint8 [3, H, W] each -> uint8 [H, W]
    """How far each pixel moved: the largest change of its channels, in levels of 255."""
    return (before.maximum(after) - before.minimum(after)).amax(0)


def amplification(differences: Sequence[torch.Tensor]) -> int:  # uint8 [H, W] each
    """The factor that makes differences visible: the largest power of two, up to STRONGEST, at which no more than
    CLIPPED of all their pixels leave the range of 255; at least 1."""
    pixels = torch.cat([one.flatten() for one in differences]).int()
    factor = STRONGEST
    while factor > 1 and (pixels * factor > 255).double().mean() > CLIPPED:
        factor //= 2
    return factor


def amplified(difference: torch.Tensor, factor: int) -> Image.Image:  # uint8 [H, W]
    """Draw a difference in grey: black where nothing changed."""
    return Image.fromarray((difference.int() * factor).clamp(max=255).byte().numpy()).convert("RGB")


def before_after(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    captions: Sequence[str],
    groups: Mapping[str, int] | None = None,
) -> Image.Image:
    """Draw one column per prompt: the base's image, the policy's, what changed, and the caption under all.

    The differences have one factor, which their title says. captions, groups: as in `picture_grid`.
    """
    moved = [difference(to_pixels(old), to_pixels(new)) for old, new in zip(before, after, strict=True)]
    factor = amplification(moved)
    changed = [amplified(one, factor) for one in moved]
    return picture_grid({"before": before, "after": after, f"difference x {factor}": changed}, captions, groups=groups)


def picture_grid(
    rows: Mapping[str, Sequence[Image.Image]],  # title -> one image per caption, all of one size
    captions: Sequence[str],
    largest: int | None = None,  # side of a cell in pixels, at most; None: the images' width
    groups: Mapping[str, int] | None = None,  # title -> its number of columns, from the left; None: no titles
) -> Image.Image:
    """Draw one column per caption, with the caption under the images of all rows. Cells are at least 160 pixels."""
    width = next(iter(rows.values()))[0].width
    cell = max(min(width, largest or width), 160)
    # Keep the pixels of a tiny image visible as squares; blurred, it would look like a bad photograph.
    enlarge = Image.Resampling.NEAREST if width < cell / 2 else Image.Resampling.LANCZOS
    top = LABEL if groups else 0
    bottom = top + len(rows) * (cell + LABEL) + (len(rows) + 1) * MARGIN
    size = MARGIN + len(captions) * (cell + MARGIN), bottom + CAPTION_LINES * LINE + MARGIN
    sheet = Image.new("RGB", size, "white")
    column = 0
    for title, columns in (groups or {}).items():
        sheet.paste(caption(title, columns * (cell + MARGIN) - MARGIN, 1), (MARGIN + column * (cell + MARGIN), MARGIN))
        column += columns
    for column, text in enumerate(captions):
        x = MARGIN + column * (cell + MARGIN)
        for row, (title, images) in enumerate(rows.items()):
            y = top + MARGIN + row * (cell + LABEL + MARGIN)
            sheet.paste(caption(title, cell, 1, fill="gray"), (x, y))
            sheet.paste(images[column].resize((cell, cell), enlarge), (x, y + LABEL))
        sheet.paste(caption(text, cell, CAPTION_LINES), (x, bottom))
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
