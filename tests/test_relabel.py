"""The relabelling command: any layout to Pick-a-Pic's columns with a scorer's labels, resumed, by rank, trained on."""

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dpo_fast import relabel, scorers
from dpo_fast.data import build_index
from dpo_fast.presets import PRESETS
from dpo_fast.relabeling import pair_scores
from dpo_fast.store import locked
from dpo_fast.train import main as train
from tests.faults.commands import contents
from tests.helpers import fake_scorers
from tests.helpers.pairs import (
    as_image_feature,
    open_pairs,
    pickapic,
    preference,
    write_arrow_file,
    write_jsonl,
    write_table,
)
from tests.helpers.runs import SAMPLE, environment, flags_for

N = 14


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """The fake scorers, small parts, and the file that gets a line for every image that is scored."""
    path = tmp_path / "scored.tsv"
    path.touch()
    monkeypatch.setattr(pair_scores, "PART_ROWS", 4)
    monkeypatch.setattr(scorers, "MODULE_OF", {**scorers.MODULE_OF, **dict.fromkeys(fake_scorers.FORMULAS, "fake")})
    monkeypatch.setattr(scorers, "load_scorer", lambda name, device, **_: fake_scorers.load(name, path))
    monkeypatch.setattr(scorers, "facts", lambda name, device, **_: {"scorer": name})
    monkeypatch.setattr(scorers, "provenance", lambda name, device, **_: {"revisions": {f"owner/{name}": "a" * 40}})
    return path


def random_pairs(**options) -> dict[str, list]:
    """Pick-a-Pic's columns of new images, of which no scorer finds two alike, as by chance 1 in 50,000 is."""
    while True:
        table = pickapic(seed=random.randrange(2**31), **options)
        if all((values[:, 0] != values[:, 1]).all() for values in (scored(table, "red"), scored(table, "left"))):
            return table


def columns() -> dict[str, list]:
    """Pairs of two sizes; row 3 is a tie of people, row 5 has the same image twice."""
    wide, high = random_pairs(n=N, size=(40, 24)), random_pairs(n=N, size=(24, 40), kind="PNG")
    table = {name: [(high if row % 3 == 0 else wide)[name][row] for row in range(N)] for name in wide}
    table["jpg_1"][5] = table["jpg_0"][5]
    table["label_0"][3] = 0.5
    return table


def flags(pairs: Path, out: Path, *more: object) -> list[str]:
    return [str(word) for word in ("--dataset_name", pairs, "--output", out, "--batch_size", 3, *more)]


def scored(table: dict[str, list], name: str) -> np.ndarray:
    """What a fake scorer gives: fp64 [n, 2]."""
    formula = fake_scorers.FORMULAS[name]
    sides = ("jpg_0", "jpg_1") if "jpg_0" in table else ("chosen", "rejected")
    captions = table["caption" if "caption" in table else "prompt"]

    def pixels(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)

    rows = zip(*(table[side] for side in sides), captions, strict=True)
    return np.array([[formula(pixels(image), caption) for image in images] for *images, caption in rows])


def read(out: Path) -> tuple[dict[str, list], dict]:
    return pq.read_table(out).to_pydict(), json.loads(out.with_suffix(".json").read_text())


def test_one_scorer(tmp_path, log, capfd):
    table = columns()
    pairs = write_table(tmp_path / "pairs.parquet", table)
    assert relabel.main(flags(pairs, tmp_path / "out.parquet", "--scorer", "red")) == 0
    found, report = read(tmp_path / "out.parquet")
    values = scored(table, "red")
    margin = values[:, 0] - values[:, 1]
    assert report["scorers"]["red"]["made_by"] == {"revisions": {"owner/red": "a" * 40}}
    assert found["jpg_0"] == table["jpg_0"] and found["jpg_1"] == table["jpg_1"]  # the very bytes
    assert found["caption"] == table["caption"] and found["label_human"] == table["label_0"]
    assert [found["score_0_red"], found["score_1_red"]] == values.T.tolist()
    assert found["label_0"] == (0.5 + 0.5 * np.sign(margin)).tolist() and found["label_0"][5] == 0.5
    assert list(found) == ["jpg_0", "jpg_1", "caption", "label_0", "label_human", "score_0_red", "score_1_red"]

    human = np.array(table["label_0"])
    both = (human != 0.5) & (margin != 0)
    agree = int(((margin > 0) == (human > 0.5))[both].sum())
    assert report["agreement"]["agree"] == agree and report["agreement"]["disagree"] == N - 2 - agree
    ties = {name: count for name, count in report["agreement"].items() if name.startswith("tied")}
    assert ties == {"tied_by_people": 1, "tied_by_scorer": 1, "tied_by_both": 0}
    assert (report["rows"], report["bad_rows"], report["scored"], report["kept"], report["ties"]) == (N, 0, N, N, 1)
    winners = np.where(human > 0.5, values[:, 0], values[:, 1])[human != 0.5]
    losers = np.where(human > 0.5, values[:, 1], values[:, 0])[human != 0.5]
    assert report["scorers"]["red"]["mean_human_winner"] == pytest.approx(winners.mean())
    assert report["scorers"]["red"]["mean_human_loser"] == pytest.approx(losers.mean())
    out = capfd.readouterr().out
    assert f"{agree} of {N - 2} pairs" in out and "14 pairs scored; kept 14 (100.0%)" in out
    # the image that is in its pair twice is scored once, every other one once
    assert len(log.read_text().splitlines()) == 2 * N - 1


