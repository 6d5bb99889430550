"""One lock for every folder that a command writes: only its holder writes there, and others learn who that is.

A folder is held by the operating system's lock on its file `.lock` (filelock's FileLock), which ends with the process,
however that ends. File systems without such locks (some NFS and Lustre mounts) return one of NO_LOCKS; there a folder
is held by a lease, filelock's SoftFileLease on `.lock.lease`. Its holder touches that file every LEASE_SECONDS / 6;
another process takes it over at once if the holder ran on the same host and is dead, else once it has not been touched
for LEASE_SECONDS. No wait is endless: a holder that stops renewing its lease loses the folder.

`.lock` also names the holder. Both files are removed when the folder is released; files that a killed process leaves
hold nothing. The holder of a folder may delete every temporary file in it (`files.remove_temporaries`).
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, LeaseCompromise, SoftFileLease, Timeout

from dpo_fast.errors import BadInput
from dpo_fast.files import LOCK, naming, regular_file

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
LEASE_SECONDS = 60.0  # must be the same in all processes
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


def hold(folder: Path, *, otherwise: str, waiting: Callable[[str], None] | None = None) -> "Hold":
    """Hold `folder`, which is created if missing, until the returned `Hold` is released.

    If another process holds it: with `waiting`, which is called once with a message, wait until that is done; without,
    raise BadInput, which names the holder and what to do instead (`otherwise`). Raises OSError if the folder cannot be
    written.
    """
    return _hold(Path(folder) / LOCK, folder, otherwise, waiting)


def hold_file(path: Path, *, otherwise: str, waiting: Callable[[str], None] | None = None) -> "Hold":
    """Hold one file, which need not exist, in a folder that others may write; otherwise like `hold`."""
    path = Path(path)
    return _hold(path.parent / f"{LOCK}-{path.name}", path, otherwise, waiting)


class Hold:
    """A folder that is held by this process, as a context manager. After `release` it does nothing more."""

    def __init__(self, file: Path) -> None:
        """Create the folder of `file`; `take` then holds it. Raises OSError."""
        self.lost: str | None = None  # why the folder is no longer held, although it was not released
        self._made = not file.parent.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._process, self._held = file, os.getpid(), False
        self._signed: os.stat_result | None = None  # of the lock file when it was locked
        self._lease: SoftFileLease | None = None
        # Shared by the threads of a process: whichever of them ends the work releases it.
        self._lock = FileLock(
            file, thread_local=False, fallback_to_soft=False, preserve_lock_file=True, on_acquired=self._sign
        )

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.release()

    def release(self) -> None:
        """Release the folder and remove the lock files, and the folder too if it is empty and was created for the lock.

        Does nothing in a forked child.
        """
        if os.getpid() != self._process:
            return
        if self._held and self.lost is None and self._is_ours():
            with suppress(OSError):  # the folder is gone, or on Windows the file is open
                self._file.unlink()
        self._held = False
        for lock in (self._lease, self._lock):
            if lock is not None:
                with suppress(OSError):
                    lock.release(force=True)
        if self._made:
            with suppress(OSError):  # the folder is not empty
                self._file.parent.rmdir()

    def take(self) -> bool:
        """Hold the folder if nobody else does; return whether it is held now. Raises OSError."""
        if self._lease is None:
            try:
                self._lock.acquire(blocking=False)
            except (Timeout, _Replaced):
                return False
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    with naming(self._file):  # the system call's error has no path
                        raise
            else:
                if not self._lease_file.exists():  # else a host without such locks has a lease, which counts
                    self._held = True
                    return True
            self._lease = SoftFileLease(
                self._lease_file,
                lease_duration=LEASE_SECONDS,
                heartbeat_interval=LEASE_SECONDS / 6,
                on_compromise=self._lose,
                thread_local=False,
            )
        try:
            self._lease.acquire(blocking=False)
        except Timeout:
            return False
        self._held = True
        with suppress(OSError), regular_file(self._file).open("r+b", buffering=0) as file:
            self._sign(file.fileno())
        return True

    def holder(self) -> str:
        """Describe who holds the folder."""
        text = ""
        with suppress(OSError), regular_file(self._file).open("rb", buffering=0) as file:
            file.seek(1)  # Windows locks the first byte
            text = file.read().decode(errors="replace").strip()
        owner = self._lease and self._lease.owner
        if owner and not text.startswith(f"process {owner.pid} "):
            text = f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
        return text or "another process"

    def _is_ours(self) -> bool:
        """Whether the lock file is still the one that this process locked, and not a new file of that name."""
        try:
            return self._signed is None or os.path.samestat(os.stat(self._file), self._signed)
        except OSError:
            return False

    @property
    def by_lease(self) -> bool:
        """Whether a lease decides who holds the folder, not the system, which knows which processes are alive."""
        return self._lease is not None

    def pulse(self) -> tuple[int, int] | None:
        """The lease file's inode and mtime (ns), which a live holder changes every LEASE_SECONDS / 6, or None."""
        try:
            state = self._lease_file.stat()
        except OSError:
            return None
        return state.st_ino, state.st_mtime_ns

    def give_up_lease(self) -> None:
        """Remove a lease that filelock never takes over, because its holder died before signing it."""
        if self._lease is not None and self._lease.owner is None:
            self._lease.force_break()

    @property
    def _lease_file(self) -> Path:
        return self._file.with_name(self._file.name + ".lease")

    def _sign(self, number: int) -> None:
        """Write who holds the folder into the lock file, open as descriptor `number`."""
        try:
            if not os.path.samestat(os.stat(self._file), os.fstat(number)):
                raise _Replaced
        except FileNotFoundError:
            raise _Replaced from None
        self._signed = os.fstat(number)
        text = f"\nprocess {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        with suppress(OSError):  # a full disk: the folder is held all the same
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)
            os.write(number, text.encode())

    def _lose(self, what: LeaseCompromise) -> None:
        self.lost = what.reason
        logger.warning(
            "the lock of %s was lost (%s): this process did not touch it for %.0f s, and another may write there now",
            self._file.parent,
            what.reason,
            LEASE_SECONDS,
        )


class _Replaced(Exception):
    """The locked file no longer has its name, because its holder released the folder in the meantime."""


def _hold(file: Path, what: Path, otherwise: str, waiting: Callable[[str], None] | None) -> Hold:
    hold, told, pulse, since = Hold(file), False, None, time.monotonic()
    try:
        while not hold.take():
            before, pulse = pulse, hold.pulse()
            if pulse != before:
                since = time.monotonic()
            lives = not hold.by_lease or (None not in (before, pulse) and pulse != before)
            if waiting is None and lives:
                raise BadInput(f"{what} is being written by {hold.holder()}: {otherwise}")
            if not told:
                told = True
                if waiting is not None:
                    waiting(f"{what} is being written by {hold.holder()}: waiting until it is done (Ctrl-C ends this)")
                else:
                    logger.warning(
                        "%s is held by %s: checking for up to %.0f s whether it is still alive",
                        what,
                        hold.holder(),
                        LEASE_SECONDS,
                    )
            if hold.by_lease and time.monotonic() - since > 1.5 * LEASE_SECONDS:
                hold.give_up_lease()
            time.sleep(POLL_SECONDS)
    except BaseException:
        hold.release()
        raise
    return hold
