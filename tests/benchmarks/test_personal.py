"""The mechanics of personal alignment: two voters, their own pairs, training on them, votes on what that gave."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks import personal
from dpo_fast.shapes.pairs import split
from dpo_fast.shapes.score import appeal
from dpo_fast.train import main as train
from dpo_fast.vote import main as vote

CAPTIONS = 6


@pytest.fixture
def few(monkeypatch):
    """Few captions, and one image of each from each seed."""
    captions, held_out = split()
    monkeypatch.setattr(personal, "split", lambda: (captions[:CAPTIONS], held_out))


def appeal_of(data: bytes) -> float:
    pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy())
    return appeal(pixels.permute(2, 0, 1)[None] / 255).item()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("few")
def test_from_votes_to_a_voters_own_policy(tmp_path):
    folders = [personal.images_of_the_base(tmp_path / f"images-{k}", f"{k},") for k in range(2)]
    file = tmp_path / "votes.sqlite"
    assert personal.voted(file, folders, seed=0) == 2 * CAPTIONS
    assert personal.voted(file, folders, seed=1) == 2 * CAPTIONS  # who has voted does not vote again
    labels = {}
    for name, worth in personal.VOTERS.items():
        pairs = tmp_path / f"{name}.parquet"
        assert vote(["export", str(file), "--to", str(pairs), "--voter", name]) == 0
        rows = pq.read_table(pairs).to_pylist()
        labels[name] = [row["label_0"] for row in rows]
        for row in rows:
            lead = personal.SHARPNESS * worth * (appeal_of(row["jpg_0"]) - appeal_of(row["jpg_1"]))
            if abs(lead) > 12:  # the noise exceeds that once in 160,000 votes
                assert row["label_0"] == float(lead > 0)
    decided = sum(label != 0.5 for label in labels["vivid"])
    run = tmp_path / "run"
    flags = ["--preset", "shapes", "--dataset_name", tmp_path / "vivid.parquet", *personal.FLAGS.split()]
    flags += ["--output_dir", run, "--max_train_steps", 1, "--train_batch_size", 1, "--eval_images", 8, "--seed", 0]
    assert train([str(word) for word in flags]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ties_dropped"] == CAPTIONS - decided
    assert personal.voted(run / "votes.sqlite", [run], seed=2) == 2 * 8
    of = personal.votes_by_voter(run / "votes.sqlite")
    assert {name: len(votes) for name, votes in of.items()} == dict.fromkeys(personal.VOTERS, 8)
    assert all(one.models == ("base", "run") for votes in of.values() for one in votes)
