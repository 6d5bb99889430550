"""One writer a folder: the second is told who writes, and a dead one never holds anybody up."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_fast import locks
from dpo_fast.errors import BadInput
from dpo_fast.files import is_content
from dpo_fast.locks import hold, hold_file

LEASE = 0.6  # seconds

# Another process: holds a folder, says so, and sleeps. argv: the folder, and whether flock fails there.
HOLDER = f"""
import errno, fcntl, sys, time
from pathlib import Path
from dpo_fast import locks
if sys.argv[2] == "soft":
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
locks.LEASE_SECONDS = {LEASE}
with locks.hold(Path(sys.argv[1]), otherwise="wait"):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def another(folder: Path, kind: str, seconds: float = 60) -> Iterator[subprocess.Popen]:
    """A process that holds `folder`; its kind of lock is `flock` or `soft`."""
    command = [sys.executable, "-c", HOLDER, str(folder), kind, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def without_flock(monkeypatch) -> None:
    """File systems as some of NFS and Lustre are, and a short lease."""

    def flock(file, how) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "LEASE_SECONDS", LEASE)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_held_folder_names_its_holder_and_is_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    with hold(tmp_path, otherwise="name another") as held:
        assert names(tmp_path) == {"file", ".lock"} and not is_content(".lock")
        with pytest.raises(BadInput) as refused:
            hold(tmp_path, otherwise="name another")
        said = f"{tmp_path} is being written by process {os.getpid()} on "
        assert str(refused.value).startswith(said) and str(refused.value).endswith(": name another")
        assert " since 2" in str(refused.value)
    assert names(tmp_path) == {"file"}
    held.release()  # once more does nothing
    with hold(tmp_path, otherwise="x"):
        held.release()
        assert names(tmp_path) == {"file", ".lock"}


def test_a_folder_that_was_made_for_a_lock_goes_with_it_unless_something_is_in_it(tmp_path):
    with hold(tmp_path / "a" / "b", otherwise="x"):
        assert names(tmp_path / "a" / "b") == {".lock"}
    assert names(tmp_path / "a") == set()
    with hold(tmp_path / "a" / "b", otherwise="x"):
        (tmp_path / "a" / "b" / "file").touch()
    assert names(tmp_path / "a" / "b") == {"file"}


def test_files_of_one_folder_are_held_one_by_one(tmp_path):
    with hold_file(tmp_path / "one.parquet", otherwise="x"), hold_file(tmp_path / "two.parquet", otherwise="x"):
        with pytest.raises(BadInput, match=r"one\.parquet is being written by process "):
            hold_file(tmp_path / "one.parquet", otherwise="x")
        assert not any(map(is_content, names(tmp_path)))
    assert names(tmp_path) == set()


def test_who_waits_is_told_once_and_goes_on(tmp_path):
    said = []
    with another(tmp_path, "flock", 1.0) as process:
        with hold(tmp_path, otherwise="x", waiting=said.append):
            assert process.wait(timeout=10) == 0
    (line,) = said
    assert f"is being written by process {process.pid} on " in line and "waiting" in line


@pytest.mark.parametrize("number", sorted({*locks.NO_LOCKS}))
def test_where_the_file_system_has_no_locks_a_lease_holds(tmp_path, monkeypatch, number):
    def flock(file, how) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "LEASE_SECONDS", LEASE)
    with hold(tmp_path, otherwise="x"):
        time.sleep(1.5 * LEASE)  # it is renewed
        with pytest.raises(BadInput, match=f"is being written by process {os.getpid()} on .* since "):
            hold(tmp_path, otherwise="x")
        assert not any(map(is_content, names(tmp_path)))
    assert names(tmp_path) <= {".lock"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_other_errors_are_raised_with_the_path(tmp_path, monkeypatch, number):
    opened = os.open

    def refusing(path, *how, **more):
        if str(path).endswith(locks.LOCK):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OSError) as caught:
        hold(tmp_path, otherwise="x")
    assert caught.value.errno == number and caught.value.filename
    assert names(tmp_path) == set()


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["flock", "soft"])
def test_two_processes_do_not_share_a_folder(tmp_path, kind, request):
    if kind == "soft":
        request.getfixturevalue("without_flock")
    with another(tmp_path, kind) as process:
        with pytest.raises(BadInput, match=f"is being written by process {process.pid} on "):
            hold(tmp_path, otherwise="x")
        process.kill()
        process.wait()
        started = time.monotonic()
        with hold(tmp_path, otherwise="x"):  # a dead process on this host holds nothing
            assert time.monotonic() - started < LEASE
            assert names(tmp_path) >= {".lock"}


