"""Who sees what next: everything evenly, nothing twice, both orders."""

import random

import numpy as np
import pytest

from dpo_fast.votes.assignment import BLOCK, Assignment, Picked


def fill(assignment: Assignment, voters: int, showings: int) -> list[list[Picked]]:
    """Each voter sees so many, in turn."""
    seen: list[list[Picked]] = [[] for _ in range(voters)]
    for _ in range(showings):
        for voter in range(voters):
            picked = assignment.pick(voter, len(seen[voter]), voter % len(assignment.taken))
            if picked is not None:
                seen[voter].append(picked)
    return seen


@pytest.mark.parametrize(("voters", "wanted"), [(5, 5), (8, 3), (20, 5)])
def test_all_votes_and_no_more_are_given_out_and_nobody_sees_anything_twice(seed, voters, wanted):
    comparisons, questions = 12, 3
    assignment = Assignment(["pair"] * comparisons, questions, wanted, random.Random(seed))
    seen = fill(assignment, voters, comparisons * questions + 1)
    assert (assignment.taken == wanted).all()
    assert sum(map(len, seen)) == comparisons * questions * wanted
    for of in seen:
        cells = [(picked.question, picked.comparison) for picked in of]
        assert len(set(cells)) == len(cells)
    assert all(assignment.pick(voter, 0, 0) is None for voter in range(voters + 1))  # also for one who saw nothing


def test_it_is_even_whenever_people_stop(seed):
    assignment = Assignment(["pair"] * 30, 1, 5, random.Random(seed))
    for number in range(1, 150):  # each for a voter who has seen nothing
        assert assignment.pick(number, 0, 0) is not None
        assert np.ptp(assignment.taken) <= 1


def test_a_voter_gets_one_of_the_least_voted_on_that_are_new_to_the_voter(seed):
    assignment = Assignment(["pair"] * 30, 1, 5, random.Random(seed))
    seen: list[set[int]] = [set() for _ in range(7)]
    for number in range(140):
        of, before = seen[number % 7], assignment.taken[0].copy()
        picked = assignment.pick(number % 7, len(of), 0)
        if picked is None:
            continue
        assert picked.comparison not in of
        assert before[picked.comparison] == min(before[k] for k in range(30) if k not in of)
        of.add(picked.comparison)


def test_both_orders_are_even_in_every_comparison(seed):
    assignment = Assignment(["pair"] * 40, 2, 5, random.Random(seed))
    seen = [picked for of in fill(assignment, 5, 80) for picked in of]
    left = np.zeros((2, 40), int)
    for picked in seen:
        left[picked.question, picked.comparison] += picked.first_left
    assert set(np.unique(left)) <= {2, 3} and 0.2 < (left == 3).mean() < 0.8  # the odd one is drawn


def test_a_voter_keeps_a_question_for_a_block_and_voters_begin_with_different_ones(seed):
    assignment = Assignment(["pair"] * 40, 3, 5, random.Random(seed))
    seen = fill(assignment, 3, 3 * BLOCK)
    for voter, of in enumerate(seen):
        asked = [picked.question for picked in of]
        assert asked == [(voter + block) % 3 for block in range(3) for _ in range(BLOCK)]
    (alone,) = fill(Assignment(["pair"] * 40, 3, 5, random.Random(seed)), 1, 3 * BLOCK)
    assert len({picked.comparison for picked in alone}) == 3 * BLOCK  # none with a second question


def test_a_voter_sees_all_pairs_of_models_evenly(seed):
    kinds = [("a", "b")] * 30 + [("a", "c")] * 30 + [("b", "c")] * 30
    assignment = Assignment(kinds, 1, 5, random.Random(seed))
    (of,) = fill(assignment, 1, 30)
    number = [sum(picked.comparison // 30 == kind for picked in of) for kind in range(3)]
    assert number == [10, 10, 10]


def test_what_is_released_goes_to_others_and_not_back_to_the_same_voter(seed):
    assignment = Assignment(["pair"], 1, 1, random.Random(seed))
    picked = assignment.pick("ann", 0, 0)
    assert picked is not None and assignment.pick("bob", 0, 0) is None and not assignment.has_room(picked)
    assignment.release(picked)
    assert assignment.pick("ann", 1, 0) is None  # she has it still
    other = assignment.pick("bob", 0, 0)
    assert other is not None and not assignment.has_room(picked)
    assignment.release(other)
    assignment.restore(picked)
    assert not assignment.has_room(picked)
    assignment.release(picked)
    assignment.forget("ann", picked)
    assert assignment.pick("ann", 1, 0) is not None
