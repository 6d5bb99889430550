"""Commands side by side: slots, logs, failures, and what an interruption does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_fast import jobs
from dpo_fast.jobs import Job, ending, last_words, run_jobs
from tests.helpers.runs import environment


def job(name: str, code: str, log: Path | None = None) -> Job:
    return Job(name, [sys.executable, "-c", code], log)


MEETS = """
import pathlib, time
here = pathlib.Path({folder!r})
(here / {name!r}).touch()
end = time.monotonic() + 120
while len(list(here.iterdir())) < {number}:
    assert time.monotonic() < end
    time.sleep(0.01)
"""


def test_as_many_run_at_once_as_there_are_slots(tmp_path):
    (tmp_path / "met").mkdir()
    folder = str(tmp_path / "met")
    several = [job(name, MEETS.format(folder=folder, name=name, number=3)) for name in "abc"]
    ended = []
    run_jobs(several, [{}] * 3, ended=lambda job, status: ended.append((job.name, status)))
    assert sorted(ended) == [("a", 0), ("b", 0), ("c", 0)]


def test_each_slot_has_its_environment_and_is_used_again(tmp_path):
    code = "import os, sys; print(os.environ['GPU']); sys.exit(int(sys.argv[-1] == 'x'))"
    several = [job(f"{number}", code, tmp_path / f"{number}.log") for number in range(5)]
    began: list[tuple[str, int]] = []
    ended: dict[str, int] = {}
    run_jobs(
        several,
        [{"GPU": "0"}, {"GPU": "1"}],
        started=lambda job, slot: began.append((job.name, slot)),
        ended=lambda job, status: ended.update({job.name: status}),
    )
    assert [name for name, _ in began] == [*"01234"] and ended == dict.fromkeys("01234", 0)
    assert {slot for _, slot in began} == {0, 1}
    for name, slot in began:
        assert (tmp_path / f"{name}.log").read_text() == f"{slot}\n"


def test_a_failure_stops_no_other_and_its_log_says_why(tmp_path):
    log = tmp_path / "bad.log"
    log.write_text("of an earlier attempt\n")
    bad = job("bad", "import sys; print('x\\ry', flush=True); sys.exit('dpo_fast: error: so it is')", log)
    killed = job("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path / "killed.log")
    ended: dict[str, int] = {}
    run_jobs([bad, killed, job("good", "")], [{}, {}], ended=lambda job, status: ended.update({job.name: status}))
    assert ended == {"bad": 1, "killed": -9, "good": 0}
    assert log.read_text().startswith("of an earlier attempt\nx")
    assert last_words(log) == "dpo_fast: error: so it is" and last_words(tmp_path / "killed.log") == ""
    assert last_words(tmp_path / "none.log") == ""
    assert [ending(status) for status in (2, -9, -99)] == [
        "ended with 2",
        "was ended by SIGKILL",
        "was ended by signal 99",
    ]


SAVES = """
import pathlib, signal, sys, time
home = pathlib.Path({folder!r})
def save(number, frame):
    (home / {name!r}).write_text(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)
(home / ("began-" + {name!r})).touch()
time.sleep(120)
"""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KeyboardInterrupt("SIGTERM"), OSError(28, "no space")])
def test_whatever_ends_the_call_lets_the_jobs_save(tmp_path, error):
    several = [job(name, SAVES.format(folder=str(tmp_path), name=name)) for name in "ab"]

    def waiting(running) -> None:
        if len(list(tmp_path.glob("began-*"))) == 2:
            raise error

    started = time.monotonic()
    with pytest.raises(type(error)):
        run_jobs([*several, job("never", MEETS)], [{}, {}], ended=lambda job, status: None, waiting=waiting)
    assert time.monotonic() - started < 100
    assert [(tmp_path / name).read_text() for name in "ab"] == ["SIGTERM"] * 2


def test_a_job_that_never_ends_is_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(jobs, "ENDING_SECONDS", 0.5)
    code = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    code += f"pathlib.Path({str(tmp_path / 'began')!r}).write_text(str(__import__('os').getpid())); time.sleep(120)"

    def waiting(running) -> None:
        if (tmp_path / "began").exists() and (tmp_path / "began").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job("a", code)], [{}, {}], ended=lambda job, status: None, waiting=waiting)
    assert "is killed" in capfd.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "began").read_text()), 0)


def test_one_slot_shares_the_terminal_and_several_have_sessions_of_their_own(tmp_path):
    code = "import os, pathlib; pathlib.Path({place!r}).write_text(str(os.getsid(0)))"
    for slots, own in (([{}], False), ([{}, {}], True)):
        place = tmp_path / f"{len(slots)}"
        run_jobs([job("a", code.format(place=str(place)))], slots, ended=lambda job, status: None)
        assert (int(place.read_text()) != os.getsid(0)) is own


def test_ctrl_c_reaches_the_only_job_once(tmp_path):
    """As a terminal sends it: to all processes of the group."""
    counts = tmp_path / "signals"
    child = (
        "import pathlib, signal, sys, time\n"
        f"place = pathlib.Path({str(counts)!r})\n"
        "def got(number, frame):\n    place.write_text(place.read_text() + 'x')\n"
        "signal.signal(signal.SIGINT, got); signal.signal(signal.SIGTERM, got)\n"
        "place.write_text('')\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end: time.sleep(0.05)\n"
    )
    parent = (
        "import sys\nfrom dpo_fast.jobs import Job, run_jobs\n"
        f"run_jobs([Job('a', [sys.executable, '-c', {child!r}])], [{{}}], ended=lambda job, status: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment(), start_new_session=True)
    end = time.monotonic() + 60
    while not counts.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    assert counts.read_text() == "x"
