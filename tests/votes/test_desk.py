"""The desk: who may vote on what, undo, reservations, checks, exclusion, and what a restart remembers."""

import random
from collections import Counter

import pytest

from dpo_fast.votes import desk as desks
from dpo_fast.votes.desk import RESERVED_SECONDS, UNDO_SECONDS, Desk, Refused
from dpo_fast.votes.store import VoteStore
from tests.helpers.vote_sessions import Clock, store_of, voters_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


def desk_of(tmp_path, clock, comparisons=6, *, votes=5, seed=0, voters=(), **options):
    store = store_of(tmp_path / "votes.sqlite", comparisons, votes=votes)
    store.connection.execute("PRAGMA synchronous=OFF")  # a flush a vote would take most of the time
    desk = Desk(store, clock=clock, draw=random.Random(seed), **options)
    return desk, voters_of(desk, voters) if voters else []


def screen(desk: Desk, voter: int):
    with desk.store.transaction():
        return desk.screen(voter)


def vote(desk: Desk, voter: int, choice: str = "left", showing=None) -> None:
    showing = screen(desk, voter).showings[0].id if showing is None else showing
    with desk.store.transaction():
        desk.vote(voter, showing, choice)


def refused(status: int):
    return pytest.raises(Refused, check=lambda error: error.status == status)


def test_a_session_is_voted_to_its_end_by_people_who_come_and_go(tmp_path, clock, seed):
    desk, voters = desk_of(tmp_path, clock, 8, votes=3, seed=seed, voters=6, checks_every=5)
    draw = random.Random(seed)
    for _ in range(5000):
        clock.now += draw.expovariate(0.5) * (600 if draw.random() < 0.02 else 1)
        voter = draw.choice(voters)
        now = screen(desk, voter)
        if all(screen(desk, one).finished for one in voters):
            break
        if now.can_undo and draw.random() < 0.1:
            with desk.store.transaction():
                desk.undo(voter)
        elif now.showings and draw.random() < 0.7:
            vote(desk, voter, draw.choice(["left", "right", "tie"]), draw.choice(now.showings).id)
        if draw.random() < 0.01:
            desk.load()  # as a restart does
    votes = desk.store.votes()
    number = Counter((one.comparison, one.question) for one in votes)
    assert len(number) == 16 and set(number.values()) == {3}
    assert len({(one.comparison, one.question, one.voter) for one in votes}) == len(votes) == 48
    left = Counter((one.comparison, one.question) for one in votes if one.first_left)
    assert sum(abs(2 * left[cell] - 3) == 1 for cell in number) >= 14  # undone and expired ones may leave an odd order
    assert desk.store.checks()


def test_the_answer_is_what_was_chosen(tmp_path, clock):
    desk, (voter,) = desk_of(tmp_path, clock, voters=1)
    chosen = {}
    for choice in ("left", "right", "tie") * 2:
        showing = screen(desk, voter).showings[0]
        first_wins = {"left": float(showing.first_left), "right": float(not showing.first_left), "tie": 0.5}[choice]
        chosen[showing.comparison, showing.question] = first_wins
        clock.now += 2.5
        vote(desk, voter, choice)
    votes = desk.store.votes()
    assert {(one.comparison, one.question): one.outcome for one in votes} == chosen
    assert {one.seconds for one in votes} == {2.5} and votes[-1].at == clock.now


def test_the_showings_stay_until_they_are_voted_on(tmp_path, clock):
    desk, (voter,) = desk_of(tmp_path, clock, voters=1)
    first = screen(desk, voter)
    assert screen(desk, voter) == first and len(first.showings) == 2 and not first.can_undo
    vote(desk, voter)
    second = screen(desk, voter)
    assert second.showings[0].id == first.showings[1].id and second.done == 1 and second.can_undo
    keys = [key for showing in (*first.showings, *second.showings[1:]) for key in showing.keys]
    assert len(set(keys)) == 6
    assert desk.image_of(voter, keys[0]) is None and desk.image_of(voter, keys[2]) is not None


def test_a_retry_counts_once_and_another_choice_is_refused(tmp_path, clock):
    desk, (voter, other) = desk_of(tmp_path, clock, voters=2)
    showing = screen(desk, voter).showings[0].id
    for _ in range(3):
        vote(desk, voter, "left", showing)
    with refused(409):
        vote(desk, voter, "right", showing)
    assert len(desk.store.votes()) == 1 and screen(desk, voter).done == 1
    for name in (showing, screen(desk, voter).showings[0].id, "nothing", ""):
        with refused(404):
            vote(desk, other, "left", name)
    assert len(desk.store.votes()) == 1


