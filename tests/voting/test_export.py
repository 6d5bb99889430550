"""Votes as CSV, and as preference pairs that training reads."""

import csv
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_fast.api.pairs import load_pairs
from dpo_fast.vote import main
from dpo_fast.votes.desk import Desk
from dpo_fast.votes.store import Comparison, VoteStore
from tests.helpers.runs import train
from tests.helpers.voters import QUESTIONS, session, vote

PROMPTS = ["a fox", "a woman in red", '<b>two</b> men, a "boat"', "=1+1", "a tower", "a lake"]
CATEGORIES = ["Animals", "People", "People", "Other", "Other", None]


def taste(sign: float):
    """Bright images if `sign` is above 0, dark ones if it is below."""
    return lambda question, prompt, file: sign * np.asarray(Image.open(file)).mean()


@pytest.fixture
def voted(tmp_path):
    """A file of votes, by five voters of whom four like bright images."""
    comparisons = []
    for k, (prompt, category) in enumerate(zip(PROMPTS, CATEGORIES, strict=True)):
        files = tuple(tmp_path / side / f"{k}.png" for side in ("one", "two"))
        for path, level in zip(files, np.random.permutation([20, 120]), strict=True):
            path.parent.mkdir(exist_ok=True)
            pixels = np.random.randint(0, 60, (72, 72, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        comparisons.append(Comparison("g", prompt, category, None, ("one", "two"), files))

    def begin(questions=QUESTIONS) -> Path:
        session(tmp_path / "votes.sqlite", comparisons, questions=questions)
        vote(tmp_path / "votes.sqlite", {**{f"v{k}": taste(1) for k in range(4)}, "other": taste(-1)})
        return tmp_path / "votes.sqlite"

    return begin


def exported(file: Path, *flags: object, to: str = "pairs.parquet", status: int = 0) -> list[dict]:
    path = file.parent / to
    assert main(["export", str(file), "--to", str(path), *map(str, flags)]) == status
    if status:
        return []
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def brighter(row: dict) -> bool:
    """Whether the first image of a row is the brighter one, by its bytes."""
    first, second = (np.asarray(Image.open(io.BytesIO(row[name]))).mean() for name in ("jpg_0", "jpg_1"))
    return first > second


def test_the_majority_as_labels(voted, tmp_path, capsys):
    rows = exported(voted(), "--question", "general")
    assert [row["caption"] for row in rows] == PROMPTS and [row["category"] for row in rows] == CATEGORIES
    assert list(rows[0]) == ["jpg_0", "jpg_1", "label_0", "caption", "category", "votes"]
    for k, row in enumerate(rows):
        assert row["jpg_0"] == (tmp_path / "one" / f"{k}.png").read_bytes()  # as people saw them
        assert row["jpg_1"] == (tmp_path / "two" / f"{k}.png").read_bytes()
        assert row["label_0"] == float(brighter(row)) and row["votes"] == 5
    said = capsys.readouterr().out
    assert "6 pairs of 30 votes" in said and f"--dataset_name {tmp_path / 'pairs.parquet'}" in said


def test_soft_labels_and_one_voter(voted):
    file = voted()
    soft = exported(file, "--question", "appeal", "--labels", "soft", to="soft.parquet")
    assert {row["label_0"] for row in soft} <= {0.2, 0.8}
    other = exported(file, "--question", "appeal", "--voter", "other", to="other.parquet")
    for row, mine in zip(soft, other, strict=True):
        assert row["label_0"] == (0.8 if brighter(row) else 0.2)
        assert mine["label_0"] == float(not brighter(mine)) and mine["votes"] == 1


def test_every_vote_is_a_row(voted):
    file = voted()
    rows = exported(file, to="votes.csv")
    with VoteStore.read(file) as store:
        votes = store.votes()
    assert len(rows) == len(votes) == 6 * 3 * 5
    for row, one in zip(rows, votes, strict=True):
        assert (row["prompt"], row["question"], row["voter"]) == (one.prompt, one.question, one.voter)
        assert (row["model_0"], row["model_1"], float(row["label_0"])) == (*one.models, one.outcome)
        assert bool(int(row["model_0_left"])) == one.first_left and float(row["at"]) == pytest.approx(one.at, abs=1e-3)
    assert len(exported(file, "--voter", "other", "--question", "general", to="few.csv")) == 6


def test_the_people_slice(voted):
    rows = exported(voted(), "--question", "general", "--slice", "people")
    assert [row["caption"] for row in rows] == PROMPTS[1:3] and {row["category"] for row in rows} == {"People"}


def test_excluded_voters_are_left_out_unless_asked(voted, capsys):
    file = voted()
    with VoteStore.open(file) as store, store.transaction():
        Desk(store).exclude("other", True, "was asleep")
    soft = ["--question", "general", "--labels", "soft"]
    assert {row["label_0"] for row in exported(file, *soft, to="without.parquet")} == {0.0, 1.0}
    assert {row["label_0"] for row in exported(file, *soft, "--excluded", to="with.parquet")} <= {0.2, 0.8}
    exported(file, *soft, "--voter", "other", to="own.parquet", status=2)
    assert "--voter other is excluded (was asleep): add --excluded" in capsys.readouterr().err


def test_training_reads_what_is_exported(voted, sdxl_path, tmp_path):
    """Ties are dropped and counted, or trained on with --soft_labels."""
    file = voted({"general": "Which?"})
    with VoteStore.open(file) as store, store.transaction():
        desk = Desk(store)
        desk.exclude("other", True)
    exported(file)  # the only question need not be named
    table = pq.read_table(tmp_path / "pairs.parquet")
    even = table.set_column(2, "label_0", [[0.5, *table["label_0"].to_pylist()[1:]]])
    pq.write_table(even, tmp_path / "even.parquet")
    assert len(load_pairs(tmp_path / "pairs.parquet")) == 6
    assert len(load_pairs(tmp_path / "even.parquet")) == 5
    assert len(load_pairs(tmp_path / "even.parquet", soft_labels=True)) == 6
    run = train(sdxl_path, tmp_path / "pairs.parquet", tmp_path / "run")
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_equal_votes_are_a_tie(voted, tmp_path):
    file = tmp_path / "even.sqlite"
    files = voted().parent / "one" / "0.png", tmp_path / "two" / "0.png"
    session(file, [Comparison("g", "a fox", None, None, ("one", "two"), files)], votes=2, questions={"q": "Which?"})
    vote(file, {"a": taste(1), "b": taste(-1)})
    (row,) = exported(file, to="even.parquet")
    assert row["label_0"] == 0.5 and row["votes"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "has several questions: name one, --question general | appeal | alignment"),
        (["--question", "beauty"], "--question beauty is none of general, appeal, alignment"),
        (["--question", "general", "--voter", "nobody"], "--voter nobody is none of the voters: v0, v1, v2, v3, other"),
        (["--question", "general", "--to", "pairs.json"], "must end with .csv (votes) or .parquet"),
        (["--labels", "soft", "--to", "new.csv"], "--labels is of pairs"),
        (["--question", "general", "--to", "{votes}"], "must end with .csv"),
        (["--question", "general", "--to", "{there}"], "exists: name another file, or add --overwrite"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line(voted, tmp_path, capsys, flags, message):
    file, there = voted(), tmp_path / "there.parquet"
    there.write_bytes(b"mine")
    exported(file, *(flag.format(votes=file, there=there) for flag in flags), status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line
    assert there.read_bytes() == b"mine" and not (tmp_path / "pairs.parquet").exists()


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_an_image_that_is_not_what_people_saw_is_refused(voted, tmp_path, capsys, fault):
    file, image = voted(), tmp_path / "two" / "4.png"
    Image.new("RGB", (8, 8)).save(image) if fault == "changed" else image.unlink()
    exported(file, "--question", "general", status=2)
    said = capsys.readouterr().err
    assert str(image) in said and "put back the image that was voted on" in said
    assert not list(tmp_path.glob("*pairs*")) and not list(tmp_path.glob(".tmp*"))  # nothing half-written


def test_pairs_in_several_row_groups_keep_their_order(voted, monkeypatch):
    monkeypatch.setattr("dpo_fast.voting.export.GROUP_BYTES", 1)
    file = voted()
    rows = exported(file, "--question", "general")
    assert [row["caption"] for row in rows] == PROMPTS
    assert pq.ParquetFile(file.parent / "pairs.parquet").num_row_groups == len(PROMPTS)


def test_labels_are_of_votes_alone(voted):
    """Against a count by hand: of each pair the share of votes for its first image."""
    file = voted()
    by_hand = defaultdict(list)
    for row in exported(file, "--question", "alignment", to="votes.csv"):
        by_hand[row["prompt"]].append(float(row["label_0"]))
    rows = exported(file, "--question", "alignment", "--labels", "soft")
    assert [row["label_0"] for row in rows] == [pytest.approx(np.mean(by_hand[prompt])) for prompt in PROMPTS]
