"""Sheets of pictures: the base above the policy and what changed, one column a prompt; PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast.pictures import (
    CAPTION_LINES,
    LABEL,
    MARGIN,
    STRONGEST,
    amplification,
    amplified,
    before_after,
    difference,
    picture_grid,
    save_png,
    to_picture,
    to_pixels,
)

COLOURS = {"before": [(250, 0, 0), (0, 250, 0)], "after": [(0, 0, 250), (0, 244, 0)]}
MOVED = {"difference x 1": [(250, 250, 250), (6, 6, 6)]}  # the largest change of a channel


def sheet(size: int = 200, captions: tuple[str, ...] = ("a cat", "a dog"), **titles: dict[str, int]) -> Image.Image:
    images = {row: [Image.new("RGB", (size, size), colour) for colour in COLOURS[row]] for row in COLOURS}
    return before_after(images["before"], images["after"], list(captions), **titles)


@pytest.mark.parametrize("size, cell", [(200, 200), (64, 160)])
@pytest.mark.parametrize("groups", [None, {"the best": 1, "others": 1}])
def test_base_policy_and_difference_stand_below_each_other_one_column_a_prompt(size, cell, groups):
    picture = sheet(size, groups=groups)
    pixels, top = np.asarray(picture), LABEL if groups else 0
    assert picture.width == MARGIN + 2 * (cell + MARGIN)
    drawn = np.zeros(pixels.shape[:2], bool)
    drawn[: MARGIN + top] = True
    for row, (title, colours) in enumerate((COLOURS | MOVED).items()):
        for column in range(2):
            x = MARGIN + column * (cell + MARGIN)
            y = top + MARGIN + row * (cell + LABEL + MARGIN) + LABEL
            assert (pixels[y : y + cell, x : x + cell] == colours[column]).all()
            drawn[y : y + cell, x : x + cell] = True
            above = pixels[y - LABEL : y, x : x + cell]
            assert (above < 200).any(), f"no title above {title} {column}"
            drawn[y - LABEL : y, x : x + cell] = True
            if groups:
                assert (pixels[MARGIN : MARGIN + LABEL, x : x + cell] < 128).any(), f"no title above column {column}"
    captions = np.where(~drawn & (pixels < 128).all(2))
    assert captions[0].min() > top + 3 * (cell + LABEL + MARGIN)
    assert {int(x > MARGIN + cell) for x in captions[1]} == {0, 1}


@pytest.mark.parametrize("caption", ["word " * 200, "W" * 500, "", "雪 é 🙂" * 20, "ثعلب " * 90])
def test_any_caption_fits(caption):
    plain, picture = np.asarray(sheet()), np.asarray(sheet(captions=(caption, "")))
    assert picture.shape == plain.shape
    top = 3 * (200 + LABEL + MARGIN)
    white = picture[top:] == 255
    assert white[:, :MARGIN].all() and white[:, MARGIN + 200 + MARGIN :].all() and white[-2:].all()
    assert white.all() == (caption == "")
    if caption.startswith("word"):  # all lines are used
        assert not white[MARGIN : MARGIN + LABEL].all() and not white[-LABEL - MARGIN : -MARGIN].all()
    assert CAPTION_LINES > 1


def test_a_grid_of_one_row_has_no_difference():
    images = [Image.new("RGB", (200, 200), "red")]
    assert picture_grid({"model": images}, ["a cat"]).height == sheet().height - 2 * (200 + LABEL + MARGIN)


def test_a_difference_is_the_largest_change_of_a_channel():
    before = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    after = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    moved = difference(before, after)
    assert torch.equal(moved.int(), (before.int() - after.int()).abs().amax(0))
    assert torch.equal(moved, difference(after, before))
    shown = to_pixels(amplified(moved, 3))
    assert torch.equal(shown, (moved.int() * 3).clamp(max=255).byte().expand(3, -1, -1))
    assert torch.equal(to_pixels(to_picture(before)), before)


def test_one_factor_makes_all_differences_of_a_sheet_visible():
    faint, strong = torch.full((10, 10), 10, dtype=torch.uint8), torch.full((10, 10), 100, dtype=torch.uint8)
    assert amplification([faint]) == 16 and amplification([strong]) == 2 == amplification([faint, strong])
    assert amplification([torch.zeros(4, 4, dtype=torch.uint8)]) == STRONGEST
    assert amplification([torch.full((4, 4), 255, dtype=torch.uint8)]) == 1
    spot = faint.clone()
    spot[0, :5] = 255  # one pixel in twenty may be too bright
    assert amplification([spot]) == 16
    spot[0, 5] = 255
    assert amplification([spot]) == 1


def test_a_picture_is_written_as_png(tmp_path):
    save_png(sheet(), tmp_path / "samples" / "step-1.png")
    with Image.open(tmp_path / "samples" / "step-1.png") as picture:
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), np.asarray(sheet()))
    assert len(list((tmp_path / "samples").iterdir())) == 1
