"""Files and folders appear whole or not at all, with the usual permissions."""

import json
import math
import os
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dpo_fast.files import atomic_file, atomic_folder, filled, remove_temporaries, user_path, write_json, write_text


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
    (tmp_path / "kept").touch()
    (tmp_path / ".tmp-file").touch()
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "file").touch()
    remove_temporaries(tmp_path)
    assert entries(tmp_path) == {"kept"}


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