def test_undo_goes_back_step_by_step_and_ends_with_time(tmp_path, clock):
    desk, (voter,) = desk_of(tmp_path, clock, voters=1)
    seen = []
    for _ in range(3):
        seen.append(screen(desk, voter).showings[0])
        vote(desk, voter)
        clock.now += 10
    following = screen(desk, voter).showings[0].id
    for back in reversed(seen):
        with desk.store.transaction():
            desk.undo(voter)
        now = screen(desk, voter).showings[0]
        assert (now.comparison, now.question, now.first_left) == (back.comparison, back.question, back.first_left)
        assert now.id != back.id and not set(now.keys) & set(back.keys)
        with refused(404):  # a late retry of the vote that was taken back
            vote(desk, voter, "left", back.id)
    assert screen(desk, voter).done == 0 and not desk.store.votes()
    with refused(409), desk.store.transaction():
        desk.undo(voter)
    for _ in range(3):
        vote(desk, voter, "right")
    assert screen(desk, voter).showings[0].id == following
    clock.now += UNDO_SECONDS + 1
    assert not screen(desk, voter).can_undo
    with refused(409), desk.store.transaction():
        desk.undo(voter)
    assert len(desk.store.votes()) == 3


def test_reservations_expire_and_no_comparison_gets_more_votes_than_wanted(tmp_path, clock):
    desk, (slow, quick) = desk_of(tmp_path, clock, 1, votes=1, voters=2)
    held = screen(desk, slow)
    assert len(held.showings) == 2
    waiting = screen(desk, quick)
    assert not waiting.showings and not waiting.finished  # the other may leave them
    clock.now += RESERVED_SECONDS + 2
    taken = screen(desk, quick)
    assert len(taken.showings) == 2
    vote(desk, quick)
    again = screen(desk, slow)  # what was not given away stays, what was is gone: here both were
    assert not again.showings and len(desk.store.votes()) == 1
    for showing in held.showings:
        with refused(404):
            vote(desk, slow, "left", showing.id)
    vote(desk, quick)
    assert len(desk.store.votes()) == 2 and screen(desk, slow).finished and screen(desk, quick).finished


def test_who_has_seen_all_is_done_though_others_are_not(tmp_path, clock):
    desk, (quick, slow) = desk_of(tmp_path, clock, 1, votes=2, voters=2)
    screen(desk, slow)
    vote(desk, quick)
    assert not screen(desk, quick).finished
    vote(desk, quick)
    assert screen(desk, quick).finished and len(screen(desk, slow).showings) == 2
    desk, (quick, slow) = desk_of(tmp_path / "most", clock, 3, votes=1, voters=2, most=2)
    screen(desk, slow)
    vote(desk, quick)
    vote(desk, quick)
    assert screen(desk, quick).finished


def test_a_voter_who_comes_back_in_time_keeps_the_pair(tmp_path, clock):
    desk, (slow, quick) = desk_of(tmp_path, clock, 2, votes=1, voters=2)
    held = screen(desk, slow).showings
    clock.now += RESERVED_SECONDS + 2
    given = {(one.comparison, one.question) for one in screen(desk, quick).showings}
    kept = [one.id for one in held if (one.comparison, one.question) not in given]
    assert len(given) == 2 and [one.id for one in screen(desk, slow).showings][: len(kept)] == kept
    for voter in (slow, quick) * 4:
        now = screen(desk, voter)
        if now.showings:
            vote(desk, voter)
    votes = Counter((one.comparison, one.question) for one in desk.store.votes())
    assert set(votes.values()) == {1} and len(votes) == 4


