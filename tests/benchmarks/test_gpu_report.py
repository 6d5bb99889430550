"""The report of a GPU: what fails, hangs or is cut off costs only itself, and every stage is there with its results."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu import outcomes, reading, running
from benchmarks.gpu.running import Stage
from benchmarks.gpu.stages import stages
from benchmarks.gpu_report import Gpu, Report
from benchmarks.step.cases import CASES

ROOT = Path(gpu_report.__file__).parents[1]
WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({'answer': 42}))"


def python(name: str, code: str, *words: str, **options: object) -> Stage:
    """A stage that runs a line of Python."""
    settings = {"share": 0.5, "read": reading.json_file} | options
    return Stage(name, ((sys.executable, "-c", code, *words),), **settings)


GOOD = python("good", WRITES, "{file}")


@pytest.fixture(autouse=True)
def short_stages(monkeypatch):
    """Stages of a second are worth beginning."""
    monkeypatch.setattr(gpu_report, "LEAST_SECONDS", 1.0)


def made(tmp_path: Path, chosen: list[Stage], seconds: float = 60.0) -> tuple[int, dict[str, dict]]:
    """The exit status of a report, and its stages."""
    (tmp_path / "work").mkdir()
    report = Report(tmp_path / "out", Gpu("NVIDIA H200", "570.1"), "cuda", commit="0123abcd")
    status = report.make(chosen, tmp_path / "work", seconds)
    [file] = (tmp_path / "out").glob("*.json")
    assert file.name.startswith("nvidia-h200-20")
    value = json.loads(file.read_text())
    assert value["driver"] == "570.1" and "torch" in value["versions"] and value["finished"]
    return status, value["stages"]


def gone(pid: int) -> bool:
    """Whether the process has ended (or waits as a zombie for whoever adopted it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_stage_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, capsys):
    bad = python("bad", "import sys; print('what went wrong'); sys.exit(3)")
    absent = replace(GOOD, name="absent", commands=(("/no/such/program",),))
    status, records = made(tmp_path, [bad, absent, GOOD])
    assert status == 1
    assert (records["bad"]["status"], records["bad"]["exit_status"]) == ("failed", 3)
    assert records["bad"]["log"][-1] == "what went wrong" and records["bad"]["results"] is None
    assert records["absent"]["status"] == "failed" and "No such file" in records["absent"]["log"][-1]
    assert records["good"]["status"] == "ok" and records["good"]["results"] == {"answer": 42}
    assert 0 < records["good"]["seconds"] < records["good"]["limit_seconds"]
    assert "2 failed, 1 ok: " in capsys.readouterr().out
    assert "what went wrong" in (tmp_path / "out" / "gpu_report.log").read_text()


def test_what_cannot_run_here_is_no_failure(tmp_path):
    status, records = made(tmp_path, [replace(GOOD, name="lacking", missing="it is not installed"), GOOD])
    assert status == 0
    assert records["lacking"]["status"] == "missing" and records["lacking"]["why"] == "it is not installed"


def test_a_stage_that_hangs_is_killed_with_its_children(tmp_path):
    """Also with those that left its process group; what it had written is kept and later stages run."""
    code = """
    import json, pathlib, subprocess, sys, time
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
    pathlib.Path(sys.argv[1]).write_text(json.dumps([child.pid for child in children]))
    time.sleep(600)
    """
    hanging = python("hanging", textwrap.dedent(code), "{file}", share=0.1)
    status, records = made(tmp_path, [hanging, GOOD], seconds=30.0)
    assert status == 1 and records["hanging"]["status"] == "timed out" and records["good"]["status"] == "ok"
    assert 1.0 < records["hanging"]["limit_seconds"] <= 3.0 <= records["hanging"]["seconds"] + 2.0
    children = records["hanging"]["results"]
    assert len(children) == 2 and all(map(gone, children))


def test_nothing_of_a_stage_outlives_it(tmp_path):
    code = """
    import json, pathlib, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path(sys.argv[1]).write_text(json.dumps(child.pid))
    """
    status, records = made(tmp_path, [python("leaving", textwrap.dedent(code), "{file}")])
    assert status == 0 and gone(records["leaving"]["results"])


