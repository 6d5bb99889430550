"""Sheets of pictures: the base above the policy, one column a prompt, any caption; PNG files."""

import numpy as np
import pytest
from PIL import Image

from dpo_fast import pictures
from dpo_fast.pictures import FONT_SIZE, MARGIN, before_after, save_png

COLOURS = {"before": [(250, 0, 0), (0, 250, 0)], "after": [(0, 0, 250), (250, 250, 0)]}
LABEL = FONT_SIZE + 6


def sheet(size: int = 200, captions: tuple[str, ...] = ("a cat", "a dog")) -> Image.Image:
    images = {row: [Image.new("RGB", (size, size), colour) for colour in COLOURS[row]] for row in COLOURS}
    return before_after(images["before"], images["after"], list(captions))


@pytest.mark.parametrize("size, cell", [(200, 200), (64, 160)])
def test_the_base_is_above_the_policy_one_column_a_prompt(size, cell):
    picture = sheet(size)
    pixels = np.asarray(picture)
    assert picture.width == MARGIN + 2 * (cell + MARGIN)
    drawn = np.zeros(pixels.shape[:2], bool)
    for row, title in enumerate(("before", "after")):
        for column in range(2):
            x = MARGIN + column * (cell + MARGIN)
            y = MARGIN + row * (cell + LABEL + MARGIN) + LABEL
            assert (pixels[y : y + cell, x : x + cell] == COLOURS[title][column]).all()
            drawn[y : y + cell, x : x + cell] = True
            above = pixels[y - LABEL : y, x : x + cell]
            assert (above < 200).any(), f"no title above {title} {column}"
            drawn[y - LABEL : y, x : x + cell] = True
    captions = np.where(~drawn & (pixels < 128).all(2))
    assert captions[0].min() > 2 * (cell + LABEL + MARGIN)
    assert {int(x > MARGIN + cell) for x in captions[1]} == {0, 1}


@pytest.mark.parametrize("caption", ["word " * 200, "W" * 500, "", "雪 é 🙂" * 20])
def test_any_caption_fits(caption):
    plain, picture = np.asarray(sheet()), np.asarray(sheet(captions=(caption, "")))
    assert picture.shape == plain.shape
    top = 2 * (200 + LABEL + MARGIN)
    white = picture[top:] == 255
    assert white[:, :MARGIN].all() and white[:, MARGIN + 200 + MARGIN :].all() and white[-2:].all()
    assert white.all() == (caption == "")


def test_a_long_caption_ends_in_dots(monkeypatch):
    texts = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "multiline_text", lambda self, xy, text, **_: texts.append(text))
    sheet(captions=("word " * 200, "a few words"))
    assert texts[0].count("\n") == pictures.CAPTION_LINES - 1 and texts[0].endswith(" ...")
    assert texts[1] == "a few words"


def test_a_picture_is_written_as_png(tmp_path):
    save_png(sheet(), tmp_path / "samples" / "step-1.png")
    with Image.open(tmp_path / "samples" / "step-1.png") as picture:
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), np.asarray(sheet()))
    assert len(list((tmp_path / "samples").iterdir())) == 1
