"""A running server with two models' images, one of which is much sharper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_fast.voting.options import VoteConfig
from tests.helpers.vote_sessions import Running, image_folder, running

PROMPTS = [f"a fox number {name}" for name in ("one", "two", "three", "four", "five", "six")]
NAMES = ("ann", "bob", "cat", "dan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of two models, `blurry` and `crisp`."""
    home = tmp_path_factory.mktemp("images")
    return [
        image_folder(home / "blurry", PROMPTS, seed=1, sharp=False),
        image_folder(home / "crisp", PROMPTS, seed=2, size=(96, 64)),
    ]


@pytest.fixture
def server(folders: list[Path], tmp_path: Path) -> Iterator[Running]:
    """A server with the voters NAMES and without a delay."""
    config = VoteConfig(
        folders=tuple(folders), voters=NAMES, votes_file=tmp_path / "votes.sqlite", delay=0.0, checks=3, open_link=True
    )
    with running(config) as server:
        yield server


@pytest.fixture(scope="module")
def shared(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server like `server`, for tests that leave no trace in it."""
    file = tmp_path_factory.mktemp("shared") / "votes.sqlite"
    with running(VoteConfig(folders=tuple(folders), voters=NAMES, votes_file=file, delay=0.0)) as server:
        yield server
