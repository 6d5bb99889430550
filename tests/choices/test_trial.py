"""Candidates that are wrong, crash, hang or take all memory are told apart; the others are proven all the same."""

import sys
import time

import pytest

from dpo_fast.choices import Limits, prove, times

PLAN = "tests.choices.planted"
LIMITS = Limits(seconds=20.0, memory_mib=2048.0)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="by signals and process groups")


def test_each_candidate_has_its_verdict():
    candidates = ["right", "wrong", "crashing", "elsewhere", "raising", "leaving", "talking", "also right"]
    assert prove(PLAN, candidates, {"sum": 3}, LIMITS) == {
        "right": "",
        "wrong": "wrong: the sum is 4",
        "crashing": "ended the process by SIGSEGV",
        "elsewhere": "cannot be used: needs another machine",
        "raising": "failed: ValueError: no\nkernel",
        "leaving": "ended with status 3",
        "talking": "",
        "also right": "",
    }


@pytest.mark.parametrize("name", ["hanging", "spinning"])
def test_a_hang_ends_at_its_limit_and_leaves_no_process(name):
    started = time.monotonic()
    found = prove(PLAN, [name, "right"], {}, Limits(seconds=1.5))
    assert found == {name: "did not end within 1.5 s", "right": ""}
    assert time.monotonic() - started < 60


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_has_a_limit():
    assert prove(PLAN, ["hungry", "right"], {}, Limits(20.0, memory_mib=300.0)) == {
        "hungry": "took more than 300 MiB",
        "right": "",
    }


def test_a_process_that_cannot_start_proves_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = prove(PLAN, ["right", "wrong"], {}, LIMITS)
    assert found == dict.fromkeys(("right", "wrong"), "could not be proven: ended with status 1")


def test_times_are_of_all_or_of_none():
    seconds = {"right": [0.1, 0.2], "slow": [0.3, 0.4]}
    assert times(PLAN, ["right", "slow"], {"seconds": seconds}, LIMITS) == seconds
    assert times(PLAN, ["right", "crashing"], {"seconds": seconds}, LIMITS) == {}
    assert times(PLAN, ["right", "hanging"], {"seconds": seconds}, Limits(seconds=1.5)) == {}
