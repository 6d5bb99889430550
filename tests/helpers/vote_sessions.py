"""Sessions of votes for tests: stores without images, folders of images, and a server in a thread."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dpo_fast.votes.desk import Desk
from dpo_fast.votes.store import Comparison, ImageFile, VoteStore
from dpo_fast.voting.guard import Limits
from dpo_fast.voting.options import VoteConfig
from dpo_fast.voting.serve import _listen, make_server
from dpo_fast.voting.session import Session, open_session
from dpo_fast.voting.writer import Writer

QUESTIONS = {"general": "Which image do you prefer?", "alignment": "Which image fits the text better?"}


def store_of(
    path: Path,
    comparisons: int,
    *,
    votes: int = 5,
    questions: Mapping[str, str] = QUESTIONS,
    models: Sequence[tuple[str, str]] = (("base", "policy"),),
) -> VoteStore:
    """A store with that many comparisons, of images that need not exist."""
    store = VoteStore.create(path, {"votes": votes}, questions)
    rows = [
        Comparison(
            "set", f"prompt {k}", "People" if k % 2 else None, k, models[k % len(models)],
            (path.parent / f"{k}-a.png", path.parent / f"{k}-b.png"),
        )
        for k in range(comparisons)
    ]  # fmt: skip
    files = {file: ImageFile(10, "0" * 32) for row in rows for file in row.files}
    with store.transaction():
        store.set_comparisons({"set": "folder"}, rows, files)
    return store


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def voters_of(desk: Desk, number: int) -> list[int]:
    """The ids of so many new voters."""
    with desk.store.transaction():
        return [desk.voter_of(desk.add_voter(f"voter {k}")) for k in range(number)]


def image_folder(
    folder: Path, prompts: Sequence[str], *, seed: int, size: tuple[int, int] = (64, 64), sharp: bool = True
) -> Path:
    """A folder with one image of each prompt, named after it; sharp ones are much longer files."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for prompt in prompts:
        pixels = draw.integers(0, 256, (*(size[::-1] if sharp else (4, 4)), 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{prompt}.png")
    return folder


def png(path: Path, texts: Mapping[str, str], seed: int = 0) -> Path:
    """A small PNG with texts."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=info)
    return path


class Client:
    """A browser of one voter, or of the owner."""

    def __init__(self, base: str, token: str | None) -> None:
        self.base, self.token = base, token
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        # verify: reading the certificates would take longer than most tests
        self.http = httpx.Client(base_url=base, headers=headers, timeout=20, verify=False)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, value: object = None, **options: Any) -> httpx.Response:
        if value is not None:
            options["json"] = value
        return self.http.post(path, **options)

    def pairs(self) -> dict[str, Any]:
        response = self.get("/api/pairs")
        assert response.status_code == 200, response.text
        return response.json()

    def vote(self, showing: str, choice: str = "left") -> httpx.Response:
        return self.post("/api/vote", {"showing": showing, "choice": choice})


def vote_all(client: Client, choice: str = "left") -> int:
    """Vote until there is nothing left; return the number of votes."""
    now, number = client.pairs(), 0
    while now["pairs"]:
        now = client.vote(now["pairs"][0]["showing"], choice).json()
        number += 1
    return number


class Running:
    """A server in a thread of this process."""

    def __init__(self, session: Session, writer: Writer, base: str, owner: str, voters: dict[str, str]) -> None:
        self.session, self.writer, self.base, self.owner_token, self.tokens = session, writer, base, owner, voters

    @property
    def port(self) -> int:
        return int(self.base.rpartition(":")[2])

    def voter(self, name: str) -> Client:
        return Client(self.base, self.tokens[name])

    def owner(self) -> Client:
        return Client(self.base, self.owner_token)

    def raw(self, data: bytes, seconds: float = 5.0) -> bytes:
        """What the server answers to these bytes until it closes the connection, or is silent for so long."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            return received(connection)


def received(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except (TimeoutError, ConnectionResetError):
        pass
    return b"".join(parts)


@contextmanager
def running(config: VoteConfig, limits: Limits | None = None) -> Iterator[Running]:
    """Serve a session, with the voters that the flags name, until the block ends."""
    listener = _listen(config)
    session = open_session(config)
    try:
        with Writer(session.desk) as writer:
            server = make_server(session, writer, listener, config, limits)
            owner, tokens = writer.submit(
                lambda desk: (desk.new_owner(), {name: desk.add_voter(name) for name in config.voters})
            ).result()
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            end = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < end and thread.is_alive()
                time.sleep(0.01)
            try:
                yield Running(session, writer, f"http://127.0.0.1:{listener.getsockname()[1]}", owner, tokens)
            finally:
                server.should_exit = server.force_exit = True
                thread.join(20)
                assert not thread.is_alive()
    finally:
        session.close()
        listener.close()


def body(response: bytes) -> dict[str, Any]:
    """The JSON in a raw response."""
    return json.loads(response.partition(b"\r\n\r\n")[2])
