"""Atomic writes of files and folders: a temporary name beside the target, then a rename. Also reading and paths.

What a killed process leaves has a temporary name, and the next holder of the folder deletes it (`remove_temporaries`).
Disk errors carry the path.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_fast.errors import BadInput, disk_error, may_be_of_disk

LOCK = ".lock"  # prefix of the files of `locks`
_TEMPORARY = ".tmp-"
_REPLACED = ".tmp-old-"  # followed by the name of a folder that is being replaced
_GOING = ".tmp-gone-"  # followed by the name of a folder that is being deleted
_NOT_CONTENT = (_TEMPORARY, LOCK, ".nfs")  # .nfs: NFS's name for a file that was deleted while open
# errors of file systems that cannot flush folders (Windows: files opened for reading) or change modes
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)
NO_HOME = (
    "no home folder is known (HOME is not set, and this user has no passwd entry): set HOME to a folder that you can"
    " write; caches go there, where --latent_cache_dir, --cache_dir and HF_HOME name no others"
)
_KINDS = {
    stat.S_IFIFO: "a FIFO (or the end of a pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed over `path`, on error removed.

    Raises OSError, with the path. A kill at any moment leaves the earlier file or the new one, and at most a temporary
    file beside it.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=_suffix(path), dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            flush(Path(name))
            _open_to_others(Path(name), 0o666)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the name `path`, replacing any earlier folder.

    Raises OSError, with the path. A process may be killed at any moment; the next holder of the parent folder calls
    `remove_temporaries`, which leaves, after a kill

    - while the temporary folder is being filled: the earlier folder, if there was one;
    - between the two renames, when nothing has the name `path`: the earlier folder, with its name restored;
    - while the earlier folder is being deleted: the new one, because the earlier one has a temporary name by then.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, suffix=_suffix(path), dir=path.parent))
        replaced = path.parent / f"{_REPLACED}{path.name}"
        try:
            with filled(temporary):
                yield temporary
            _open_to_others(temporary, 0o777)
            if os.path.lexists(path):
                _recover_folder(replaced)
                os.replace(path, replaced)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                _recover_folder(replaced)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _recover_folder(replaced)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """For a block that writes files into `folder`: at its end they get the usual permissions and are flushed to disk.

    Some libraries leave their files private. A disk error that a library reports in its own way (safetensors) is
    raised as OSError with its errno.
    """
    folder = Path(folder)
    with naming(folder):
        yield
        for path in folder.rglob("*"):
            if path.is_file():
                _open_to_others(path, 0o666)
                flush(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise disk errors of the block as OSErrors with an errno, and with `path` if they name no path."""
    try:
        yield
    except Exception as error:
        found = disk_error(error) if may_be_of_disk(error) else None
        if found is None or (found is error and error.filename is not None):
            raise
        raise OSError(found.errno, found.strerror, str(found.filename or path)) from error


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk, if the file system supports that. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # Windows cannot open folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def is_content(name: str) -> bool:
    """Whether a name in a folder is that of a user's or a command's file, not of a lock or a temporary file."""
    return not name.startswith(_NOT_CONTENT)


def contents(folder: Path) -> list[Path]:
    """List a folder's entries without locks and temporaries; a missing folder has none. Raises OSError."""
    try:
        return [entry for entry in Path(folder).iterdir() if is_content(entry.name)]
    except FileNotFoundError:
        return []


def has_temporaries(folder: Path) -> bool:
    """Whether killed processes left something half-written in `folder`."""
    return next(Path(folder).glob(_TEMPORARY + "*"), None) is not None


def remove_temporaries(folder: Path, *, deep: bool = False) -> None:
    """Delete what killed processes left half-written in `folder`, and with `deep` in all folders under it.

    The caller must hold `folder` (`locks.hold`), or a running process would lose its files. A folder that was being
    replaced gets its name back if nothing else has it (`atomic_folder`). Raises OSError.
    """
    folder = Path(folder)
    if deep:
        for root, names, _ in os.walk(folder):
            names[:] = [name for name in names if is_content(name)]
            remove_temporaries(Path(root))
        return
    for leftover in folder.glob(_TEMPORARY + "*"):
        if leftover.name.startswith(_REPLACED):
            _recover_folder(leftover)
        else:
            delete(leftover)


def remove_temporaries_of(path: Path) -> None:
    """Delete only what killed processes left of `path`. The caller must hold the file (`locks.hold_file`)."""
    path = Path(path)
    for leftover in path.parent.glob(_TEMPORARY + "*"):
        if leftover.name.endswith(_suffix(path)) and len(leftover.name) == len(f"{_TEMPORARY}12345678{_suffix(path)}"):
            delete(leftover)


