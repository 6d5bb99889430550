"""Scores of images on disk: each image once, kept as they come, whatever their sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast import parallel
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.image_scores import score_images
from dpo_fast.evaluation.pairing import Files
from dpo_fast.evaluation.scorers import Scorer

SIZES = ((8, 8), (8, 8), (6, 9), (8, 8), (6, 9), (5, 5))


@pytest.fixture
def images(tmp_path) -> tuple[Files, list[str]]:
    random = np.random.default_rng()
    paths = []
    for k, size in enumerate(SIZES):
        paths.append(tmp_path / f"{k}.png")
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    paths.append(tmp_path / "again.png")
    paths[-1].write_bytes(paths[0].read_bytes())
    return Files(paths), [f"prompt {k % 2}" for k in range(len(SIZES))] + ["prompt 0"]


class Counting:
    """A scorer that notes how many images it is given, and may fail after some."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.seen, self.loads, self.fails_after, self.checked = 0, 0, fails_after, []

    def load(self) -> Scorer:
        self.loads += 1
        return Scorer(self.score, self.checked.append)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.fails_after is not None and self.seen >= self.fails_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return images.double().flatten(1).mean(1) + torch.tensor([len(prompt) for prompt in prompts])


def expected(images: Files, prompts: list[str]) -> torch.Tensor:
    each = [images[row].double().mean() + len(prompt) for row, prompt in enumerate(prompts)]
    return torch.stack(each)


def run(
    images: Files, prompts: list[str], scorer: Counting, folder: Path, batch_size: int = 16, **about: str
) -> torch.Tensor:
    ranks = parallel.start("none")
    scorers = {"mean": (lambda: {"scorer": "mean", **about}, scorer.load)}
    return score_images(images, prompts, scorers, folder, ranks, batch_size=batch_size)["mean"]


def test_every_image_is_scored_once_and_never_again(images, tmp_path):
    files, prompts = images
    scorer = Counting()
    torch.testing.assert_close(run(files, prompts, scorer, tmp_path / "s"), expected(files, prompts))
    assert scorer.seen == len(SIZES) and scorer.loads == 1 and len(scorer.checked[0]) == len(SIZES)
    again = Counting()
    assert torch.equal(run(files, prompts, again, tmp_path / "s"), run(files, prompts, scorer, tmp_path / "s"))
    assert again.loads == 0 and scorer.loads == 1


def test_other_bytes_another_prompt_and_another_precision_are_scored_anew(images, tmp_path):
    files, prompts = images
    run(files, prompts, Counting(), tmp_path / "s")
    Image.new("RGB", (8, 8), "red").save(files.paths[1])
    for changed, number, about in ((prompts, 1, {}), (["another", *prompts[1:]], 1, {}), (prompts, 6, {"dtype": "x"})):
        scorer = Counting()
        found = run(files, changed, scorer, tmp_path / "s", **about)
        torch.testing.assert_close(found, expected(files, changed))
        assert scorer.seen == number


def test_an_interruption_keeps_what_was_scored(images, tmp_path):
    files, prompts = images
    with pytest.raises(KeyboardInterrupt):
        run(files, prompts, Counting(fails_after=4), tmp_path / "s", batch_size=1)
    scorer = Counting()
    torch.testing.assert_close(run(files, prompts, scorer, tmp_path / "s"), expected(files, prompts))
    assert scorer.seen == len(SIZES) - 4


def test_what_cannot_be_scored_is_named(images, tmp_path):
    files, prompts = images

    class NotFinite(Counting):
        def score(self, images, prompts):
            return super().score(images, prompts) / (images.shape[-1] != 5) * float(images.shape[-1] != 5)

    with pytest.raises(BadInput, match=r"mean gives no finite score for .*5\.png"):
        run(files, prompts, NotFinite(), tmp_path / "s")
    files.paths[2].write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"2\.png cannot be decoded"):
        run(files, prompts, Counting(), tmp_path / "t")
