"""Sweeps: which flags are lists, what is run and what is not run again, and the table and plot at the end."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_fast import sweep
from dpo_fast.checksums import read_signed_json
from dpo_fast.errors import BadInput
from dpo_fast.jobs import Job
from dpo_fast.plot import COLOURS, Point, Series, against
from dpo_fast.statistics import interval95
from dpo_fast.train import main as train
from dpo_fast.training import checkpoint
from tests.helpers.runs import assert_same_state, environment, flags_for
from tests.helpers.runs import train as train_alone


@pytest.fixture
def runs(monkeypatch):
    """The commands of the runs that were started, which run in this process."""
    begun = []

    def run(jobs, slots, *, started, ended, waiting):
        for job in jobs:
            begun.append(job.command[3:])
            started(job, 0)
            ended(job, train(job.command[3:]))

    monkeypatch.setattr(sweep, "run_jobs", run)
    return begun


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
    lines = out.out.splitlines()
    header, *table = lines[lines.index("Training") + 1 :][:5]
    assert header.split() == ["run", "beta_dpo", "learning_rate", "steps", "pairs", "loss", "accuracy", "seconds"]
    swept = [[b, r] for b in ("500", "5000") for r in ("0.0001", "0.001")]
    assert [line.split()[1:3] for line in table] == swept
    assert [line for line in lines if re.match(r"\d  \w+=", line)] == [
        f"{k}  {name}" for k, name in enumerate(names, 1)
    ]
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


@pytest.mark.exhaustive
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
    argv = flags(sdxl_path, pairs, tmp_path, "--learning_rate", "1e-3,2e-3", "--no-prove", "--max_train_steps", 100000)
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
    out, err = capfd.readouterr()
    assert "resolution=60: it ended with 2" in out and "run 1 of 2 ended with 2; the others go on" in err
    assert len(runs) == 2
    assert [row["status"] for row in read_signed_json(tmp_path / "sweep" / "sweep.json", "x")["runs"]] == [2, 0]


# ---- several at once -------------------------------------------------------------------------------------------


def test_flags_of_the_sweep_itself():
    argv = ["--beta_dpo", "1,2", "--gpus", "0", "2", "--parallel=3", "--seed", "1", "--gpus=5,7"]
    assert sweep.own_flags(argv) == (3, [0, 2, 5, 7], ["--beta_dpo", "1,2", "--seed", "1"])
    assert sweep.own_flags(["--seed", "1"]) == (None, [], ["--seed", "1"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--parallel", "0"], "--parallel (0)"),
        (["--parallel"], "--parallel ()"),
        (["--parallel", "-2"], "--parallel (-2)"),
        (["--parallel", "two"], "--parallel (two)"),
        (["--gpus"], "--gpus ()"),
        (["--gpus", "0", "00"], "--gpus (0 00)"),
        (["--gpus", "0,x"], "--gpus (0 x)"),
        (["--gpus", "--parallel", "2"], "--gpus ()"),
        (["--gpus", "9"], "--gpus 9: there is no such GPU"),
    ],
)
def test_flags_of_the_sweep_that_are_refused(sdxl_path, pairs, tmp_path, runs, capfd, argv, said):
    assert sweep.main(flags(sdxl_path, pairs, tmp_path, "--beta_dpo", "500,2000", *argv)) == 2
    assert said in capfd.readouterr().err
    assert runs == [] and not (tmp_path / "sweep").exists()


def test_every_run_at_once_gets_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sweep, "_cores", lambda: 8)

    def gpus(*given) -> list[str | None]:
        return [slot.get("CUDA_VISIBLE_DEVICES") for slot in sweep.slots_of(*given)]

    assert sweep.slots_of(None, []) == sweep.slots_of(1, []) == [{}]
    assert gpus(None, [0, 2]) == ["0", "2"] and gpus(4, [2, 0]) == ["2", "0", "2", "0"]
    assert gpus(2, []) == ["0", "1"] and gpus(5, []) == ["0", "1", "2", "0", "1"]
    assert sweep.slots_of(None, [1]) == [{"CUDA_VISIBLE_DEVICES": "1"}]
    assert [slot["OMP_NUM_THREADS"] for slot in sweep.slots_of(3, [])] == ["2"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-ab,7")  # numbers count what this process sees
    assert gpus(None, [1, 2]) == ["GPU-ab", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [{**slot} for slot in sweep.slots_of(2, [])] == [{"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}] * 2
    with pytest.raises(BadInput, match="this machine has none: leave it out, or give --parallel N"):
        sweep.slots_of(None, [0])


STANDS_FOR_TRAINING = """
import json, os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
home, rate = pathlib.Path(flags["--output_dir"]), float(flags["--learning_rate"])
home.mkdir(parents=True, exist_ok=True)
(home / "config.yaml").write_text(f"learning_rate: {rate}\\nseed: 1\\nmax_train_steps: 4\\npairs_per_step: 2\\n")
(home / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 0.7}) + "\\n")
(home.parent / f"began-{rate}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
end = time.monotonic() + 120
while len(list(home.parent.glob("began-*"))) < int(os.environ["AT_ONCE"]):  # the others must run at the same time
    assert time.monotonic() < end
    time.sleep(0.01)
if rate == float(os.environ.get("FAILS", "0")):
    print("dpo_fast: error: no such luck", file=sys.stderr)
    sys.exit(int(os.environ["STATUS"]))
print("trained", rate)
summary = {"steps": 4, "loss_last": rate, "seconds": 1.0, "implicit_accuracy": 0.6}
(home / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs in processes of their own, which do nothing but write what a training writes."""
    script = tmp_path / "quick.py"
    script.write_text(STANDS_FOR_TRAINING)

    def job(name, command, log):
        named = [word for word in command[3:] if word != "--no-cache"]
        return Job(name, [sys.executable, str(script), *named], log)

    monkeypatch.setattr(sweep, "Job", job)
    monkeypatch.setenv("AT_ONCE", "1")


@pytest.mark.usefixtures("quick")
def test_runs_at_once_are_what_runs_in_turn_are(sdxl_path, pairs, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AT_ONCE", "3")
    rates = [0.001, 0.002, 0.003, 0.004]
    argv = flags(sdxl_path, pairs, tmp_path, "--learning_rate", ",".join(map(str, rates)))
    assert sweep.main([*argv, "--parallel", "3"]) == 0
    out, err = capfd.readouterr()
    home = tmp_path / "sweep"
    record = read_signed_json(home / "sweep.json", "x")["runs"]
    assert [row["loss_last"] for row in record] == rates and {row["status"] for row in record} == {0}
    for number, rate in enumerate(rates, start=1):
        assert (home / f"learning_rate={rate}.log").read_text() == f"trained {rate}\n"
        assert f"run {number} of 4: learning_rate={rate}" in err and f"run {number} of 4 is done" in err
    shown = re.findall(r"^learning_rate=(\S+) +(\S+) .*0\.600", out, re.M)
    assert shown == [(f"{rate}", f"{rate}") for rate in rates] and "Missing" not in out
    # the same command, with fewer at once, repeats nothing
    (home / "learning_rate=0.003" / "summary.json").unlink()
    shutil.rmtree(home / "learning_rate=0.004")
    monkeypatch.setenv("AT_ONCE", "1")
    assert sweep.main(argv) == 0
    err = capfd.readouterr().err
    assert [line for line in err.splitlines() if "of 4:" in line] == [
        "dpo_fast: run 3 of 4: learning_rate=0.003",
        "dpo_fast: run 4 of 4: learning_rate=0.004",
    ]
    assert read_signed_json(home / "sweep.json", "x")["runs"] == record


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status, exits", [("2", 2), ("1", 1), ("130", 1)])
def test_a_run_that_fails_stops_no_other(sdxl_path, pairs, tmp_path, monkeypatch, capfd, status, exits):
    monkeypatch.setenv("AT_ONCE", "2")
    monkeypatch.setenv("FAILS", "0.001")
    monkeypatch.setenv("STATUS", status)
    argv = flags(sdxl_path, pairs, tmp_path, "--learning_rate", "0.001,0.002,0.003", "--parallel", 2)
    assert sweep.main(argv) == exits
    out, err = capfd.readouterr()
    log = tmp_path / "sweep" / "learning_rate=0.001.log"
    assert f"run 1 of 3 ended with {status}: dpo_fast: error: no such luck ({log}); the others go on" in err
    assert [row["status"] for row in read_signed_json(tmp_path / "sweep" / "sweep.json", "x")["runs"]] == [
        int(status),
        0,
        0,
    ]
    assert f"learning_rate=0.001: it ended with {status}" in out
    monkeypatch.delenv("FAILS")
    assert sweep.main(argv) == 0


@pytest.mark.usefixtures("quick")
def test_a_sweep_of_nothing_but_failures_ends_with_its_table(sdxl_path, pairs, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAILS", "0.001")
    monkeypatch.setenv("STATUS", "2")
    argv = flags(sdxl_path, pairs, tmp_path, "--learning_rate", "0.001,1e-3")
    assert sweep.main(argv) == 2
    assert capfd.readouterr().out.count("it ended with 2") == 2


def test_the_progress_of_runs_at_once(tmp_path):
    states = [sweep._state(step, steps) for step, steps in ((0, 4), (3, 4), (4, 4), (7, 0))]
    assert states == ["preparing", "3/4", "ending", "7/unknown"]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_lets_all_its_runs_save(sdxl_path, pairs, tmp_path, number):
    argv = flags(
        sdxl_path, pairs, tmp_path, "--learning_rate", "1e-3,2e-3,3e-3", "--no-prove", "--max_train_steps", 100000
    )
    command = [sys.executable, "-m", "dpo_fast.sweep", *argv, "--parallel", "2"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    homes = [tmp_path / "sweep" / f"learning_rate={rate}" for rate in ("1e-3", "2e-3")]
    end = time.monotonic() + 600
    while not all((home / "metrics.jsonl").exists() and (home / "metrics.jsonl").stat().st_size for home in homes):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)  # to it alone
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert all(checkpoint.all_of(home) for home in homes), error
    assert not (tmp_path / "sweep" / "learning_rate=3e-3" / "config.yaml").exists()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_real_runs_at_once_give_the_weights_of_runs_in_turn(sdxl_path, pairs, tmp_path):
    argv = flags(sdxl_path, pairs, tmp_path, "--learning_rate", "1e-3,2e-3", "--parallel", 2)
    assert sweep.main(argv) == 0
    for rate in ("1e-3", "2e-3"):
        where = ["--latent_cache_dir", tmp_path / "cache", "--learning_rate", rate]
        alone = train_alone(sdxl_path, pairs, tmp_path / rate, *where)
        assert_same_state(alone, tmp_path / "sweep" / f"learning_rate={rate}")


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
