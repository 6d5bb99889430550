"""File systems that fill up, and calls to them that fail."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A new folder that is a file system of `size` ("512k"). Skips the test where that cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


_faults: list[tuple[str, str, int]] = []  # (event, end of a path, errno) that the hook raises now


def _fail(event: str, arguments: tuple) -> None:
    for wanted, end, number in _faults:
        if event == wanted:
            writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            for path in arguments if event == "os.rename" else arguments[:1]:
                if writes and isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(end):
                    raise OSError(number, os.strerror(number), os.fspath(path))


@cache
def _install() -> None:
    sys.addaudithook(_fail)  # there is no way to remove one


@contextmanager
def failing(event: str, end: str, number: int) -> Iterator[None]:
    """Calls to the file system fail with `number` where the path ends with `end`.

    event: "open" (for writing), "os.rename", "os.mkdir" or "os.listdir", as Python audits them, or "fsync".
    """
    if event == "fsync":
        real = os.fsync

        def fsync(file: int) -> None:
            if os.readlink(f"/proc/self/fd/{file}").endswith(end):
                raise OSError(number, os.strerror(number))
            real(file)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield
        return
    _install()
    _faults.append((event, end, number))
    try:
        yield
    finally:
        _faults.pop()
