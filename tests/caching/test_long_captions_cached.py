"""Embeddings of long captions in the cache: kept apart from those of 75 tokens, and what is trained without it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dpo_fast.cache import main
from dpo_fast.train import main as train_main
from tests.caching.test_cache_command import build_flags
from tests.helpers.pairs import write_pickapic
from tests.helpers.runs import assert_same_state, flags_for, train


@pytest.fixture(scope="module")
def long_pairs(tmp_path_factory) -> Path:
    """Twelve pairs whose captions have 100 letters, each a token; two of them 160, and two 230."""
    captions = [f"picture {chr(ord('a') + n) * (90 + 60 * (n in (3, 4)) + 130 * (n in (8, 9)))}xyz" for n in range(12)]
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "long.parquet", n=12, captions=captions)


def text_stores(cache: Path) -> dict[object, dict]:
    """The recipes of embeddings, by the length of captions that they name."""
    recipes = [json.loads(file.read_text()) for file in cache.glob("text-*/recipe.json")]
    return {recipe["facts"].get("max_token_length"): recipe for recipe in recipes}


def test_each_length_has_a_store_and_that_of_75_is_as_before(sdxl_path, long_pairs, tmp_path, capfd):
    cache = tmp_path / "cache"

    def encoded(*more: object) -> int:
        assert main(["build", *build_flags(sdxl_path, long_pairs, cache, *more)]) == 0
        return int(re.search(r"captions: 12 are 12 different ones, (\d+) encoded now", "".join(capfd.readouterr()))[1])

    assert encoded() == 12
    before = {file: file.read_bytes() for file in cache.glob("text-*/shard-*")}
    assert encoded("--max_token_length", 150) == 12 and encoded("--max_token_length", 75) == 0
    assert before and all(file.read_bytes() == content for file, content in before.items())
    stores = text_stores(cache)
    shapes = {length: recipe["fields"][0]["shape"] for length, recipe in stores.items()}
    assert shapes == {None: [77, 80], 150: [152, 80]}
    # what is said of 75 tokens is said in the same words
    assert stores[150]["facts"] == {**stores[None]["facts"], "max_token_length": 150}
    for file in cache.glob("text-*"):  # what a dry run counts is of its own length
        if '"max_token_length"' in (file / "recipe.json").read_text():
            shutil.rmtree(file)
    flags = flags_for(sdxl_path, long_pairs, tmp_path / "run", "--dry-run", "--latent_cache_dir", cache)
    assert train_main([*flags, "--max_token_length", "150"]) == 0
    assert re.search(r"cache +0  of 8 embeddings are there", capfd.readouterr().out)


@pytest.mark.parametrize("name", [pytest.param("sd15", marks=pytest.mark.exhaustive), "sdxl"])
def test_with_and_without_a_cache_the_same_is_trained(request, long_pairs, tmp_path, name):
    more = ["--latent_cache_dir", tmp_path / "cache", "--learning_rate", 1e-3, "--proportion_empty_prompts", 0.5]
    more += ["--max_train_steps", 3, "--max_token_length", 150]
    model, runs = request.getfixturevalue(f"{name}_path"), []
    for how in ("--cache", "--no-cache"):
        runs.append(train(model, long_pairs, tmp_path / f"run{how}", *more, how))
        assert json.loads((runs[-1] / "summary.json").read_text())["captions_cut"] == 4
    assert_same_state(*runs, 3)


@pytest.mark.exhaustive
def test_cached_errors_of_the_reference_belong_to_a_length(sdxl_path, long_pairs, tmp_path):
    """Two runs that differ in the length alone must not share them: the first margin is 0 for both."""
    more = ["--latent_cache_dir", tmp_path / "cache", "--cached_reference", 1, "--proportion_empty_prompts", 0.5]
    for length in (75, 225):
        folder = train(
            sdxl_path,
            long_pairs,
            tmp_path / f"run{length}",
            *more,
            "--max_token_length",
            length,
            "--max_train_steps",
            1,
        )
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["initial_margin_rms"] < 1e-2 and summary["steps"] == 1
    assert len([*(tmp_path / "cache").glob("reference-*")]) == 2