def test_limits_follow_what_is_left_and_the_rest_is_not_reached(tmp_path):
    slow = python("slow", "import time; time.sleep(600)", share=0.5)
    chosen = [slow, replace(slow, name="all that is left", share=1.0), GOOD]
    status, records = made(tmp_path, chosen, seconds=4.0)
    limits = [records[stage.name].get("limit_seconds") for stage in chosen]
    assert status == 1 and 1.0 < limits[0] <= 2.0
    assert 0.0 < limits[1] <= 4.0 - limits[0]
    assert limits[2] is None and records["good"]["status"] == "not reached" and records["good"]["commands"]


CUT_OFF = """
import sys
from pathlib import Path
from benchmarks.gpu_report import Gpu, Report
from tests.benchmarks.test_gpu_report import GOOD, python
later = python("later", "import os, pathlib, sys, time; p = pathlib.Path(sys.argv[1]);"
               "p.write_text(str(os.getpid())); p.rename(p.with_suffix('.pid')); time.sleep(600)", "{file}")
out = Path(sys.argv[1])
(out / "work").mkdir()
sys.exit(Report(out, Gpu("a gpu"), "cuda").make([GOOD, later, GOOD], out / "work", 600.0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_cut_off_in_the_middle_it_keeps_what_was_done(tmp_path, number):
    """The parent kills the report during its second stage. After SIGKILL nobody can clear up, so the test does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    report = subprocess.Popen([sys.executable, "-c", CUT_OFF, str(tmp_path)], env=environment)
    waiting = tmp_path / "work" / "later.pid"
    deadline = time.monotonic() + 60
    while not waiting.exists():
        assert report.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    report.send_signal(number)
    status, stage = report.wait(30), int(waiting.read_text())
    [file] = tmp_path.glob("*.json")
    value = json.loads(file.read_text())
    assert not value["finished"] and value["stages"]["good"]["results"] == {"answer": 42}
    if number == signal.SIGKILL:
        os.kill(stage, signal.SIGKILL)
        assert status == -number and value["stages"]["later"]["status"] == "running"
    else:
        assert status == 128 + number and value["stages"]["later"]["status"] == "interrupted"
        assert gone(stage)


def test_a_second_call_keeps_what_the_first_measured(tmp_path, monkeypatch):
    """Of stages that it does not run or reach; of another commit nothing is kept."""
    other = replace(GOOD, name="other")
    status, records = made(tmp_path, [GOOD, other])
    assert status == 0 and list(records) == ["good", "other"]
    (tmp_path / "work").rename(tmp_path / "work of the first")
    status, records = made(tmp_path, [python("bad", "raise SystemExit(3)", share=1.0), GOOD], seconds=1e-9)
    assert status == 1 and records["good"]["results"] == {"answer": 42} and records["bad"]["status"] == "not reached"
    (tmp_path / "work").rename(tmp_path / "work of the second")
    status, records = made(tmp_path, [replace(GOOD, commands=((sys.executable, "-c", "raise SystemExit(3)"),))])
    assert status == 1 and records["good"]["status"] == "failed" and records["other"]["results"] == {"answer": 42}
    (tmp_path / "work").rename(tmp_path / "work of the third")
    monkeypatch.setattr(gpu_report, "commit_of", lambda given: {"commit": "another", "changed": False})
    status, records = made(tmp_path, [GOOD])
    assert status == 0 and list(records) == ["good"]


def test_the_file_has_no_paths_and_no_numbers_that_json_lacks(tmp_path):
    value = {
        "command": ["x.py", "--json", f"{tempfile.gettempdir()}/a/b.json", f"{ROOT}/c"],
        "ms": float("nan"),
        "n": 1,
    }
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    _, records = made(tmp_path, [python("paths", code, "{file}", json.dumps(value))])
    results = records["paths"]["results"]
    assert results == {"command": ["x.py", "--json", "TMP/a/b.json", "./c"], "ms": None, "n": 1}


def test_half_a_file_is_no_result(tmp_path):
    """A stage that was killed while it wrote."""
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"rows\": [1, ')"
    status, records = made(tmp_path, [python("half", code, "{file}"), GOOD])
    assert records["half"]["results"] is None and "unreadable" in records["half"]
    assert records["good"]["status"] == "ok" and status == 0


