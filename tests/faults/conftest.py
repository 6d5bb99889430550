"""One server of faults, with its inputs, for each process of the tests; without a C compiler there are none."""

import random
import sys
from collections.abc import Iterator

import pytest

from tests.faults.checks import Checks
from tests.faults.commands import write_inputs
from tests.faults.server import Server, compiler


@pytest.fixture(scope="session")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checks]:
    """What has to hold, over small commands."""
    if not sys.platform.startswith("linux") or compiler() is None:
        pytest.skip("faults are provoked by a preloaded library: needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("faults")
    server = Server(folder)
    yield Checks(server, folder, write_inputs(server, folder / "inputs"))
    server.close()


@pytest.fixture
def chance() -> random.Random:
    """Draws of this test."""
    return random.Random(random.getrandbits(64))
