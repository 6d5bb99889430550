"""The fastest proven candidate, if it wins by more than times vary."""

import json

import pytest

from dpo_fast.choices import decide

BASE = [1.00, 1.01, 1.02, 1.03, 1.04]


def chosen(reasons: dict[str, str], seconds: dict[str, list[float]]) -> str:
    return decide("ops", "plain", reasons, seconds).chosen


def scaled(factor: float) -> list[float]:
    return [factor * value for value in BASE]


@pytest.mark.parametrize(
    ("reasons", "seconds", "expected"),
    [
        ({"a": "", "b": ""}, {"plain": BASE, "a": scaled(0.5), "b": scaled(0.4)}, "b"),
        ({"a": "", "b": "wrong: x"}, {"plain": BASE, "a": scaled(0.5), "b": scaled(0.4)}, "a"),
        ({"a": ""}, {"plain": BASE, "a": scaled(2.0)}, "plain"),
        ({"a": ""}, {"plain": BASE, "a": scaled(0.99)}, "plain"),  # within the spread
        ({"a": "ended the process by SIGSEGV"}, {"plain": BASE}, "plain"),
        ({"a": ""}, {}, "plain"),  # timing did not come to its end
        ({}, {"plain": BASE}, "plain"),
    ],
)
def test_what_is_chosen(reasons, seconds, expected):
    assert chosen(reasons, seconds) == expected


def test_the_table_says_why():
    outcome = decide("ops", "plain", {"fast": "", "bad": "wrong: noise"}, {"plain": BASE, "fast": scaled(0.5)})
    lines = str(outcome).splitlines()
    assert lines[0] == "ops" and lines[1].startswith("  plain") and "1020.000 ms" in lines[1]
    assert lines[2].startswith("* fast") and "proven" in lines[2] and "2.00 times as fast" in lines[2]
    assert lines[3].split() == ["bad", "wrong:", "noise"]
    assert json.loads(json.dumps(outcome.as_json()))["chosen"] == "fast"