def test_weights_temperature_and_filter(tmp_path, log, capfd):
    table = columns()
    pairs = write_table(tmp_path / "pairs.parquet", table)
    more = ["--scorer", "red:1", "--scorer", "left:-0.5", "--temperature", 0.8, "--keep_fraction", 0.5]
    assert relabel.main(flags(pairs, tmp_path / "out.parquet", *more)) == 0
    found, report = read(tmp_path / "out.parquet")
    margin, values = 0.0, {}
    for name, weight in (("red", 1.0), ("left", -0.5)):
        values[name] = scored(table, name)
        difference = values[name][:, 0] - values[name][:, 1]
        margin = margin + weight * difference / np.sqrt((difference**2).mean())
    kept = np.sort(np.argsort(-np.abs(margin))[: N // 2])
    # margins up to 1.5 sqrt(14), 16 ulp of them at a slope of 1 / 3.2, and 4 of a label's 1/2 and half of a tanh
    np.testing.assert_allclose(found["label_0"], 1 / (1 + np.exp(-margin[kept] / 0.8)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(found["score_1_left"], values["left"][kept, 1], rtol=1e-12)
    assert found["caption"] == [table["caption"][row] for row in kept]
    assert (report["kept"], report["dropped"], report["kept_fraction"]) == (7, 7, 0.5)
    assert report["smallest_kept_margin"] == pytest.approx(np.abs(margin[kept]).min())
    assert "agreement of those kept" in capfd.readouterr().out


LAYOUTS = {
    "arrow": (lambda t, c: write_arrow_file(t / "a.arrow", c), []),
    "image features": (lambda t, c: as_image_feature(c).save_to_disk(t / "saved") or t / "saved", []),
    "chosen and rejected": (lambda t, c: write_table(t / "a.parquet", preference(c)), []),
    "folder with JSONL": (lambda t, c: write_jsonl(t / "set", c), []),
    "own columns": (
        lambda t, c: write_table(t / "a.parquet", dict(zip("abcd", c.values(), strict=True))),
        ["--image_columns", "a", "b", "--label_column", "c", "--caption_column", "d"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_the_trainer_reads(layout, tmp_path, log):
    make, more = LAYOUTS[layout]
    table = random_pairs(n=6, size=24)
    pairs = make(tmp_path, table)
    assert relabel.main(flags(pairs, tmp_path / "out.parquet", "--scorer", "red", *more)) == 0
    found, _ = read(tmp_path / "out.parquet")
    if "chosen" in layout or "JSONL" in layout:
        chosen = preference(table)
        assert found["jpg_0"] == chosen["chosen"] and found["jpg_1"] == chosen["rejected"]
        assert found["label_human"] == [1.0] * 6
        values = scored(chosen, "red")
    else:
        assert found["jpg_0"] == table["jpg_0"] and found["label_human"] == table["label_0"]
        values = scored(table, "red")
    assert [found["score_0_red"], found["score_1_red"]] == values.T.tolist()
    assert found["label_0"] == (values[:, 0] > values[:, 1]).astype(float).tolist()


def test_pairs_without_labels(tmp_path, log, capfd):
    table = columns()
    human = table.pop("label_0")
    pairs = write_table(tmp_path / "pairs.parquet", table)
    assert relabel.main(flags(pairs, tmp_path / "out.parquet", "--scorer", "red")) == 2
    assert "no label column label_0" in capfd.readouterr().err
    assert relabel.main(flags(pairs, tmp_path / "out.parquet", "--scorer", "red", "--unlabelled")) == 0
    found, report = read(tmp_path / "out.parquet")
    assert len(human) == len(found["label_0"]) and found["label_human"] == [None] * N
    assert report["agreement"] is None and "mean_human_winner" not in report["scorers"]["red"]
    assert "agreement" not in capfd.readouterr().out


# ---- what was scored is not scored again -------------------------------------------------------------------------


def test_the_same_command_again_repeats_nothing(tmp_path, log, capfd):
    pairs = write_table(tmp_path / "pairs.parquet", columns())
    out = tmp_path / "out.parquet"
    assert relabel.main(flags(pairs, out, "--scorer", "red")) == 0
    before, report = out.read_bytes(), out.with_suffix(".json").read_text()
    out.with_suffix(".json").unlink()  # as if killed between the two
    log.write_text("")
    capfd.readouterr()
    assert relabel.main(flags(pairs, out, "--scorer", "red")) == 0
    assert "is there already" in capfd.readouterr().err
    assert out.read_bytes() == before and out.with_suffix(".json").read_text() == report and log.read_text() == ""

    # other flags: another file, or --overwrite; scores are taken from where they are
    other = flags(pairs, out, "--scorer", "red", "--keep_fraction", 0.5)
    assert relabel.main(other) == 2
    assert "--overwrite" in capfd.readouterr().err and out.read_bytes() == before
    assert relabel.main([*other, "--overwrite"]) == 0 and log.read_text() == ""
    assert len(read(out)[0]["caption"]) == 7

    # a further scorer: that one only
    more = ["--scorer", "left", "--scorer", "red", "--scores_dir", out.with_suffix(".scores")]
    assert relabel.main(flags(pairs, tmp_path / "both.parquet", *more)) == 0
    assert {line.split("\t")[0] for line in log.read_text().splitlines()} == {"left"}
    assert relabel.main(flags(pairs, tmp_path / "fresh.parquet", "--scorer", "left", "--scorer", "red")) == 0
    assert read(tmp_path / "both.parquet") == read(tmp_path / "fresh.parquet")


def test_scores_of_other_pairs_are_not_taken(tmp_path, log, capfd):
    pairs = write_table(tmp_path / "pairs.parquet", columns())
    out = tmp_path / "out.parquet"
    assert relabel.main(flags(pairs, out, "--scorer", "red")) == 0
    before, scored = read(out), log.read_text().count("\n")
    write_table(pairs, columns())  # other images under the same name
    log.write_text("")
    assert relabel.main(flags(pairs, out, "--scorer", "red", "--overwrite")) == 0
    assert read(out) != before and log.read_text().count("\n") == scored
    assert relabel.main(flags(pairs, tmp_path / "fresh.parquet", "--scorer", "red")) == 0
    assert read(out) == read(tmp_path / "fresh.parquet")


def test_scores_of_other_weights_are_not_taken(tmp_path, log, capfd, monkeypatch):
    pairs, out = write_table(tmp_path / "pairs.parquet", columns()), tmp_path / "out.parquet"
    command = flags(pairs, out, "--scorer", "red", "--scorer", "left")
    assert relabel.main(command) == 0
    before = read(out)
    log.write_text("")
    monkeypatch.setattr(scorers, "facts", lambda name, device, **_: {"scorer": name, "files": f"new {name == 'red'}"})
    monkeypatch.setitem(fake_scorers.FORMULAS, "red", lambda pixels, caption: pixels[..., 2].mean())
    capfd.readouterr()
    assert relabel.main(command) == 2
    assert "by other files of the scorers or with other flags (scorers)" in capfd.readouterr().err
    assert read(out) == before and log.read_text() == ""
    monkeypatch.setattr(
        scorers, "facts", lambda name, device, **_: {"scorer": name, **({"files": "new"} if name == "red" else {})}
    )
    assert relabel.main([*command, "--overwrite"]) == 0
    assert {line.split("\t")[0] for line in log.read_text().splitlines()} == {"red"}  # left is as it was
    found = read(out)[0]
    table = pq.read_table(pairs).to_pydict()
    assert [found["score_0_red"], found["score_1_red"]] == scored(table, "red").T.tolist()
    log.write_text("")
    assert relabel.main(command) == 0 and log.read_text() == ""


def test_edited_captions_and_images_are_scored_anew(tmp_path, log, capfd):
    """Of a folder with JSONL, where the files of the images say nothing of the captions."""
    table = random_pairs(n=N, size=24)
    folder, out = write_jsonl(tmp_path / "set", table), tmp_path / "out.parquet"
    command = flags(folder, out, "--scorer", "left")
    assert relabel.main(command) == 0
    first = read(out)[0]
    (file,) = folder.glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[5]["prompt"] += "!"
    file.write_text("\n".join(map(json.dumps, records)))
    (folder / records[9]["chosen"]).write_bytes((folder / records[9]["rejected"]).read_bytes())
    log.write_text("")
    capfd.readouterr()
    assert relabel.main(command) == 2
    assert "(stamp, captions and labels)" in capfd.readouterr().err
    assert relabel.main([*command, "--overwrite"]) == 0
    again = {line.split("\t")[1].rstrip("!") for line in log.read_text().splitlines()}
    assert again == {table["caption"][row] for row in (4, 5, 6, 7, 8, 9, 10, 11)}  # the two parts
    shutil.rmtree(tmp_path / "out.scores")
    found = read(out)
    assert relabel.main([*command, "--overwrite"]) == 0 and read(out) == found
    assert found[0]["caption"][5] == first["caption"][5] + "!" and found[0]["label_0"][9] == 0.5


@pytest.mark.parametrize("layout", ["parquet", "JSONL"])
def test_outputs_of_one_set_share_scores(layout, tmp_path, log):
    """Which depend neither on the labels nor on how many rows are read."""
    table = random_pairs(n=N, size=24, labels=[1.0] * N)
    table["other"] = [None, *(0.5 for _ in range(N - 1))]
    if layout == "parquet":
        pairs = write_table(tmp_path / "pairs.parquet", table)
    else:
        pairs = write_jsonl(tmp_path / "set", table)
    scores = ["--scorer", "red", "--scores_dir", tmp_path / "scores"]

    def scored_rows(name: str, *more: object) -> set[int]:
        log.write_text("")
        assert relabel.main(flags(pairs, tmp_path / f"{name}.parquet", *scores, *more)) == 0
        return {table["caption"].index(line.split("\t")[1]) for line in log.read_text().splitlines()}

    assert scored_rows("trial", "--max_train_samples", 3) == {0, 1, 2}
    assert scored_rows("all") == set(range(N))
    assert scored_rows("again", "--max_train_samples", 6) == set()
    assert scored_rows("unlabelled", "--unlabelled") == set()
    if layout == "parquet":
        assert scored_rows("others", "--label_column", "other", "--max_bad_fraction", 1) == set()
    damaged = next((tmp_path / "scores").glob("red-*/shard-0-00001.json"))  # of rows 3 to 6; the first has 0 to 2
    damaged.write_text(damaged.read_text()[:-20])
    assert scored_rows("all", "--overwrite") == set(range(8))  # the two parts that lost rows


def test_rows_that_this_run_leaves_out_keep_their_scores(tmp_path, log):
    table = random_pairs(n=4, size=24)
    table["a"], table["b"] = [None, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, None]
    pairs = write_table(tmp_path / "pairs.parquet", table)
    common = ["--scorer", "red", "--scores_dir", tmp_path / "scores", "--max_bad_fraction", 1, "--overwrite"]
    for label, number in (("a", 6), ("b", 6), ("a", 0), ("b", 0)):
        log.write_text("")
        assert relabel.main(flags(pairs, tmp_path / "out.parquet", *common, "--label_column", label)) == 0
        assert log.read_text().count("\n") == number


def test_a_second_process_waits_and_finds_the_scores_there(tmp_path, log, capfd):
    pairs = write_table(tmp_path / "pairs.parquet", columns())
    scores = ["--scorer", "red", "--scores_dir", tmp_path / "scores"]
    assert relabel.main(flags(pairs, tmp_path / "one.parquet", *scores)) == 0
    log.write_text("")
    capfd.readouterr()
    with ThreadPoolExecutor(1) as pool, locked(tmp_path / "scores"):
        second = pool.submit(relabel.main, flags(pairs, tmp_path / "two.parquet", *scores))
        said = ""
        while "is being written by process" not in said:
            time.sleep(0.01)
            said += capfd.readouterr().err
            assert not second.done(), said
        assert "waiting until it is done" in said
    assert second.result() == 0 and log.read_text() == ""


def test_an_interruption_changes_no_file(tmp_path, log, capfd, monkeypatch):
    pairs = write_table(tmp_path / "pairs.parquet", random_pairs(n=N, size=24))
    both = ["--scorer", "red", "--scorer", "left"]
    assert relabel.main(flags(pairs, tmp_path / "whole.parquet", *both)) == 0
    load, calls = scorers.load_scorer, iter(())

    def stopping(name: str, device: object, **rest: object) -> scorers.Scorer:
        def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            if next(calls, None) == "stop":
                raise KeyboardInterrupt
            return load(name, device).score(images, prompts)

        return scorers.Scorer(score)

    monkeypatch.setattr(scorers, "load_scorer", stopping)
    for before in (3, 2, 5):
        calls = iter([*range(before), "stop"])
        assert relabel.main(flags(pairs, tmp_path / "stopped.parquet", *both)) == 130
        (tmp_path / "stopped.scores" / ".tmp-12345678-bad_rows.jsonl").write_text("half")  # as a kill leaves it
    assert relabel.main(flags(pairs, tmp_path / "stopped.parquet", *both)) == 0
    assert contents(tmp_path / "stopped.scores") == contents(tmp_path / "whole.scores")


@pytest.mark.faults
@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path, log, seed):
    table = random_pairs(n=64, size=24)
    pairs = write_table(tmp_path / "pairs.parquet", table)
    both = ["--scorer", "red", "--scorer", "left", "--cache_dir", tmp_path / "hf"]

    row_of = {pair_scores._key(row, "", caption).hex(): row for row, caption in enumerate(table["caption"])}

    def kept() -> dict[str, set[int]]:
        """Scorer -> the rows whose scores are on the disk, in shards and logs."""
        rows = {"red": set(), "left": set()}
        for file in (tmp_path / "killed.scores").glob("*-*/shard-*"):
            if file.suffix in (".json", ".log"):
                with suppress(FileNotFoundError):  # renamed meanwhile
                    text = file.read_text()
                    rows[file.parent.name.partition("-")[0]] |= {row_of[key] for key in row_of if key in text}
        return rows

    out, chance, survived = tmp_path / "killed.parquet", random.Random(seed), 0
    for kill in range(4):
        before, part_log = kept(), tmp_path / f"log-{kill}"
        target = sum(map(len, before.values())) + chance.randint(0, 20)
        process = fake_scorers.started(4, part_log, flags(pairs, out, *both))
        while process.is_alive() and sum(map(len, kept().values())) <= target:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        survived += sum(len(kept()[name] - before[name]) for name in before)
        # no image of a part that was whole is scored again
        again = {line.split("\t")[1] for line in part_log.read_text().splitlines()}
        parts = [range(first, first + 4) for first in range(0, 64, 4)]
        whole = [part for part in parts if all(before[name].issuperset(part) for name in before)]
        assert again.isdisjoint(table["caption"][row] for part in whole for row in part)
    assert survived >= 4
    assert not out.exists()
    assert relabel.main([str(word) for word in flags(pairs, out, *both)]) == 0
    assert log.read_text().count("\n") < 2 * 2 * 64
    assert relabel.main([str(word) for word in flags(pairs, tmp_path / "peace.parquet", *both)]) == 0
    assert out.read_bytes() == (tmp_path / "peace.parquet").read_bytes()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_give_the_same_file_as_one(tmp_path, log):
    pairs = write_table(tmp_path / "pairs.parquet", columns())
    more = ["--scorer", "red", "--scorer", "left", "--temperature", 1, "--cache_dir", tmp_path / "hf"]
    assert relabel.main(flags(pairs, tmp_path / "one.parquet", *more)) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "tests.helpers.fake_scorers", "4", str(tmp_path / "two.tsv")]
    command = [sys.executable, *launcher, *module, *flags(pairs, tmp_path / "two.parquet", *more)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stderr and done.stdout.count("14 pairs scored") == 1
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    once, twice = ((tmp_path / name).read_text().splitlines() for name in ("scored.tsv", "two.tsv"))
    assert sorted(once) == sorted(twice)  # each image by one of the processes


@pytest.mark.exhaustive
@pytest.mark.slow
def test_what_one_process_cannot_load_ends_all_in_one_line(tmp_path):
    pairs, out = write_table(tmp_path / "pairs.parquet", columns()), tmp_path / "out.parquet"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "tests.helpers.fake_scorers", "4", str(tmp_path / "log.tsv")]
    more = ["--scorer", "not everywhere", "--cache_dir", tmp_path / "hf"]
    command = [sys.executable, *launcher, *module, *flags(pairs, out, *more)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("dpo_fast")]
    assert done.returncode != 0 and line.startswith("dpo_fast: error: scorer not everywhere has no files here")
    assert not (tmp_path / "out.scores").exists()


# ---- bad rows and bad input --------------------------------------------------------------------------------------


def test_rows_that_do_not_decode_are_left_out_and_listed(tmp_path, log, capfd):
    """Of 1100 rows some are not looked at before the scoring; an empty caption is seen at once."""
    n = 1100
    few = random_pairs(n=10, size=8)
    table = {name: [values[row % 10] for row in range(n)] for name, values in few.items()}
    looked_at = set(torch.linspace(0, n - 1, 1000, dtype=torch.float64).round().long().tolist())
    late = next(row for row in range(100, n) if row not in looked_at)
    table["jpg_1"][late] = table["jpg_1"][late][:100]
    pairs, out = write_table(tmp_path / "pairs.parquet", table), tmp_path / "out.parquet"
    strict = flags(pairs, out, "--scorer", "red", "--max_bad_fraction", 0.0001)
    for _ in range(2):  # when it is met, and when it is known
        assert relabel.main(strict) == 2
        assert f"row {late}: jpg_1 cannot be decoded" in capfd.readouterr().err and not out.exists()
    shutil.rmtree(tmp_path / "out.scores")
    log.write_text("")

    table["caption"][50] = " "
    write_table(pairs, table)
    assert relabel.main(strict) == 2
    assert "row 50: caption is empty" in capfd.readouterr().err and log.read_text() == "" and not out.exists()
    assert relabel.main(flags(pairs, out, "--scorer", "red")) == 0
    found, report = read(out)
    listed = [json.loads(line) for line in (tmp_path / "out.scores" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(line["row"], line["column"]) for line in listed] == [(50, "caption"), (late, "jpg_1")]
    assert report["bad_rows"] == 2 and len(found["caption"]) == n - 2 == report["scored"]


BAD = {
    "no scorer": (["--scorer"], "no scorer is named"),
    "unknown scorer": (["--scorer", "beauty"], "there is no scorer 'beauty'; choose from"),
    "no weight": (["--scorer", "red:heavy"], "--scorer red:heavy must be NAME or NAME:WEIGHT"),
    "weight 0": (["--scorer", "red:0"], "a number other than 0"),
    "twice": (["--scorer", "red", "--scorer", "red:2"], "given twice"),
    "temperature": (["--scorer", "red", "--temperature", "0"], "--temperature (0.0) must be greater than 0"),
    "fraction": (["--scorer", "red", "--keep_fraction", "1.5"], "--keep_fraction (1.5) must be in (0, 1]"),
    "two filters": (["--scorer", "red", "--keep_fraction", "0.5", "--min_margin", "1"], "exclude each other"),
    "not parquet": (["--scorer", "red", "--output", "labels.csv"], "--output (labels.csv) must end in .parquet"),
    "unknown flag": (["--scorer", "red", "--temprature", "1"], "did you mean --temperature?"),
    "no such data": (["--scorer", "red", "--dataset_name", "./nowhere"], "'./nowhere' does not exist"),
    "split": (["--scorer", "red", "--dataset_split_name", "best"], "has no split 'best'"),
    "two ways": (["--scorer", "red", "--unlabelled", "--label_column", "label_0"], "exclude each other"),
    "caption": (["--scorer", "faithfulness"], "none of the shapes world's"),
    "broken": (["--scorer", "broken"], "scorer broken gives nan for row"),
    "says nothing": (["--scorer", "nothing"], "scorer nothing gives both images of every pair the same score"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_with_the_remedy(name, tmp_path, log, capfd, monkeypatch):
    more, said = BAD[name]
    pairs = write_table(tmp_path / "pairs.parquet", columns())
    monkeypatch.chdir(tmp_path)
    if more == ["--scorer"]:
        more = []
    if name == "caption":
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert relabel.main(flags(pairs, tmp_path / "out.parquet", *more)) == 2
    captured = capfd.readouterr()
    (line,) = [text for text in captured.err.replace("\r", "\n").splitlines() if text.startswith("dpo_fast: error: ")]
    assert said in line and "Traceback" not in captured.err
    assert not list(tmp_path.glob("*out*.parquet")) and not (tmp_path / "out.json").exists()
    if name not in ("broken", "says nothing"):
        assert log.read_text() == "" and not (tmp_path / "out.scores").exists()


def test_nothing_is_overwritten_silently(tmp_path, log, capfd):
    pairs = write_table(tmp_path / "set" / "pairs.parquet", columns())
    thesis = tmp_path / "thesis.parquet"
    thesis.write_text("ten years of work")
    assert relabel.main(flags(pairs, thesis, "--scorer", "red")) == 2
    assert "thesis.parquet exists" in capfd.readouterr().err and thesis.read_text() == "ten years of work"
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    assert relabel.main(flags(pairs, tmp_path / "notes.parquet", "--scorer", "red")) == 2
    assert "notes.json exists" in capfd.readouterr().err and notes.read_text() == "{}"
    for data, out in ((pairs, pairs), (pairs.parent, pairs.parent / "new.parquet")):
        assert relabel.main(flags(data, out, "--scorer", "red", "--overwrite")) == 2
        assert "is among the pairs that are read" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert relabel.main(flags(pairs, tmp_path / "file" / "out.parquet", "--scorer", "red")) == 2
    assert "cannot be written" in capfd.readouterr().err
    assert log.read_text() == ""


# ---- into the trainer, and the real and the built-in pairs -------------------------------------------------------


def test_training_reads_the_labels(sdxl_path, tmp_path, log):
    table = random_pairs(n=12, size=72)
    pairs = write_table(tmp_path / "pairs.parquet", table)
    values = scored(table, "red")
    margin = values[:, 0] - values[:, 1]
    for more, soft in (([], False), (["--temperature", 0.3], True)):
        out = tmp_path / f"soft-{soft}.parquet"
        assert relabel.main(flags(pairs, out, "--scorer", "red", *more)) == 0
        index = build_index(open_pairs(out), seed=0, soft_labels=soft, progress=False).train
        assert index.chosen.tolist() == (margin < 0).astype(int).tolist()
        confidence = 1 / (1 + np.exp(-np.abs(margin) / 0.3)) if soft else np.ones(12)
        np.testing.assert_allclose(index.label, confidence, rtol=1e-6)
        words = flags_for(sdxl_path, out, tmp_path / f"run-{soft}", *(["--soft_labels"] if soft else []))
        assert train(words) == 0
        summary = json.loads((tmp_path / f"run-{soft}" / "summary.json").read_text())
        assert summary["steps"] == 4 and summary["loss_first"] == pytest.approx(0.6931472)


def test_the_real_sample(tmp_path, log):
    if not SAMPLE.is_file():
        pytest.skip(f"the real pairs are not here: {SAMPLE}")
    out = tmp_path / "out.parquet"
    assert relabel.main(flags(SAMPLE, out, "--scorer", "red")) == 0
    table = pq.read_table(SAMPLE).to_pydict()
    found, report = read(out)
    values = scored(table, "red")
    assert [found["score_0_red"], found["score_1_red"]] == values.T.tolist()
    assert found["jpg_0"] == table["jpg_0"] and found["label_human"] == table["label_0"]
    assert report["scored"] == 7 and report["agreement"]["tied_by_people"] + report["agreement"]["tied_by_both"] == 1


def test_the_built_in_pairs_by_the_built_in_scorers(tmp_path, monkeypatch):
    pairs, out = PRESETS["shapes"]["dataset_name"], tmp_path / "out.parquet"
    more = ["--label_column", "label_faithfulness", "--max_train_samples", 40, "--scorer", "faithfulness"]
    assert relabel.main(flags(pairs, out, *more, "--scorer", "appeal")) == 0
    table = pq.read_table(pairs).slice(0, 40).to_pydict()
    found, report = read(out)
    for name, tie in (("faithfulness", 0.05), ("appeal", 0.01)):
        difference = np.array(found[f"score_0_{name}"]) - np.array(found[f"score_1_{name}"])
        labels = np.where(np.abs(difference) < tie, 0.5, (difference > 0).astype(float))
        assert labels.tolist() == table[f"label_{name}"]
    decided = 40 - table["label_faithfulness"].count(0.5)
    assert report["scorers"]["faithfulness"]["agreement"]["agree"] == decided
