"""Samples are reproducible, and the picture shows base above policy, one column a prompt."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast import sampling
from dpo_fast.models import load_family
from dpo_fast.sampling import FONT_SIZE, MARGIN, before_after, sample, save_png, to_picture

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
    monkeypatch.setattr(sampling.ImageDraw.ImageDraw, "multiline_text", lambda self, xy, text, **_: texts.append(text))
    sheet(captions=("word " * 200, "a few words"))
    assert texts[0].count("\n") == sampling.CAPTION_LINES - 1 and texts[0].endswith(" ...")
    assert texts[1] == "a few words"


def test_a_picture_is_written_as_png(tmp_path):
    save_png(sheet(), tmp_path / "samples" / "step-1.png")
    with Image.open(tmp_path / "samples" / "step-1.png") as picture:
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), np.asarray(sheet()))
    assert len(list((tmp_path / "samples").iterdir())) == 1


@pytest.mark.parametrize("name", ["sd15", "turbo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_follow_seed_and_prompt(request, name, dtype, monkeypatch):
    path = request.getfixturevalue(f"{name}_path")
    family = load_family(path, turbo=name == "turbo", dtype=dtype, device=torch.device("cpu"))
    monkeypatch.setattr(type(family), "sampling_steps", 2)
    one, two = images = sample(family, ["a cat", "a cat"], [3, 4], resolution=64)
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8
    assert np.ptp(one.numpy()) > 50  # not a plain surface
    assert not torch.equal(one, two)
    assert torch.equal(sample(family, ["a cat"], [4], resolution=64)[0], two)
    assert not torch.equal(sample(family, ["a dog"], [4], resolution=64)[0], two)
    assert not torch.equal(sample(family, ["a cat"], [4], resolution=64, steps=3)[0], two)
    guided = sample(family, ["a cat"], [4], resolution=64, guidance=family.sampling_guidance + 3)
    assert not torch.equal(guided[0], two)
    assert not family.unet.training


def test_an_image_does_not_depend_on_its_batch(sd15_path):
    """But for rounding, which another batch size may change."""
    family = load_family(sd15_path, dtype=torch.float32, device=torch.device("cpu"))
    prompts, seeds = ["a cat", "a dog", "a cat"], [7, 8, 9]
    alone = sample(family, prompts, seeds, resolution=64, steps=2).int()
    together = sample(family, prompts, seeds, resolution=64, steps=2, batch_size=2).int()
    assert (alone - together).abs().max() <= 1


def test_samples_are_those_of_the_pipeline_itself(sd15_path, monkeypatch):
    family = load_family(sd15_path, dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(type(family), "sampling_steps", 3)
    ours = to_picture(sample(family, ["a cat"], [5], resolution=64)[0])
    family.pipeline.set_progress_bar_config(disable=True)
    theirs = family.pipeline(
        "a cat", num_inference_steps=3, guidance_scale=7.5, height=64, width=64, generator=torch.manual_seed(5)
    ).images[0]
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    assert np.abs(difference).max() <= 1  # rounding
