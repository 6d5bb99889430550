"""No rank waits for a dead one: the wait ends with a line that says what was waited for."""

import signal
import socket
import subprocess
import sys

import pytest

from tests.helpers.runs import environment

# Two ranks without a launcher, which would end the second one itself.
SCRIPT = """
import os, signal, sys
from dpo_fast import heartbeat, parallel
from dpo_fast.cli import guarded
heartbeat.INTERVAL, heartbeat.SILENCE = 0.2, 1.5

def work():
    ranks = parallel.start("none")
    ranks.wait()
    if ranks.rank == 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    ranks.wait()
    ranks.close()
    return 0

sys.exit(guarded(work, kept="", go_on=""))
"""


def two_ranks(sent: str, port: int) -> tuple[subprocess.Popen, subprocess.Popen]:
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, sent],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    )
    return first, second


@pytest.mark.faults
@pytest.mark.parametrize(
    ("sent", "line"),
    [
        ("SIGSTOP", "dpo_fast, rank 0: error: rank 1 (process {} on "),
        ("SIGKILL", "dpo_fast: error: another rank ended while rank 0 waited for the other ranks"),
    ],
)
def test_a_wait_for_a_rank_that_is_gone_ends(unused_port, sent, line):
    first, second = two_ranks(sent, unused_port)
    try:
        _, error = first.communicate(timeout=60)
    finally:
        second.send_signal(signal.SIGKILL)
        second.communicate()
    assert first.returncode == 1
    last = error.strip().splitlines()[-1]
    assert last.startswith(line.format(second.pid)), error
    if sent == "SIGSTOP":
        assert "was silent for" in last and "waited for the other ranks; ending" in last
    assert "Traceback" not in error


@pytest.mark.faults
def test_ranks_that_answer_end_normally(unused_port):
    processes = two_ranks("SIGCONT", unused_port)
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
