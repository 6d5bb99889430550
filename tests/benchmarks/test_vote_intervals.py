"""The simulated voters: true rates against drawn votes, the parts' tables and files, and each of the other methods."""

import json

import numpy as np
import pytest

from benchmarks.vote_intervals import (
    METHODS,
    WORLDS,
    World,
    chances_of,
    constant_for,
    draw,
    draw_table,
    held,
    main,
    majority,
    truth,
)
from dpo_fast.statistics import Interval
from dpo_fast.votes.intervals import rates
from tests.helpers.seeds import SIGMAS


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_the_true_rates_are_those_of_many_votes(seed, world):
    generator = np.random.default_rng(seed)
    constant = constant_for(0.7, 0, world, 5)
    by_majority, by_votes = truth(constant, world, 5)
    assert by_majority == pytest.approx(0.7, abs=1e-9)
    found = []
    for _ in range(150):  # of other voters each, who share a world only in their tastes' spread
        second, prompt, voter = draw(constant, world, 40, 40, generator)
        found.append([of.value for of in rates(second, prompt, prompt, voter)[:2]])
    errors = np.std(found, 0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, 0) - [by_majority, by_votes]) < SIGMAS * errors).all()


def test_majorities_of_independent_votes_by_hand():
    win, tie = np.array([0.7]), np.array([0.0])
    assert majority(win, tie, 5)[0] == pytest.approx(
        sum(c * 0.7**k * 0.3 ** (5 - k) for k, c in ((3, 10), (4, 5), (5, 1)))
    )
    assert majority(np.array([0.3]), np.array([0.4]), 4)[0] == pytest.approx(0.5)
    assert majority(np.array([0.2]), np.array([0.5]), 1)[0] == pytest.approx(0.2 + 0.25)


def test_a_voter_votes_once_on_a_prompt_and_busy_ones_more_often(seed):
    generator = np.random.default_rng(seed)
    for world in (WORLDS[1], WORLDS[2]):
        second, prompt, voter = draw(0.0, world, 200, 20, generator)
        assert len({*zip(prompt.tolist(), voter.tolist(), strict=True)}) == len(second) == 1000
        loads = np.bincount(voter)
        assert (loads.max() > 2.5 * np.median(loads)) == world.busy


def test_strengths_are_drawn_as_they_are_meant(seed):
    world = World("plain", 0.4, 0.4, 0.3)
    table = draw_table(world, 300, 300, np.random.default_rng(seed))
    shares = table.counts() / table.counts().sum(1, keepdims=True)
    assert shares == pytest.approx(chances_of(world), abs=0.1)


def test_held_counts_both_ends():
    found = held([Interval(0.5, 0.4, 0.6), Interval(0.5, 0.5, 0.7), Interval(0.5, 0.41, 0.45)], 0.4)
    assert found.share == pytest.approx(1 / 3) and found.width == pytest.approx((0.2 + 0.2 + 0.04) / 3)


def test_the_command_prints_tables_and_writes_its_numbers(tmp_path, capsys):
    main(["--part", "methods", "--sets", "2", "--json", str(tmp_path / "out.json")])
    shown = capsys.readouterr().out
    (part,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert part["sets"] == 2 and len(part["rows"]) == 24
    assert all(0 <= row[method]["share"] <= 1 for row in part["rows"] for method in METHODS)
    assert shown.count("\n|") == 26 and "crossed bootstrap" in shown
    with pytest.raises(SystemExit):
        main(["--sets", "0"])
