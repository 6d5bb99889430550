"""The fastest proven candidate, if it wins by more than times vary and saves more than its compilation costs."""

import json

import pytest

from dpo_fast.choices.decision import decide, merged
from dpo_fast.choices.trial import NO_TIME, Evidence

BASE = [1.00, 1.01, 1.02, 1.03, 1.04]


def scaled(*factors: float) -> list[float]:
    """Rounds as long as the baseline's, times factors that take turns."""
    return [factors[k % len(factors)] * value for k, value in enumerate(BASE)]


@pytest.mark.parametrize(
    ("reasons", "rounds", "expected"),
    [
        ({"a": "", "b": ""}, {"plain": BASE, "a": scaled(0.5), "b": scaled(0.4)}, "b"),
        ({"a": "", "b": "wrong: x"}, {"plain": BASE, "a": scaled(0.5), "b": scaled(0.4)}, "a"),
        ({"a": ""}, {"plain": BASE, "a": scaled(2.0)}, "plain"),
        ({"a": ""}, {"plain": BASE, "a": scaled(0.995)}, "plain"),  # not worth other bits
        ({"a": ""}, {"plain": BASE, "a": scaled(0.9, 1.1)}, "plain"),  # within the spread
        ({"a": ""}, {"plain": [1, 9, 1, 7, 1], "a": [0.8, 7, 0.8, 6, 0.8]}, "a"),  # disturbed alike
        ({"a": "ended the process by SIGSEGV"}, {"plain": BASE}, "plain"),
        ({"a": ""}, {}, "plain"),  # timing did not come to its end
        ({}, {"plain": BASE}, "plain"),
    ],
)
def test_what_is_chosen(reasons, rounds, expected):
    assert decide("ops", "plain", Evidence(reasons, rounds)).chosen == expected


def test_compiling_must_pay_within_the_run():
    """Half a second is saved a call, compiling takes a minute."""
    evidence = Evidence({"a": ""}, {"plain": BASE, "a": scaled(0.5)}, {"plain": 1.0, "a": 60.0})
    assert [decide("x", "plain", evidence, calls).chosen for calls in (10, 100, 130, 10_000)] == [
        *("plain", "plain", "a", "a")
    ]
    both = Evidence(
        {"a": "", "b": ""},
        {"plain": BASE, "a": scaled(0.5), "b": scaled(0.4)},
        {"plain": 1.0, "a": 60.0, "b": 600.0},
    )
    assert [decide("x", "plain", both, calls).chosen for calls in (200, 10_000)] == ["a", "b"]


def test_the_table_says_why():
    evidence = Evidence({"fast": "", "bad": "wrong: noise"}, {"plain": BASE, "fast": scaled(0.5)}, {"fast": 12.0})
    outcome = decide("ops", "plain", evidence)
    lines = str(outcome).splitlines()
    assert lines[0] == "ops" and lines[1].startswith("  plain") and "1020.000 ms" in lines[1]
    assert lines[2].startswith("* fast") and "proven" in lines[2] and "2.00 times as fast, first call 12 s" in lines[2]
    assert lines[3].split() == ["bad", "wrong:", "noise"]
    assert json.loads(json.dumps(outcome.as_json()))["chosen"] == "fast" and outcome.gain == 2.0


def test_all_machines_must_prove_and_the_slowest_counts():
    one = Evidence({"a": "", "b": ""}, {"plain": BASE, "a": scaled(0.5), "b": scaled(0.4)}, {"a": 1.0, "b": 2.0})
    other = Evidence({"a": "", "b": "wrong: x"}, {"plain": BASE, "a": scaled(0.8)}, {"a": 3.0})
    both = merged({"host 1": one, "host 2": other}, "plain")
    assert both.reasons == {"a": "", "b": "wrong: x (on host 2)"}
    assert both.rounds["plain"] == BASE and both.rounds["a"] == pytest.approx(scaled(0.8)) and both.first["a"] == 3.0
    assert decide("x", "plain", both).chosen == "a"
    assert merged({"only": one}, "plain") is one


def test_a_candidate_must_win_on_every_machine():
    """On the fast one it is no faster, and its times there are still below the slow one's."""
    slow = Evidence({"a": ""}, {"plain": [10 * value for value in BASE], "a": [5 * value for value in BASE]})
    fast = Evidence({"a": ""}, {"plain": BASE, "a": scaled(1.05)})
    both = merged({"slow": slow, "fast": fast}, "plain")
    assert both.rounds["plain"] == slow.rounds["plain"] and decide("x", "plain", both).chosen == "plain"
    assert decide("x", "plain", slow).chosen == "a"


@pytest.mark.parametrize(
    ("evidence", "final"),
    [
        (Evidence({"a": "", "b": "wrong: x"}, {"a": BASE}), True),
        (Evidence({"a": "did not end within 20 s"}), False),
        (Evidence({"a": "failed: RuntimeError: no kernel"}), True),
        (Evidence({"a": "failed: OutOfMemoryError: CUDA out of memory"}), False),
        (Evidence({"a": "failed: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED"}), False),
        (Evidence({"a": "took more than 300 MiB"}), False),
        (Evidence({"a": "ended the process by SIGKILL"}), False),
        (Evidence({"a": "ended the process by SIGSEGV"}), True),
        (Evidence({"a": "wrong: an input, or memory beside it, was written"}), True),
        (Evidence({"a": ""}), False),
        (Evidence({"a": "could not be proven: no process"}), False),
        (Evidence({"a": "", "b": NO_TIME}, {"a": BASE}), False),
    ],
)
def test_what_would_be_found_again(evidence, final):
    assert evidence.final == final