def rename_away(folder: Path) -> Path:
    """Give a folder a temporary name, so that nobody finds it half-deleted; the caller deletes the returned path.

    The remains of an earlier deletion of that folder are deleted first. Raises OSError.
    """
    going = folder.with_name(f"{_GOING}{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    return going


def remove_folder(folder: Path) -> None:
    """Delete a folder and all that is in it. Raises OSError with its path."""
    try:
        shutil.rmtree(folder)
    except OSError as error:  # the error's own path is relative to the folder
        raise OSError(error.errno, error.strerror, str(folder)) from error


def regular_file(path: Path, flag: str = "") -> Path:
    """Return `path` unchanged if it is a file or missing. Raises BadInput for anything else, without opening it.

    Opening a FIFO waits until somebody writes into it, and a device may yield bytes without end. The message begins
    with `flag`.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):  # opening it will report the error
        return path
    if kind != stat.S_IFREG:
        raise BadInput(f"{flag + ' ' if flag else ''}{path} is {_KINDS.get(kind, 'no file')}: name a regular file")
    return path


def read_bytes(path: Path) -> bytes:
    """Read the bytes of a regular file. Raises BadInput like `regular_file`, and OSError with the path."""
    with naming(path):
        return regular_file(Path(path)).read_bytes()


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8 text. Raises like `read_bytes`, and ValueError if it is not UTF-8."""
    return read_bytes(path).decode()


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Call `json.loads`. Raises ValueError for anything it cannot parse, even if nested too deeply for Python."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read the value in a JSON file. Raises like `read_bytes`, and ValueError if it is not JSON in UTF-8."""
    return parse_json(read_text(path))


def exists(path: Path) -> bool:
    """Whether a path exists; one that no file can have (too long, with a null character) does not. Raises OSError."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False
        raise
    return True


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists: what is written to `path` will be on its disk."""
    place = Path(path).absolute()
    while not exists(place) and place != place.parent:
        place = place.parent
    return place


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that `path`, which need not exist, is on. Raises OSError."""
    return shutil.disk_usage(nearest_folder(path)).free


def check_writable(folder: Path) -> None:
    """Raise OSError unless `folder`, which need not exist, can be written, as far as that shows without writing."""
    place = nearest_folder(folder)
    if not place.is_dir():
        number = errno.ENOTDIR
    elif os.access(place, os.W_OK | os.X_OK):
        return
    else:
        read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
    raise OSError(number, os.strerror(number), str(place))


def file_name(text: str) -> str:
    """Return the path for a text, as Python must pass it to the system: UTF-8 on disk, even in an ASCII locale.

    Raises ValueError for a lone surrogate.
    """
    return os.fsdecode(text.encode())


def is_inside(name: object) -> bool:
    """Whether a name found in a file stays below the folder it is relative to: not absolute, and without `..`."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def regular_files(path: Path) -> None:
    """Raise BadInput if `path`, or an entry up to two levels below it, is neither a regular file nor a folder."""
    for entry in (path, *path.glob("*"), *path.glob("*/*")) if path.is_dir() else (path,):
        if not entry.is_dir():
            regular_file(entry)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Raises OSError."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. Raises OSError, and ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def user_path(name: str | Path) -> Path:
    """Return the path that a user means by `name`: `name` itself, except for a leading `~`.

    `~` and `~/...` refer to the home folder. `~name` is a file of that name if there is one, else the home folder of
    the user `name` if there is such a user. Raises BadInput for `~` if no home folder is known.
    """
    path = Path(name)
    first = path.parts[0] if path.parts else ""
    if not first.startswith("~") or (first != "~" and exists(path)):
        return path
    if first == "~" and not has_home():  # or a folder named ~ would be created
        raise BadInput(f"{name}: {NO_HOME}")
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def has_home() -> bool:
    """Whether a home folder is known; it is not in a container whose user has neither HOME nor a passwd entry."""
    return not os.path.expanduser("~").startswith("~")


def human_bytes(size: float) -> str:
    """Format a number of bytes in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def human_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours, at least 1 s."""
    if seconds < 120:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _suffix(path: Path) -> str:
    """The end of a temporary file's name, cut so that the prefix fits even for the longest names."""
    return "-" + os.fsdecode(os.fsencode(path.name)[-64:])


def _recover_folder(replaced: Path) -> None:
    """Give a folder that was being replaced its name back; if the new one has the name, delete the old one."""
    if not os.path.lexists(replaced):
        return
    path = replaced.with_name(replaced.name.removeprefix(_REPLACED))
    if not os.path.lexists(path):
        os.replace(replaced, path)
        return
    going = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=replaced.parent))
    os.replace(replaced, going / path.name)  # once half-deleted, it must not get its name back
    remove_folder(going)


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it, if it exists. Raises OSError with its path."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def _open_to_others(path: Path, mode: int) -> None:
    """Set the usual permissions, if the file system has any."""
    try:
        os.chmod(path, mode & ~_umask())
    except OSError as error:
        if error.errno not in (*_NOT_OFFERED, errno.EPERM):
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
