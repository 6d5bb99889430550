"""Writing files and folders whole or not at all: a temporary name beside the target, then a rename. Sizes in words."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY = ".tmp-"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed over `path`, on error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix="-" + path.name, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the name `path`, replacing what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, suffix="-" + path.name, dir=path.parent))
    try:
        with filled(temporary):
            yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=_TEMPORARY, suffix="-old", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Within the block files are written into `folder`; at its end they are readable as usual and flushed to disk.

    Some libraries leave their files private. A fault of the disk that safetensors reports in its own way is raised as
    OSError with the number it has.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    for path in Path(folder).rglob("*"):
        if path.is_file():
            os.chmod(path, 0o666 & ~_umask())
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`."""
    for leftover in Path(folder).glob(_TEMPORARY + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def user_path(name: str | Path) -> Path:
    """The path that a user means by `name`: that very file, but for a leading `~`.

    `~` and `~/...` are the home folder. `~name` is a file of that name where there is one, else the home folder of the
    user `name` where there is such a user.
    """
    path = Path(name)
    first = path.parts[0] if path.parts else ""
    if not first.startswith("~") or (first != "~" and path.exists()):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def in_words(size: float) -> str:
    """A number of bytes as people read it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
