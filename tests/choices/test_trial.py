"""Candidates that are wrong, crash, hang or take all memory are told apart; the others are proven all the same."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_fast.choices.trial import NO_TIME, Evidence, Limits, judge
from tests.helpers.runs import environment

PLAN = "tests.choices.planted"
LIMITS = Limits(seconds=20.0, memory_mib=2048.0)


def prove(plan: str, candidates: list[str], arguments: dict, limits: Limits) -> dict[str, str]:
    """The verdicts alone."""
    return judge(plan, None, candidates, arguments, limits).reasons


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


@pytest.mark.drawn(1)
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
from dpo_fast.choices.trial import Limits, judge
judge({PLAN!r}, None, ["hanging"], {{}}, Limits())
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
    seconds = {"plain": [1.0, 1.1], "right": [0.1, 0.2], "talking": [0.3, 0.4]}
    candidates = ["right", "wrong", "talking"]
    reasons = {"right": "", "wrong": "wrong: the sum is 4", "talking": ""}
    arguments = {"sum": 3, "seconds": seconds}
    found = judge(PLAN, "plain", candidates, arguments, LIMITS)
    assert found == Evidence(reasons, seconds, dict.fromkeys(seconds, 9.0)) and found.final
    for fault, limits, why, final in (
        (
            "timing crashes",
            LIMITS,
            "ended the process by SIGSEGV (not JSON)",
            True,
        ),  # the next start does not pay again
        ("timing hangs", Limits(seconds=4.0), "did not end within 4 s", False),
    ):
        found = judge(PLAN, "plain", candidates, arguments | {fault: True}, limits)
        out = {name: reason or f"{why} while the proven candidates were timed" for name, reason in reasons.items()}
        assert found == Evidence(out) and found.final == final


def test_the_seconds_that_a_proof_took_to_compile_outlive_its_process():
    found = judge(PLAN, "plain", ["compiling", "crashing", "right"], {}, LIMITS)
    assert found.first == {"plain": 9.0, "compiling": 60.0, "right": 9.0}


@pytest.mark.parametrize("candidates", [["crashing"], ["right", "crashing"], ["crashing", "right"], []])
def test_the_proven_are_timed_in_a_new_process_after_a_crash(candidates):
    found = judge(PLAN, "plain", candidates, {}, LIMITS)
    proven = [name for name in candidates if name == "right"]
    assert list(found.rounds) == (["plain", *proven] if proven else []) and found.final


def test_what_begins_is_told():
    told: list[str] = []
    judge(PLAN, "plain", ["right", "wrong", "talking"], {"sum": 3}, LIMITS, told.append)
    assert told == ["right", "wrong", "talking", "timing"]


def test_a_device_that_cannot_be_had_proves_nothing():
    found = judge(PLAN, "plain", ["right", "wrong"], {"exclusive": True}, LIMITS)
    why = "could not be proven: RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable"
    assert found == Evidence(dict.fromkeys(("right", "wrong"), why)) and not found.final


def test_time_is_limited_over_all_candidates():
    """No candidate is begun too late, and what has begun ends with the time."""
    late = judge(PLAN, "plain", ["right", "also right"], {}, Limits(20.0, all_seconds=0.0))
    assert late == Evidence(dict.fromkeys(("right", "also right"), NO_TIME)) and not late.final
    started = time.monotonic()
    found = judge(PLAN, "plain", ["right", "hanging", "also right"], {}, Limits(60.0, end_seconds=4.0))
    assert found == Evidence({"right": "", "hanging": NO_TIME, "also right": NO_TIME})
    assert not found.final and time.monotonic() - started < 50