def test_checks_come_at_a_random_place_of_each_block_and_never_count(tmp_path, clock, seed):
    desk, voters = desk_of(
        tmp_path, clock, 60, seed=seed, voters=4, checks_every=6, ruined={k: 1 for k in range(1, 11)}
    )
    places = {}
    for voter in voters:
        for _ in range(60):
            vote(desk, voter, "tie")
        rows = desk.store.connection.execute(
            "SELECT place, kind FROM showings WHERE voter = ? AND choice IS NOT NULL ORDER BY place", [voter]
        ).fetchall()
        checks = [place for place, kind in rows if kind is not None]
        assert [place // 6 for place in checks] == [*range(10)]
        places[voter] = tuple(place % 6 for place in checks)
    assert len(set(places.values())) == 4 and len({one for of in places.values() for one in of}) > 2
    checks = desk.store.checks()
    assert {check.kind for check in checks} == {"identical", "obvious"} and len(checks) == 40
    assert all(check.passed == (check.kind == "identical") for check in checks)  # everything was a tie
    assert len(desk.store.votes()) == 200 and screen(desk, voters[0]).done == 60


def test_a_check_shows_what_it_says(tmp_path, clock, seed):
    desk, (voter,) = desk_of(tmp_path, clock, 30, seed=seed, voters=1, checks_every=2, ruined={3: 0, 4: 1})
    kinds = Counter()
    for _ in range(50):
        showing = screen(desk, voter).showings[0]
        left, right = (desk.image_of(voter, key) for key in showing.keys)
        images = desk.rows[showing.comparison].images
        if showing.kind is None:
            assert (left.image, right.image) == (images if showing.first_left else images[::-1])
            assert not left.ruined and not right.ruined
        elif showing.kind == "identical":
            assert left.image == right.image and not left.ruined and not right.ruined
        else:
            assert left.image == right.image == images[{3: 0, 4: 1}[showing.comparison]]
            assert left.ruined != right.ruined and right.ruined == showing.first_left
        kinds[showing.kind] += 1
        vote(desk, voter, "left" if showing.first_left else "right")
    assert kinds["obvious"] > 3 and kinds["identical"] > 3
    assert all(check.passed == (check.kind == "obvious") for check in desk.store.checks())


def test_the_most_showings_of_a_voter(tmp_path, clock):
    desk, (voter,) = desk_of(tmp_path, clock, voters=1, most=3, checks_every=2)
    for done in range(3):
        now = screen(desk, voter)
        assert (now.done, now.target, now.finished) == (done, 3, False)
        vote(desk, voter)
    now = screen(desk, voter)
    assert now.finished and now.done == 3 and not now.showings and now.can_undo
    with desk.store.transaction():
        desk.undo(voter)
    assert len(screen(desk, voter).showings) == 1


def test_the_target_is_the_share_of_a_named_voter(tmp_path, clock):
    desk, (voter, *_) = desk_of(tmp_path, clock, 6, votes=2, voters=4)
    assert screen(desk, voter).target == 6  # 6 x 2 x 2 / 4
    desk.open_link = True
    assert screen(desk, voter).target is None


def test_an_excluded_voter_is_out_and_the_votes_are_wanted_of_others(tmp_path, clock):
    desk, (bad, good) = desk_of(tmp_path, clock, 2, votes=1, voters=2)
    for _ in range(3):
        vote(desk, bad)
    assert len(screen(desk, bad).showings) == 1 and not screen(desk, good).showings
    with desk.store.transaction():
        desk.exclude("voter 0", True, "  fails\nchecks \x1b[31m")
    assert desk.store.excluded() == {"voter 0": "fails checks"} and desk.store.votes() == []
    with refused(403):
        screen(desk, bad)
    for _ in range(4):
        vote(desk, good)
    assert screen(desk, good).finished and len(desk.store.votes()) == 4
    with desk.store.transaction():
        desk.exclude("voter 0", False)
    assert screen(desk, bad).finished  # what was open has its vote meanwhile
    assert len(desk.store.votes()) == 7
    with refused(404), desk.store.transaction():
        desk.exclude("nobody", True)


def test_tokens(tmp_path, clock):
    desk, _ = desk_of(tmp_path, clock, open_link=True)
    with desk.store.transaction():
        first, owner, invitation = desk.add_voter(" Ann  B "), desk.new_owner(), desk.new_invitation()
        second_invitation = desk.new_invitation()
        guests = [desk.join(invitation), desk.join(second_invitation)]
    tokens = [first, owner, invitation, second_invitation, *guests]
    assert len(set(tokens)) == 6 and all(len(token) == 32 for token in tokens)
    assert desk.name_of(desk.voter_of(first)) == "Ann B" and desk.name_of(desk.voter_of(guests[1])) == "guest 2"
    for token in (owner, invitation, "", "x", first[:-1], "\ud800", "é" * 32):
        assert desk.voter_of(token) is None
    assert desk.is_owner(owner) and not any(desk.is_owner(token) for token in (first, invitation, "", "\ud800"))
    with desk.store.transaction():
        new, new_owner = desk.new_token("Ann B"), desk.new_owner()
    assert desk.voter_of(first) is None and desk.voter_of(new) is not None
    assert desk.is_owner(new_owner) and not desk.is_owner(owner)
    for name in ("Ann B", "ann\x07", "", " ", "x" * 61, "a\u202eb"):
        with pytest.raises(Refused):
            desk.add_voter(name)
    again = Desk(desk.store, clock=clock, open_link=True)
    assert again.voter_of(new) == desk.voter_of(new) and again.is_owner(new_owner)
    with desk.store.transaction():
        assert again.name_of(again.voter_of(again.join(invitation))) == "guest 3"
    for closed in (Desk(desk.store, clock=clock), again):
        with refused(403):
            closed.join(invitation if closed is not again else "guessed")
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(token.encode() in everything for token in (*tokens, new, new_owner))


def test_a_restart_goes_on_where_it_was(tmp_path, clock):
    desk, (voter, _) = desk_of(tmp_path, clock, voters=2, checks_every=3)
    with desk.store.transaction():
        desk.tidy()
    for _ in range(4):
        vote(desk, voter)
    before = screen(desk, voter)
    desk.store.close()
    with VoteStore.open(tmp_path / "votes.sqlite") as store:
        again = Desk(store, clock=clock, checks_every=3)
        with store.transaction():
            again.tidy()
            after = again.screen(voter)
        assert [one.id for one in after.showings] == [one.id for one in before.showings] and after.done == 4
        with store.transaction():
            again.undo(voter)
        assert len(store.votes()) + len(store.checks()) == 3


def test_a_check_beside_a_ruined_copy_that_is_no_more_is_dropped(tmp_path, clock):
    desk, (voter,) = desk_of(tmp_path, clock, 6, voters=1, checks_every=2, ruined={k: 1 for k in range(1, 7)})
    open_obvious = answered_obvious = False
    while not (open_obvious and answered_obvious):
        vote(desk, voter)
        answered = desk.store.connection.execute(
            "SELECT kind FROM showings WHERE choice IS NOT NULL ORDER BY place DESC"
        ).fetchone()
        answered_obvious |= answered == ("obvious",)
        open_obvious = any(one.kind == "obvious" for one in screen(desk, voter).showings)
    for ruined in ({}, {k: 0 for k in range(1, 7)}):
        again = Desk(desk.store, clock=clock, checks_every=2, ruined=ruined)
        with desk.store.transaction():
            again.tidy()
        while (now := screen(again, voter)).can_undo:
            assert len(now.showings) == 2 and not any(one.side == 1 and one.kind == "obvious" for one in now.showings)
            for showing in now.showings:
                for of in (again.image_of(voter, key) for key in showing.keys):
                    assert not of.ruined or ruined
            with desk.store.transaction():
                again.undo(voter)
        held = {one.id for one in now.showings}
        written = desk.store.connection.execute("SELECT id FROM showings WHERE choice IS NULL").fetchall()
        assert held <= {id_ for (id_,) in written}
        for _ in range(3):
            vote(again, voter)


def test_nobody_was_seen_at_a_start_or_when_another_is_excluded(tmp_path, clock):
    desk, (ann, idle, _) = desk_of(tmp_path, clock, 2, votes=1, voters=3)
    clock.now += 10
    held = {(one.comparison, one.question) for one in screen(desk, idle).showings}
    vote(desk, ann)
    clock.now += RESERVED_SECONDS / 2
    screen(desk, ann)
    with desk.store.transaction():
        desk.exclude("voter 2", True)
    assert [one["idle_seconds"] for one in desk.live()["voters"]][:2] == [0, RESERVED_SECONDS / 2]
    clock.now += 5
    vote(desk, ann)
    assert desk.store.votes()[-1].seconds == 5  # its time goes on
    clock.now += RESERVED_SECONDS / 2 + 10
    again = Desk(desk.store, clock=clock)
    assert again.live()["voters"][0]["idle_seconds"] == RESERVED_SECONDS / 2 + 10
    assert held & {(one.comparison, one.question) for one in screen(again, ann).showings}  # and nothing is prolonged


def test_there_is_an_end_to_voters(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(desks, "MOST_VOTERS", 2)
    desk, _ = desk_of(tmp_path, clock, voters=2, open_link=True)
    with desk.store.transaction():
        invitation = desk.new_invitation()
    with refused(409), desk.store.transaction():
        desk.join(invitation)
