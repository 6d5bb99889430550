"""The preloaded library: calls are counted and fail, or end the process, exactly where they should."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.faults import server
from tests.faults.server import KINDS, MODES

pytestmark = pytest.mark.faults

SCRIPT = """
import ctypes, errno, json, os, sys
library, root, log, mode, at, error, kinds = sys.argv[1:]
shim = ctypes.CDLL(library)
log = os.open(log, os.O_WRONLY | os.O_CREAT)
shim.faults_arm(root.encode(), int(mode), ctypes.c_long(int(at)), int(error), int(kinds), log)
said = {}
def attempt(name, work):
    try:
        said[name] = work()
    except OSError as caught:
        said[name] = errno.errorcode[caught.errno]
def write():
    with open(root + "/a", "wb", buffering=0) as file:
        return file.write(b"12345678")
attempt("outside", lambda: os.mkdir(root + "-outside"))
attempt("mkdir", lambda: os.mkdir(root + "/folder"))
attempt("write", write)
attempt("rename", lambda: os.rename(root + "/a", root + "/b"))
os.chdir(root)
attempt("relative", lambda: os.unlink("b"))
attempt("again", lambda: os.mkdir(root + "/folder2"))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not sys.platform.startswith("linux") or server.compiler() is None:
        pytest.skip("needs Linux and a C compiler")
    return server.build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def run(library, tmp_path):
    """Run SCRIPT with a fault: its exit status, what it says, and the calls that were counted."""

    def run(mode: str, at: int = 0, error: int = 0, kinds: tuple[str, ...] = KINDS):
        (tmp_path / "root").mkdir()
        numbers = [MODES.index(mode), at, error, sum(1 << KINDS.index(kind) for kind in kinds)]
        words = [sys.executable, "-c", SCRIPT, library, tmp_path / "root", tmp_path / "log", *numbers]
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        done = subprocess.run([str(w) for w in words], env=environment, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        calls = [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]
        root = str(tmp_path / "root") + "/"
        return (
            done.returncode,
            json.loads(done.stdout) if done.stdout else None,
            [(int(number), kind, path.removeprefix(root)) for number, kind, path in calls],
        )

    return run


CALLS = [
    (1, "MKDIR", "folder"), (2, "WRITE_OPEN", "a"), (3, "WRITE", "a"), (4, "RENAME", "b"), (5, "UNLINK", "b"),
    (6, "MKDIR", "folder2"),
]  # fmt: skip
FINE = {"outside": None, "mkdir": None, "write": 8, "rename": None, "relative": None, "again": None}


def test_calls_below_the_root_are_counted(run):
    assert run("count") == (0, FINE, CALLS)


def test_a_kill_comes_before_the_call(run, tmp_path):
    status, said, calls = run("kill", 4)
    assert (status, said, calls) == (-signal.SIGKILL, None, CALLS[:4])
    assert sorted(os.listdir(tmp_path / "root")) == ["a", "folder"]
    assert (tmp_path / "root" / "a").read_bytes() == b"12345678"


def test_a_write_can_be_torn(run, tmp_path):
    assert run("tear", 3)[::2] == (-signal.SIGKILL, CALLS[:3])
    assert (tmp_path / "root" / "a").read_bytes() == b"1234"


@pytest.mark.parametrize("mode, again", [("once", None), ("always", "EROFS")])
def test_an_error_happens_once_or_from_then_on(run, mode, again):
    _, said, calls = run(mode, 1, errno.EROFS, ("MKDIR",))
    assert said == {**FINE, "mkdir": "EROFS", "again": again}
    assert [call[1:] for call in calls] == [("MKDIR", "folder"), ("MKDIR", "folder2")]


def test_writes_can_be_short(run, tmp_path):
    assert run("short", 1)[1] == {**FINE, "write": 4}


def test_all_libraries_come_through_it(checks):
    """Python, Rust (safetensors) and C++ (pyarrow) write, and reading is seen too."""
    writes = [call.path for call in checks.whole("train").calls if call.kind == "WRITE"]
    for part in ("metrics.jsonl", "-checkpoint-1/.tmp", "rows-", "shard-", ".png", "scores.parquet"):
        assert any(part in path for path in writes), part
    assert any("pairs.parquet" in call.path for call in checks.whole("relabel").reads)
    assert any("/policy/" in call.path for call in checks.whole("evaluate").reads)