def test_outcomes_of_tests_are_kept_when_pytest_is_killed(tmp_path):
    """Counts, names and messages of failures, and the test that hung."""
    source = """
    import os, pytest
    def test_good(): pass
    @pytest.mark.parametrize("n", [1, 2])
    def test_bad(n): assert n == 3, f"{n} is not three"
    @pytest.mark.skip
    def test_skipped(): pass
    @pytest.fixture
    def broken(): raise RuntimeError("no fixture")
    def test_error(broken): pass
    def test_ending(): os.kill(os.getpid(), 9)
    """
    (tmp_path / "test_some.py").write_text(textwrap.dedent(source))
    file = tmp_path / "lines"
    words = ("-p", "benchmarks.gpu.outcomes", "--outcomes", str(file), "-q", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *words, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    killed = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    found = outcomes.summary(file)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 1)
    assert list(found["failures"]) == [f"test_some.py::test_{n}" for n in ("bad[1]", "bad[2]", "error")]
    assert "1 is not three" in found["failures"]["test_some.py::test_bad[1]"]
    assert found["unfinished"] == ["test_some.py::test_ending"]


@pytest.mark.parametrize(("tool", "summary", "errors"), [("memcheck", "ERROR", 2), ("racecheck", "RACECHECK", 1)])
def test_compute_sanitizer_where_it_is_installed(tmp_path, monkeypatch, tool, summary, errors):
    """A stand-in on the PATH: it gets its tool and the tests, with every tensor an allocation of its own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    words = "hazards displayed (1 errors, 0 warnings)" if tool == "racecheck" else "errors"
    script = f'echo "========= {summary} SUMMARY: {errors} {words}"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"; exit 1'
    (programs / "compute-sanitizer").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    [stage] = [stage for stage in stages("cuda", tmp_path, "90") if stage.name == f"sanitizer {tool}"]
    assert stage.missing is None
    status, records = made(tmp_path, [stage])
    assert status == 1 and records[stage.name]["results"] == {"errors": errors, "tests": None}
    last = records[stage.name]["log"][-1]
    assert last.startswith(f"1 --tool {tool} --target-processes all --error-exitcode 1 ") and "-n 0" in last


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_stages(tmp_path, device):
    """Programs that exist, the real cases with SDXL's LoRA first, and a share for each."""
    every = stages(device, tmp_path, "90")
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names) and names[:5] == ["build", "environment", "tests", "proof", "kernels"]
    mini = "mini-" if device == "cpu" else ""
    steps = [name.removeprefix("step ") for name in names if name.startswith("step ")]
    assert steps[0] == f"{mini}sdxl-1024-lora"
    assert sorted(steps) == sorted(name for name in CASES if CASES[name].mini == (device == "cpu"))
    assert {f"sanitizer {tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")} < set(names)
    for stage in every:
        assert 0 < stage.share <= 1
        for command in running.command_lines(stage, tmp_path / "file.json"):
            scripts = [word for word in command if word.endswith(".py")]
            assert scripts or "-m" in command
            assert all((ROOT / script).exists() for script in scripts), command
            devices = [after for word, after in pairwise(command) if word == "--device"]
            assert devices in ([], [device])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "kernel"], "--stages 'kernel' is not one of: build, environment"),
        (["--minutes", "0"], "--minutes (0) must be above 0"),
        (["--write"], "--write is for the report of a GPU"),
    ],
)
def test_what_cannot_be_reported_is_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path / "out"), "--device", "cpu", *words])
    with pytest.raises(SystemExit) as refused:
        gpu_report.main()
    assert refused.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_command_on_a_cpu(tmp_path):
    """Real stages, chosen by name, as a process of its own."""
    chosen = ["environment", "kernels", "sanitizer memcheck", "attention", "triton tests"]
    command = [sys.executable, "benchmarks/gpu_report.py", str(tmp_path), "--device", "cpu", "--stages", *chosen]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    [file] = tmp_path.glob("cpu-*.json")
    records = json.loads(file.read_text())["stages"]
    assert list(records) == [name for name in records if name in chosen] and len(records) == len(chosen)
    assert records["environment"]["results"]["gpu"] == "none usable"
    assert {row["implementation"] for row in records["kernels"]["results"]["rows"]} >= {"eager"}
    assert records["attention"]["results"]["rows"] and records["triton tests"]["results"]["failed"] == 0
    assert "TMP" not in str(ROOT) and str(ROOT) not in file.read_text()
