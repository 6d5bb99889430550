"""Files and folders appear whole or not at all, with the usual permissions."""

import errno
import json
import math
import os
import resource
import shutil
import socket
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dpo_fast.errors import DISK_ERRORS, BadInput, disk_error
from dpo_fast.files import (
    atomic_file,
    atomic_folder,
    check_writable,
    contents,
    filled,
    flush,
    free_bytes,
    human_seconds,
    naming,
    nearest_folder,
    regular_file,
    regular_files,
    remove_temporaries,
    remove_temporaries_of,
    rename_away,
    user_path,
    write_json,
    write_text,
)
from tests.helpers.kills import killed_before_each_call


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def largest_file(size: int):
    """Writing a file beyond `size` bytes is an I/O error here, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    write_text(path, "old")
    with umask(0o027), atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new é", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new é"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert entries(tmp_path) == {"sub", "sub/file.txt"}


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_a_fault_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(fault), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise fault
    assert path.read_text() == "old" and entries(tmp_path) == {"file.txt"}


def test_a_folder_replaces_what_was_there(tmp_path):
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with umask(0o022), atomic_folder(path) as temporary:
            (temporary / content).write_text(content)
            (temporary / content).chmod(0o600)  # as libraries leave their files
            assert not (path / content).exists()
    assert entries(tmp_path) == {"folder", "folder/new"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert stat.S_IMODE((path / "new").stat().st_mode) == 0o644


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_a_fault_leaves_the_old_folder(tmp_path, fault):
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "old").touch()
    with pytest.raises(fault), atomic_folder(path) as temporary:
        (temporary / "half").touch()
        raise fault
    assert entries(tmp_path) == {"folder", "folder/old"}


def test_what_reaches_the_disk_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.touch()
        file = str(temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").touch()
        folder = str(temporary)
    assert flushed == [file, f"{folder}/sub/a"]


@pytest.mark.faults
def test_a_disk_fault_inside_safetensors_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="File too large") as caught, largest_file(64 * 1024):
        with atomic_folder(tmp_path / "folder") as temporary:
            save_file({"a": torch.zeros(256 * 1024)}, temporary / "a.safetensors")
    assert caught.value.errno == 27 and caught.value.filename
    assert entries(tmp_path) == set()


def test_other_faults_of_safetensors_stay_what_they_are(tmp_path):
    with pytest.raises(SafetensorError, match="invalid header"), filled(tmp_path):
        raise SafetensorError("invalid header")


def test_leftovers_are_removed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".tmp-kept").touch()
    folder = tmp_path / "folder"
    for name in ("kept", ".lock", ".tmp-file", ".tmp-folder/file", "samples/.tmp-a.png", "samples/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "link").symlink_to(outside)
    (folder / ".tmp-link").symlink_to(outside)
    assert {path.name for path in contents(folder)} == {"kept", "samples", "link"}
    remove_temporaries(folder)
    assert entries(folder) == {"kept", ".lock", "samples", "samples/.tmp-a.png", "samples/a.png", "link"}
    remove_temporaries(folder, deep=True)
    assert entries(folder) == {"kept", ".lock", "samples", "samples/a.png", "link"}
    assert entries(outside) == {".tmp-kept"}
    assert contents(tmp_path / "missing") == []


def test_leftovers_of_one_file_are_told_from_those_of_others(tmp_path):
    name = "pairs-" + "x" * 60 + ".parquet"
    for left in (name, name[1:], "other.parquet"):
        with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / left) as temporary:
            shutil.copy(__file__, temporary.with_name(temporary.name[:5] + "abcdefgh" + temporary.name[13:]))
            raise KeyboardInterrupt
    assert len(entries(tmp_path)) == 2  # the end of a long name stands for it
    remove_temporaries_of(tmp_path / name)
    assert entries(tmp_path) == {".tmp-abcdefgh-other.parquet"}


def test_the_longest_names_can_be_written(tmp_path):
    write_text(tmp_path / ("é" * 127), "long")
    assert (tmp_path / ("é" * 127)).read_text() == "long"


@pytest.mark.faults
def test_a_file_survives_a_kill_at_any_moment(tmp_path):
    path = tmp_path / "file.txt"

    def prepare() -> None:
        remove_temporaries(tmp_path)
        write_text(path, "old")

    for _ in killed_before_each_call(prepare, lambda: write_text(path, "new")):
        assert path.read_text() in ("old", "new")
        remove_temporaries(tmp_path)
        assert entries(tmp_path) == {"file.txt"}
    assert path.read_text() == "new"


@pytest.mark.faults
@pytest.mark.parametrize("replacing", [False, True])
def test_a_folder_survives_a_kill_at_any_moment_and_so_does_its_recovery(tmp_path, replacing):
    path = tmp_path / "folder"

    def write(text: str) -> None:
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text(text)
            (temporary / "b").write_text(text)

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        if replacing:
            write("old")

    def whole() -> bool:
        return not path.exists() or [(path / name).read_text() for name in "ab"] in (["old"] * 2, ["new"] * 2)

    seen = set()
    for _ in killed_before_each_call(prepare, lambda: write("new")):
        seen.add(path.exists())
        assert whole()
        left = tmp_path.parent / "left"  # as the kill left it
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(tmp_path, left)

        def back() -> None:
            shutil.rmtree(tmp_path)
            shutil.copytree(left, tmp_path)  # noqa: B023

        for _ in killed_before_each_call(back, lambda: remove_temporaries(tmp_path)) if replacing else ():
            assert whole()
        remove_temporaries(tmp_path)
        assert whole() and entries(tmp_path) <= {"folder", "folder/a", "folder/b"}
        assert path.exists() or not replacing
    assert False in seen  # at some moment nothing has the name, which the recovery mends
    assert (path / "a").read_text() == "new"


@pytest.mark.faults
@pytest.mark.parametrize("number", DISK_ERRORS)
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkstemp"])
def test_errors_of_the_disk_carry_the_path_and_leave_the_old_file(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def failing(*anything, **more):
        raise OSError(number, os.strerror(number))

    if call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, failing)
    if call == "mkstemp":
        monkeypatch.setattr("tempfile.mkstemp", failing)
    with pytest.raises(OSError) as caught, atomic_file(path) as temporary:
        temporary.write_text("half")
        if call == "write":
            failing()
    assert caught.value.errno == number and caught.value.filename
    monkeypatch.undo()
    assert path.read_text() == "old" and entries(tmp_path) == {"file.txt"}


@pytest.mark.faults
@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, failing_call):
    path, replace, calls = tmp_path / "folder", os.replace, []
    with atomic_folder(path) as temporary:
        (temporary / "old").touch()

    def failing(source, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError), atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert entries(tmp_path) == {"folder", "folder/old"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_flush_or_change_modes_is_good_enough(tmp_path, monkeypatch, number):
    def failing(*anything):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(os, "chmod", failing)
    write_text(tmp_path / "file", "text")
    flush(tmp_path)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
    assert entries(tmp_path) == {"file", "folder", "folder/file"}


def test_errors_of_the_disk_are_found_behind_those_of_libraries():
    loader = OSError(
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "OSError: [Errno 5] Input/output error: '/mnt/a b.parquet'\n"
    )
    found = disk_error(loader)
    assert (found.errno, found.filename) == (5, "/mnt/a b.parquet")
    assert (
        disk_error(SafetensorError("Error while serializing: I/O error: Stale file handle (os error 116)")).errno == 116
    )
    of_tokenizers = Exception("Device or resource busy (os error 16)")
    assert disk_error(of_tokenizers).errno == errno.EBUSY
    assert disk_error(Exception("no such token")) is None
    with pytest.raises(OSError, match=r"busy.*tokenizer\.json"), naming(Path("tokenizer.json")):
        raise of_tokenizers
    with pytest.raises(ValueError, match="os error 16"), naming(Path("x")):
        raise ValueError("os error 16")
    assert disk_error(OSError("Detail: [errno 28] No space left on device")).errno == errno.ENOSPC
    wrapped = RuntimeError("An error occurred while generating the dataset")
    wrapped.__cause__ = PermissionError(errno.EACCES, "Permission denied", "/data")
    assert disk_error(wrapped) is wrapped.__cause__
    for other in (
        None,
        RuntimeError("[Errno 5]"),
        OSError("no number"),
        FileNotFoundError(2, "x"),
        ConnectionError(111),
    ):
        assert disk_error(other) is None


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    for name in ("file", "folder/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for path in (tmp_path / "file", tmp_path / "missing", Path("x" * 5000), Path("a\0b")):
        assert regular_file(path) == path
    regular_files(tmp_path)
    regular_files(tmp_path / "missing")
    os.mkfifo(tmp_path / "folder" / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        os.chdir(tmp_path)  # its name may be 108 letters long
        unix.bind("socket")
    for path, kind in [
        (tmp_path / "link", "a FIFO"),
        (tmp_path / "socket", "a socket"),
        (tmp_path / "folder", "a folder"),
        (Path("/dev/zero"), "a device"),
    ]:
        with pytest.raises(BadInput, match=f"^--config {path} is {kind}"):
            regular_file(path, "--config")
    (tmp_path / "socket").unlink()
    (tmp_path / "link").unlink()
    with pytest.raises(BadInput, match=r"folder/fifo is a FIFO"):
        regular_files(tmp_path)


def test_a_folder_that_is_deleted_has_no_name_while_it_is(tmp_path):
    for name in ("folder/a", ".tmp-gone-folder/half-deleted"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    going = rename_away(tmp_path / "folder")
    assert contents(tmp_path) == [] and entries(going) == {"a"}


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}


def test_a_path_of_the_user_names_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~") == Path("/home/me") and user_path("~/x") == Path("/home/me/x")
    assert user_path("~nobody-has-this-name/x") == Path("~nobody-has-this-name/x")
    assert user_path("a/~") == Path("a/~") and user_path("") == Path()
    for name in ("~root", "~notes.txt"):  # a user of most systems, and of none
        Path(name).touch()
        assert user_path(name) == Path(name)


def test_the_folder_on_whose_disk_a_path_will_be(tmp_path):
    assert nearest_folder(tmp_path / "a" / "b" / "c") == tmp_path
    assert nearest_folder(tmp_path) == tmp_path
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)


def test_what_can_be_written_is_found_without_writing(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "a")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.1, "1 s"),
        (119, "119 s"),
        (120, "2 minutes"),
        (7199, "120 minutes"),
        (7200, "2.0 hours"),
        (360_000, "100.0 hours"),
    ],
)
def test_durations(seconds, shown):
    assert human_seconds(seconds) == shown
