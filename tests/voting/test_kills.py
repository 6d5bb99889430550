"""A server that is killed while people vote: what was acknowledged is in the file once, whatever moment it was."""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from dpo_fast.votes.store import VoteStore
from dpo_fast.voting.options import VoteConfig
from tests.helpers.vote_sessions import Client, running

VOTERS = tuple(f"voter {k}" for k in range(12))


class Killable:
    """A server in a forked process."""

    def __init__(self, config: VoteConfig) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reading)
                with running(config) as server:
                    os.write(writing, json.dumps([server.base, server.tokens]).encode() + b"\n")
                    threading.Event().wait(120)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb") as pipe:
            self.base, self.tokens = json.loads(pipe.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def vote_until_dead(base: str, token: str, acknowledged: dict[str, str], unanswered: dict[str, str]) -> None:
    client, choose = Client(base, token), random.Random(token)
    try:
        now = client.pairs()
        while now["pairs"]:
            showing, choice = now["pairs"][0]["showing"], choose.choice(["left", "right", "tie"])
            unanswered[showing] = choice
            response = client.vote(showing, choice)
            assert response.status_code == 200, response.text
            acknowledged[showing] = unanswered.pop(showing)
            now = response.json()
    except httpx.HTTPError:
        pass


def kept(path: Path) -> dict[str, str]:
    """Showing -> its answer, as the file has it; opened as a restart opens it."""
    with VoteStore.open(path) as store:
        rows = store.connection.execute("SELECT id, choice FROM showings WHERE choice IS NOT NULL").fetchall()
        cells = Counter(store.connection.execute("SELECT voter, comparison, question FROM showings WHERE kind IS NULL"))
        votes = Counter((vote.comparison, vote.question) for vote in store.votes())
    assert set(cells.values()) <= {1} and max(votes.values(), default=0) <= 1000
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.faults)])
def test_every_acknowledged_vote_is_there_once_after_a_kill(folders, tmp_path, seed, times):
    path, draw = tmp_path / "votes.sqlite", random.Random(seed)
    config = VoteConfig(folders=tuple(folders), votes_file=path, votes=1000, voters=VOTERS, delay=0.0, checks=4)
    tokens: dict[str, str] = {}
    acknowledged: dict[str, str] = {}
    for number in range(times):
        server = Killable(config)
        tokens = tokens or server.tokens
        if number == 0:  # later starts know them
            config = VoteConfig(**{**vars(config), "voters": ()})
        unanswered: dict[str, str] = {}
        threads = [
            threading.Thread(target=vote_until_dead, args=(server.base, tokens[name], acknowledged, unanswered))
            for name in VOTERS
        ]
        before, begun = len(acknowledged), time.monotonic()
        for thread in threads:
            thread.start()
        wanted = before + draw.randint(1, 216 // (times + 2))  # they have 18 pairs each
        while len(acknowledged) < wanted and time.monotonic() < begun + 30:
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.02)
        server.kill()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        found = kept(path)
        assert found.items() >= acknowledged.items() and len(acknowledged) > before
        # of those that were not answered some may be there; they count as votes, and a retry finds them
        assert all(unanswered[showing] == choice for showing, choice in found.items() if showing in unanswered)
        assert found.keys() <= acknowledged.keys() | unanswered.keys()
        acknowledged = found
