"""Scores of images on disk: each image once, kept as they come, whatever their sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast import parallel
from dpo_fast.data.image_files import Files
from dpo_fast.errors import BadInput
from dpo_fast.scorers import Scorer
from dpo_fast.scorers.kept_scores import score_images
from tests.faults.commands import contents

SIZES = ((8, 8), (8, 8), (6, 9), (8, 8), (6, 9), (5, 5))


@pytest.fixture
def images(tmp_path, seed) -> tuple[Files, list[str]]:
    random = np.random.default_rng(seed)
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
        self.batches: list[int] = []

    def load(self) -> Scorer:
        self.loads += 1
        return Scorer(self.score, self.checked.append)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.fails_after is not None and self.seen >= self.fails_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        self.batches.append(len(images))
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


def test_an_interruption_changes_no_file(images, tmp_path):
    files, prompts = images
    run(files, prompts, Counting(), tmp_path / "whole", batch_size=1)
    for after in (1, 2, 2):
        with pytest.raises(KeyboardInterrupt):
            run(files, prompts, Counting(fails_after=after), tmp_path / "s", batch_size=1)
    assert (unfinished := list(tmp_path.glob("s/*/*.part"))), "it was not interrupted in a shard"
    run(files, prompts, Counting(), tmp_path / "s", batch_size=1)
    assert not unfinished[0].exists() and contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_files_that_come_or_change_as_the_scorer_is_loaded(images, tmp_path):
    """As the hub's do: kept scores are of the files that made them, and are mixed with none of others."""
    files, prompts = images
    ranks = parallel.start("none")
    commit = {"hub": "one", "here": "not fetched"}

    def scored(texts: list[str]) -> tuple[Counting, torch.Tensor]:
        class Fetching(Counting):
            def load(self) -> Scorer:
                commit["here"] = commit["hub"]
                return super().load()

        scorer = Fetching()
        scorers = {"mean": (lambda: {"files": commit["here"]}, scorer.load)}
        return scorer, score_images(files, texts, scorers, tmp_path / "s", ranks)["mean"]

    assert scored(prompts)[0].seen == len(SIZES)
    assert scored(prompts)[0].loads == 0  # they are of the commit that was fetched
    commit["hub"] = "two"
    changed = ["a new prompt", *prompts[1:]]
    scorer, found = scored(changed)  # one is new, and for it another commit was fetched
    torch.testing.assert_close(found, expected(files, changed))
    assert scorer.seen == len(SIZES) + 1 and scorer.loads == 1
    facts = [json.loads(file.read_text())["facts"] for file in (tmp_path / "s").glob("mean-*/recipe.json")]
    assert sorted(fact["files"] for fact in facts) == ["one", "two"]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "an empty index": lambda index: index.write_text(""),
    "half an index": lambda index: index.write_bytes(index.read_bytes()[:50]),
    "another index": lambda index: index.write_text("[]"),
    "a bit of the index": lambda index: flip(index, 40),
    "a bit of a score": lambda index: flip(index.with_suffix(".bin"), 11),
    "scores cut off": lambda index: index.with_suffix(".bin").write_bytes(bytes(9)),
    "no scores": lambda index: index.with_suffix(".bin").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_scores_is_made_again(images, tmp_path, damage, caplog):
    files, prompts = images
    run(files, prompts, Counting(), tmp_path / "s")
    (index,) = (tmp_path / "s").glob("mean-*/shard-0-00000.json")
    DAMAGE[damage](index)
    scorer = Counting()
    torch.testing.assert_close(run(files, prompts, scorer, tmp_path / "s"), expected(files, prompts))
    assert scorer.seen == len(SIZES)
    assert "shard-0-00000" in caplog.text and "deleted, and made again" in caplog.text
    assert run(files, prompts, scorer, tmp_path / "s").isfinite().all() and scorer.seen == len(SIZES)


def test_scores_of_an_earlier_version_are_named(images, tmp_path, caplog):
    files, prompts = images
    (tmp_path / "s" / "mean").mkdir(parents=True)
    run(files, prompts, Counting(), tmp_path / "s")
    assert f"{tmp_path / 's' / 'mean'} holds scores of an earlier version" in caplog.text


def test_batches_are_as_large_as_is_said_and_few_images_wait(tmp_path, seed):
    random = np.random.default_rng(seed)
    paths = []
    for k in range(90):  # 60 of sizes of their own, 30 of one
        size = (5, 5) if k % 3 == 0 else (6, 6 + k)
        paths.append(tmp_path / f"{k}.png")
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    read: list[int] = []

    class Counted(Files):
        def __getitem__(self, row: int) -> torch.Tensor:
            read.append(row)
            return super().__getitem__(row)

    most = 0

    class Watching(Counting):
        def score(self, images, prompts):
            nonlocal most
            most = max(most, len(read) - self.seen)
            return super().score(images, prompts)

    for batch_size in (3, 40):
        scorer, most = Watching(), 0
        read.clear()
        run(Counted(paths), ["a"] * 90, scorer, tmp_path / f"s{batch_size}", batch_size)
        assert sum(scorer.batches) == 90 and max(scorer.batches) == min(batch_size, 30)
        assert most <= (4 + 2) * batch_size + 2  # that wait, and that are read ahead


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
