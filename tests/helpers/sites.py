"""A vote that is served in this process, by the server that the command runs."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dpo_fast.votes.records import Vote
from dpo_fast.votes.store import VoteStore
from dpo_fast.voting.options import VoteConfig
from dpo_fast.voting.serve import make_server
from dpo_fast.voting.session import open_session
from dpo_fast.voting.writer import Writer

PATIENCE = 60  # seconds until the server has ended


class Site(NamedTuple):
    """A vote that is served."""

    links: dict[str, str]  # voter's name -> link
    owner: str  # the link of the owner's page
    file: Path
    invitation: str | None  # the link with which anyone can join, if the session has one

    def votes(self, voter: str) -> list[Vote]:
        """The votes of one voter, excluded or not, oldest first."""
        with VoteStore.read(self.file) as store:
            return [vote for vote in store.votes(excluded=True) if vote.voter == voter]


@contextmanager
def served(config: VoteConfig, voters: Sequence[str]) -> Iterator[Site]:
    """Serve a session at a free port, with a link for each voter, until the block ends."""
    with socket.create_server((config.host, 0)) as listener:
        session = open_session(config)
        base = f"http://{config.host}:{listener.getsockname()[1]}"
        try:
            with Writer(session.desk) as writer:
                tokens = {name: writer.submit(lambda desk, name=name: desk.add_voter(name)).result() for name in voters}
                owner = writer.submit(lambda desk: desk.new_owner()).result()
                invitation = None
                if config.open_link:
                    invitation = f"{base}/vote#join={writer.submit(lambda desk: desk.new_invitation()).result()}"
                server = make_server(session, writer, listener, config)
                thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
                thread.start()
                links = {name: f"{base}/vote#{token}" for name, token in tokens.items()}
                yield Site(links, f"{base}/owner#{owner}", config.votes_file, invitation)
                server.should_exit = True
                thread.join(PATIENCE)
                assert not thread.is_alive()
        finally:
            session.close()
