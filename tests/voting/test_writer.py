"""The thread that writes votes."""

import time

from dpo_fast.votes.desk import Desk
from dpo_fast.voting.writer import Writer
from tests.helpers.vote_sessions import store_of


def test_a_cancelled_request_does_not_end_the_thread(tmp_path):
    with store_of(tmp_path / "votes.sqlite", 1) as store:
        writer = Writer(Desk(store))
        gone = [writer.submit(lambda desk: desk.add_voter("bob")) for _ in range(2)]
        assert all(one.cancel() for one in gone)
        with writer:
            assert writer.submit(lambda desk: desk.add_voter("ann")).result(10)
            busy = writer.submit(lambda desk: time.sleep(0.05))
            late = writer.submit(lambda desk: desk.add_voter("cat"))
            late.cancel()
            busy.result(10)
            assert writer.submit(lambda desk: desk.store.voters()).result(10) == ["ann"]
