"""Which commit or files a name stands for, in the layouts that huggingface_hub leaves."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from dpo_fast.hub_revisions import revision_of

OLD, NEW = "a" * 40, "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache of two commits of a model, refs main and v1, and one of a data set; files are links to blobs."""
    for kind, commit in (("models", OLD), ("models", NEW), ("datasets", OLD)):
        home = tmp_path / f"{kind}--owner--name"
        snapshot = home / "snapshots" / commit
        for folder in (home / "blobs", home / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "blobs" / commit[:8]).write_text(commit)
        os.symlink(f"../../blobs/{commit[:8]}", snapshot / "config.json")
        (home / "refs" / "main").write_text(commit)
    (tmp_path / "models--owner--name" / "refs" / "v1").write_text(OLD)
    return tmp_path


def test_of_the_hub_it_is_the_commit_that_was_loaded(cache, monkeypatch):
    for revision, commit in ((None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)):
        assert revision_of("owner/name", revision=revision, cache_dir=str(cache)) == commit
        path = hf_hub_download("owner/name", "config.json", revision=revision, cache_dir=cache, local_files_only=True)
        assert Path(path).read_text() == commit  # what the client itself takes
        assert revision_of(path) == revision_of(Path(path).parent) == commit
    assert revision_of("owner/name", cache_dir=str(cache), kind="dataset") == OLD
    for name, revision in (("owner/other", None), ("owner/name", "v2"), ("owner/name", "b" * 40), ("x" * 5000, None)):
        assert revision_of(name, revision=revision, cache_dir=str(cache)) == "not fetched"
    (cache / "datasets--owner--name" / "refs" / "main").unlink()  # `datasets` asks for files by the commit alone
    assert revision_of("owner/name", cache_dir=str(cache), kind="dataset") == OLD
    (cache / "datasets--owner--name" / "snapshots" / NEW).mkdir()
    assert revision_of("owner/name", cache_dir=str(cache), kind="dataset") == "not fetched"  # either of two
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert revision_of("owner/name") == NEW


def test_of_a_download_into_a_folder_it_is_the_commit_that_was_noted(tmp_path):
    notes = tmp_path / ".cache" / "huggingface" / "download"
    for name in ("config.json", "unet/model.safetensors"):
        for path, text in ((tmp_path / name, "x"), (notes / f"{name}.metadata", f"{NEW}\netag\n4e9\n")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert revision_of(tmp_path) == NEW
    (notes / "config.json.metadata").write_text(f"{NEW}\netag\n1.0\n")  # changed long after the download
    assert revision_of(tmp_path).startswith("files ")
    (notes / "config.json.metadata").write_text(f"{OLD}\netag\n4e9\n")  # of two commits
    assert revision_of(tmp_path).startswith("files ")
    (notes / "config.json.metadata").write_text("now")
    assert revision_of(tmp_path).startswith("files ")


def test_of_files_it_is_what_they_hold(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "model.safetensors").write_bytes(b"w" * (3 << 20))
        (folder / "model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "UNet"]}')
    os.utime(there / "model_index.json", (1, 1))
    before = revision_of(here)
    assert before == revision_of(str(there)) and before.startswith("files ") and len(before) == len("files ") + 16
    (here / "report.html").write_text("made later")  # no part of the pipeline
    (here / "checkpoint-5").mkdir()
    (here / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (here / "unet" / ".DS_Store").write_bytes(b"x")
    assert revision_of(here) == before
    weights = here / "unet" / "model.safetensors"
    for changed in (b"x" + b"w" * ((3 << 20) - 1), b"w" * ((3 << 20) - 1) + b"x", b"w" * ((3 << 20) + 1)):
        weights.write_bytes(changed)
        assert revision_of(here) != before
    weights.write_bytes(b"w" * (3 << 20))
    assert revision_of(weights) != before == revision_of(here)
    assert revision_of(weights) == revision_of(there / "unet" / "model.safetensors")
    (here / "model_index.json").unlink()
    assert revision_of(here) != before
    assert revision_of(tmp_path / "nowhere" / "at all") == "not fetched"
