"""Candidates that are wrong, crash, hang or take all memory are told apart; the others are proven all the same."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_fast.choices import Limits, prove, times
from tests.helpers.runs import environment

PLAN = "tests.choices.planted"
LIMITS = Limits(seconds=20.0, memory_mib=2048.0)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="by signals and process groups")


def test_each_candidate_has_its_verdict():
    candidates = [
        "right",
        "wrong",
        "crashing",
        "elsewhere",
        "raising",
        "leaving",
        "leaving well",
        "talking",
        "also right",
    ]
    assert prove(PLAN, candidates, {"sum": 3}, LIMITS) == {
        "right": "",
        "wrong": "wrong: the sum is 4",
        "crashing": "ended the process by SIGSEGV",
        "elsewhere": "cannot be used: needs another machine",
        "raising": "failed: ValueError: no\nkernel",
        "leaving": "ended with status 3",
        "leaving well": "ended with status 0",
        "talking": "",
        "also right": "",
    }


@pytest.mark.parametrize("name", ["hanging", "spinning"])
def test_a_hang_ends_at_its_limit_and_leaves_no_process(name):
    started = time.monotonic()
    found = prove(PLAN, [name, "right"], {}, Limits(seconds=4.0))
    assert found == {name: "did not end within 4 s", "right": ""}
    assert time.monotonic() - started < 60


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="real-time signals")
def test_a_signal_without_a_name_is_told(monkeypatch):
    found = prove(PLAN, ["signed", "right"], {}, LIMITS)
    assert found == {"signed": f"ended the process by signal {signal.SIGRTMIN + 1}", "right": ""}


def test_a_process_that_does_not_end_is_ended():
    started = time.monotonic()
    assert prove(PLAN, ["ending late"], {}, Limits(seconds=4.0)) == {"ending late": ""}
    assert time.monotonic() - started < 60


def test_it_ends_with_its_parent(tmp_path):
    script = f"""
from dpo_fast.choices import Limits, prove
prove({PLAN!r}, ["hanging"], {{}}, Limits())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment())
    try:
        children: list[str] = []
        for _ in range(600):
            file = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
            if not file.exists():
                pytest.skip("children are listed in /proc only")
            if children := file.read_text().split():
                break
            time.sleep(0.1)
        time.sleep(1.0)  # it has begun
    finally:
        parent.kill()
        parent.wait()
    for _ in range(300):
        if not Path(f"/proc/{children[0]}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_has_a_limit():
    assert prove(PLAN, ["hungry", "right"], {}, Limits(20.0, memory_mib=300.0)) == {
        "hungry": "took more than 300 MiB",
        "right": "",
    }


def test_a_process_that_cannot_start_proves_nothing(monkeypatch):
    for program, why in (("false", "ended with status 1"), ("true", "the process ended before its first answer")):
        monkeypatch.setattr(sys, "executable", f"/bin/{program}")
        found = prove(PLAN, ["right", "wrong"], {}, LIMITS)
        assert found == dict.fromkeys(("right", "wrong"), f"could not be proven: {why}")


def test_times_are_of_all_or_of_none():
    seconds = {"right": [0.1, 0.2], "slow": [0.3, 0.4]}
    assert times(PLAN, ["right", "slow"], {"seconds": seconds}, LIMITS) == seconds
    assert times(PLAN, ["right", "crashing"], {"seconds": seconds}, LIMITS) == {}
    assert times(PLAN, ["right", "hanging"], {"seconds": seconds}, Limits(seconds=4.0)) == {}