@pytest.mark.faults
def test_a_lease_of_a_dead_host_is_taken_over_and_one_of_a_living_host_is_not(tmp_path, without_flock, caplog):
    with another(tmp_path, "soft") as process:
        os.kill(process.pid, signal.SIGSTOP)  # its heartbeat is silent from now on
        lease = tmp_path / ".lock.lease"
        lease.write_text(lease.read_text().replace("host=", "host=elsewhere-"))
        started = time.monotonic()
        with hold(tmp_path, otherwise="x"):
            assert LEASE <= time.monotonic() - started < 5 * LEASE
        (told,) = (record.message for record in caplog.records)
        assert f"held by process {process.pid} on " in told
    with another(tmp_path, "soft") as process:
        lease.write_text(lease.read_text().replace("host=", "host=elsewhere-"))
        with pytest.raises(BadInput, match=f"is being written by process {process.pid} on "):
            hold(tmp_path, otherwise="x")


@pytest.mark.faults
def test_a_lease_that_its_holder_had_no_time_to_sign_is_taken_over(tmp_path, without_flock):
    (tmp_path / ".lock.lease").touch()
    with hold(tmp_path, otherwise="x"):
        assert (tmp_path / ".lock.lease").read_text()


@pytest.mark.faults
def test_a_lease_counts_where_flock_works_too(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", LEASE)
    with another(tmp_path, "soft") as process:
        with pytest.raises(BadInput, match=f"is being written by process {process.pid} on "):
            hold(tmp_path, otherwise="x")


@pytest.mark.faults
def test_a_lease_that_was_taken_over_is_lost_and_not_released(tmp_path, without_flock, caplog):
    held = hold(tmp_path, otherwise="x")
    (tmp_path / ".lock.lease").unlink()  # as one does who finds it silent for too long
    with another(tmp_path, "soft"):
        time.sleep(2 * LEASE)
        assert held.lost and "was lost" in caplog.text
        before = names(tmp_path)
        held.release()
        assert names(tmp_path) == before
        with pytest.raises(BadInput, match="is being written by"):
            hold(tmp_path, otherwise="x")


@pytest.mark.faults
def test_a_child_of_the_holder_neither_keeps_nor_releases_the_folder(tmp_path):
    """Loader workers are forked while their run holds its folder, and may outlive it for some seconds."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        held = hold(tmp_path, otherwise="x")
        child = os.fork()
        if child == 0:
            held.release()
            time.sleep(60)
            os._exit(0)
        os.write(writing, f"{child}\n".encode())
        time.sleep(60)
        os._exit(0)
    try:
        child = int(os.read(reading, 100))
        time.sleep(0.2)
        with pytest.raises(BadInput, match=f"process {parent} on "):
            hold(tmp_path, otherwise="x")
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    try:
        with hold(tmp_path, otherwise="x"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


@pytest.mark.faults
def test_many_processes_come_one_after_another(tmp_path):
    """A counter that each reads and writes back, ever again with a new lock file, loses nothing."""
    work = (
        "import sys, time; from pathlib import Path; from dpo_fast.locks import hold; folder = Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with hold(folder, otherwise='x', waiting=str):\n"
        "        number = int((folder / 'number').read_text()); time.sleep(0.001)\n"
        "        (folder / 'number').write_text(str(number + 1))\n"
    )
    (tmp_path / "number").write_text("0")
    work = f"from dpo_fast import locks; locks.POLL_SECONDS = 0.001\n{work}"
    processes = [subprocess.Popen([sys.executable, "-c", work, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "80" and names(tmp_path) == {"number"}
