"""Sweeps: which flags are lists, what is run and what is not run again, and the table and plot at the end."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_fast import sweep
from dpo_fast.errors import BadInput
from dpo_fast.plot import COLOURS, Point, Series, against
from dpo_fast.statistics import interval95
from dpo_fast.train import main as train
from dpo_fast.training import checkpoint
from tests.helpers.runs import assert_same_state, environment, flags_for
from tests.helpers.runs import train as train_alone


@pytest.fixture
def runs(monkeypatch):
    """The commands of the runs that were started, which run in this process."""
    started = []

    def run(command):
        started.append(command)
        return train(command)

    monkeypatch.setattr(sweep, "_train", run)
    return started


def flags(model: Path, pairs: Path, tmp_path: Path, *more: object) -> list[str]:
    where = ["--latent_cache_dir", tmp_path / "cache"]
    return flags_for(model, pairs, tmp_path / "sweep", *where, *more)


def test_lists_of_numbers_and_choices_are_swept_and_the_rest_is_passed_on():
    argv = ["--beta_dpo", "500,2000", "--objective=dpo,ipo", "--tuning", "full", "--report-to", "a,b"]
    argv += ["--learning-rate", "1e-5,3e-5", "--validation_prompts", "a cat, a dog", "--hflip"]
    swept, rest = sweep.split(argv)
    assert swept == {
        "beta_dpo": ["500", "2000"],
        "objective": ["dpo", "ipo"],
        "learning_rate": ["1e-5", "3e-5"],
    }
    assert rest == ["--tuning", "full", "--report-to", "a,b", "--validation_prompts", "a cat, a dog", "--hflip"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--beta_dpo", "500"], "nothing is swept"),
        (["--beta_dpo", "500,500"], "once"),
        (["--beta_dpo", "500,2", "--beta_dpo", "1,3"], "once"),
    ],
)
def test_lists_that_are_refused(argv, said):
    with pytest.raises(BadInput, match=said):
        sweep.split(argv)


def test_a_bad_value_is_found_before_the_first_run(sdxl_path, pairs, tmp_path, runs, capfd):
    argv = flags(sdxl_path, pairs, tmp_path, "--beta_dpo", "500,-1")
    assert sweep.main(argv) == 2
    assert "--beta_dpo (-1.0)" in capfd.readouterr().err
    assert runs == [] and not (tmp_path / "sweep").exists()


def test_every_combination_is_run_once_and_reported(sdxl_path, pairs, tmp_path, runs, capfd):
    more = ["--beta_dpo", "500,5000", "--learning_rate", "1e-4,1e-3", "--cached_reference", 1]
    argv = flags(sdxl_path, pairs, tmp_path, *more)
    assert sweep.main(argv) == 0
    out = capfd.readouterr()
    assert out.err.count("8 computed now") == 1 and out.err.count(" 0 computed now") == 3
    names = [f"beta_dpo={beta}-learning_rate={rate}" for beta in (500, 5000) for rate in ("1e-4", "1e-3")]
    assert [Path(command[-3]).name for command in runs] == names
    header, *table = out.out.splitlines()[:5]
    assert header.split() == ["beta_dpo", "learning_rate", "implicit_accuracy", "loss_last", "seconds"]
    assert [line.split()[:2] for line in table] == [[b, r] for b in ("500", "5000") for r in ("1e-4", "1e-3")]
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["loss_last"] for row in record["runs"]] == [
        json.loads((tmp_path / "sweep" / name / "summary.json").read_text())["loss_last"] for name in names
    ]
    assert len({row["loss_last"] for row in record["runs"]}) > 1
    assert Image.open(tmp_path / "sweep" / "sweep.png").size == (960, 600)

    # again: nothing is repeated; a value more: that alone
    runs.clear()
    assert sweep.main(argv) == 0 and runs == []
    argv[argv.index("500,5000")] = "500,5000,2000"
    assert sweep.main(argv) == 0
    names = [f"beta_dpo=2000-learning_rate={rate}" for rate in ("1e-4", "1e-3")]
    assert [Path(command[-3]).name for command in runs] == names

    # with other flags for all it would be another sweep
    capfd.readouterr()
    assert sweep.main([*argv, "--hflip"]) == 2
    error = capfd.readouterr().err
    assert "holds a sweep of other settings" in error and "--hflip now" in error


def test_an_interrupted_run_is_gone_on_with(sdxl_path, pairs, tmp_path, runs, monkeypatch):
    more = ["--learning_rate", "1e-3,2e-3", "--checkpointing_steps", 2]
    argv = flags(sdxl_path, pairs, tmp_path, *more)
    assert sweep.main(argv) == 0
    first, second = (tmp_path / "sweep" / f"learning_rate={rate}" for rate in ("1e-3", "2e-3"))
    (first / "summary.json").unlink()  # as if killed after step 2
    shutil.rmtree(first / "checkpoint-4")
    (second / "summary.json").unlink()  # as if killed while the result was written
    runs.clear()
    assert sweep.main(argv) == 0
    assert [command[-2:] for command in runs] == [["--resume_from_checkpoint", "auto"]] * 2
    for folder, rate in ((first, 1e-3), (second, 2e-3)):
        where = ["--latent_cache_dir", tmp_path / "cache", "--learning_rate", rate]
        assert_same_state(train_alone(sdxl_path, pairs, tmp_path / f"{rate}", *where), folder)


@pytest.mark.faults
def test_an_interrupted_sweep_lets_its_run_save(sdxl_path, pairs, tmp_path):
    argv = flags(sdxl_path, pairs, tmp_path, "--learning_rate", "1e-3,2e-3", "--max_train_steps", 100000)
    command = [sys.executable, "-m", "dpo_fast.sweep", *argv]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "sweep" / "learning_rate=1e-3"
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert checkpoint.all_of(run), error


def test_a_run_that_fails_is_told_and_the_others_are_run(sdxl_path, pairs, tmp_path, runs, capfd):
    argv = flags(sdxl_path, pairs, tmp_path, "--rank", "2,4", "--lora_targets", "to_q")
    (tmp_path / "sweep" / "rank=2").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"flags": [], "swept": {}, "runs": []}))
    assert sweep.main(argv) == 2  # another sweep's folder
    shutil.rmtree(tmp_path / "sweep")
    argv = flags(sdxl_path, pairs, tmp_path, "--resolution", "60,64")
    assert sweep.main(argv) == 2
    out = capfd.readouterr().out
    assert [("ended with 2" in line) for line in out.splitlines()[1:3]] == [True, False]
    assert len(runs) == 2


def test_the_interval_of_a_share_is_wilsons():
    """Against the table in L. D. Brown et al., Statistical Science 16 (2001): n = 10, 5 of them; n = 20, none."""
    assert interval95(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert interval95(0.0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)


# ---- the plot --------------------------------------------------------------------------------------------------


def centre(picture: Image.Image, colour: str) -> np.ndarray:
    """(x, y) of every pixel of a colour, mean."""
    pixels = np.asarray(picture)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero((pixels == wanted).all(-1))
    return np.array([columns.mean(), rows.mean()])


def one_point(point: Point, others: list[Point], **more) -> np.ndarray:
    """Where a point is drawn that is a series of its own, among others."""
    ticks = [(p.x, f"{p.x:g}") for p in (point, *others)]
    series = [Series("one", [point]), *(Series(f"{i}", [p]) for i, p in enumerate(others))]
    return centre(against(series, ticks, title="t", x_label="x", **more), COLOURS[0])


def test_points_stand_where_they_belong():
    ends = [Point(500.0, 0.4), Point(5000.0, 0.7)]
    aside = 8 * (0 - 1)  # of the first of three series, in pixels
    left, right = 90 + 0.05 * 840, 90 + 0.95 * 840
    at = one_point(Point(2750.0, 0.55), ends)[0] - aside
    at_log = one_point(Point(1581.139, 0.55), ends, log_x=True)[0] - aside
    legend = 4  # the square in the legend is of the same colour and pulls the mean to the right
    assert left < at and at == pytest.approx(at_log, abs=1) and at < right
    higher, lower = (one_point(Point(1000.0, y), ends)[1] for y in (0.6, 0.5))
    assert higher < lower - legend


def test_intervals_are_drawn_and_everything_stays_on_the_sheet():
    heights = np.random.random(6).tolist()
    points = [Point(10.0 ** (i - 6), y, y - 0.3, y + 0.3) for i, y in enumerate(heights)]
    picture = against([Series("", points)], [(p.x, "x") for p in points], title="t", x_label="x", log_x=True, even=0.5)
    pixels = np.asarray(picture).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()
    blue = (np.asarray(picture) == [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    without = against([Series("", [Point(p.x, p.y) for p in points])], [(1.0, "x")], title="t", x_label="x", log_x=True)
    plain = (np.asarray(without) == [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    assert blue.sum() > plain.sum() / 2 and blue.any(1).sum() > 200
