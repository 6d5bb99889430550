"""Rows of one prompt and an image of either side."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast.data.image_files import Files
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.image_names import PromptImage
from dpo_fast.evaluation.pairing import UNCATEGORISED, pair_up
from dpo_fast.evaluation.prompts import Prompt

PROMPTS = [Prompt("one", "set", "A"), Prompt("two", "set"), Prompt("three", "set", "B"), Prompt("one", "other", "C")]


def files(*names: str) -> list[PromptImage]:
    return [PromptImage(Path(name)) for name in names]


def seeded(name: str, *seeds: int) -> list[PromptImage]:
    return [PromptImage(Path(f"{name}{seed}"), seed) for seed in seeds]


def each(*seeds: int) -> dict[str, tuple[int, ...]]:
    """These seeds for every prompt."""
    return dict.fromkeys((prompt.text for prompt in PROMPTS), seeds)


def test_with_seeds_a_side_that_has_fewer_starts_again():
    base = {"one": files("b0", "b1"), "two": files("b2")}
    policy = {"one": files("p0", "p1", "p2"), "two": files("p3", "p4", "p5"), "three": files("p6")}
    pairs = pair_up(PROMPTS, each(5, 7, 9), base, policy, ("them", "us"))
    assert pairs.prompts == ["one"] * 3 + ["two"] * 3 and pairs.seeds == [5, 7, 9] * 2
    assert [path.name for path in pairs.base.paths] == ["b0", "b1", "b0", "b2", "b2", "b2"]
    assert [path.name for path in pairs.policy.paths] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert pairs.categories == ["A"] * 3 + [UNCATEGORISED] * 3
    assert "1 of 3 prompts have no image in them and are left out" in pairs.remarks
    assert "2 prompts have fewer images in them than seeds: some stand in several pairs" in pairs.remarks
    assert "1 prompts have fewer images in us than seeds: some stand in several pairs" in pairs.remarks


def test_without_seeds_as_many_as_both_have():
    base = {"one": files("b0", "b1"), "two": files("b2")}
    policy = {"one": files("p0", "p1", "p2"), "two": files("p3")}
    pairs = pair_up(PROMPTS[:2], None, base, policy, ("them", "us"))
    assert pairs.prompts == ["one", "one", "two"] and pairs.seeds == [0, 1, 0] and not pairs.remarks
    assert [path.name for path in pairs.policy.paths] == ["p0", "p1", "p3"]


def test_prompts_may_have_seeds_of_their_own():
    sides = ({"one": seeded(name, 0, 1), "two": seeded(f"{name}'", 0)} for name in "bp")
    pairs = pair_up(PROMPTS[:2], {"one": (0, 1), "two": (0,)}, *sides, ("them", "us"))
    assert pairs.prompts == ["one", "one", "two"] and pairs.seeds == [0, 1, 0] and not pairs.remarks
    assert [path.name for path in pairs.policy.paths] == ["p0", "p1", "p'0"]


def test_images_of_one_seed_stand_against_each_other():
    base, policy = {"two": seeded("b", 17, 3, 5)}, {"two": seeded("p", 3, 4, 17)}

    def paired(seeds, base=base, policy=policy) -> tuple[list[str], list[int], list[str]]:
        found = pair_up([PROMPTS[1]], seeds and each(*seeds), base, policy, ("b", "p"))
        both = zip(found.base.paths, found.policy.paths, strict=True)
        return [f"{one} {other}" for one, other in both], found.seeds, found.remarks

    assert paired((3, 17)) == (["b3 p3", "b17 p17"], [3, 17], [])
    assert paired((17,)) == (["b17 p17"], [17], [])
    rows, seeds, remarks = paired((3, 9), policy={"two": seeded("p", 3, 9)})
    assert rows == ["b3 p3", "b17 p9"] and remarks == ["1 of 2 pairs are of different noise: their seeds differ"]
    rows, seeds, remarks = paired(None)
    assert rows == ["b17 p17", "b3 p3", "b5 p4"] and seeds == [17, 3, 2] and remarks[0].startswith("1 of 3 pairs")
    assert paired(None, policy={"two": files("x", "y")})[2] == []  # what is not known is not said to differ


def test_prompts_without_categories_have_none():
    assert pair_up([PROMPTS[1]], each(0), {"two": files("b")}, {"two": files("p")}, ("b", "p")).categories is None


def test_nothing_in_common_is_refused():
    with pytest.raises(BadInput, match=r"no prompt has an image in both them and us .*must be the prompts"):
        pair_up(PROMPTS, each(0), {"one": files("b")}, {"two": files("p")}, ("them", "us"))


def test_files_are_read_when_asked_for(tmp_path):
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    clear = np.dstack([pixels.numpy(), np.zeros((5, 7), np.uint8)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    there = Files([tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")])
    assert torch.equal(there[0], pixels.permute(2, 0, 1)) and bool((there[1] == 255).all()) and len(there) == 4
    for row in (2, 3):
        with pytest.raises(BadInput, match=f"{there.paths[row].name}.*: mend it"):
            there[row]
