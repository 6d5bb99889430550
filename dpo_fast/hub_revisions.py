"""Which revision of a model or a data set was used: the hub's commit, or a digest of a local file or folder.

Nothing is fetched: the answer comes from the hub's cache, the metadata of a download or the files themselves.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path, PurePath, PureWindowsPath
from typing import Literal

from huggingface_hub import constants

from dpo_fast.files import exists, read_json, read_text, user_path

NOT_FETCHED, NOT_READABLE = "not fetched", "not readable"
_TABLES = ("*.jsonl", "*.parquet", "*.arrow")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_END = 1 << 20  # bytes read at the start and at the end of a local file


def revision_of(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    kind: Literal["model", "dataset"] = "model",
) -> str:
    """Return the current revision of `name`.

    name: a local file or folder, or a repository of the hub, OWNER/NAME. revision: branch, tag or commit; None: main.
    cache_dir: where the hub's downloads are; None: the hub's default.

    For a hub repository this is the commit to which its cache last resolved the revision, else the only one in the
    cache, or "not fetched"; `datasets` keeps its downloads in the hub's default cache, whatever its own cache_dir is.
    For a local folder it is the commit recorded by `hf download --local-dir`, or that of the cache snapshot it belongs
    to; else "files " and a digest of its files' names, sizes and first and last MiB, the same on every machine. For a
    pipeline the digest covers the parts that model_index.json names, for a data set the tables and JSONL files, not the
    images. Files that cannot be read give "not readable".
    """
    path = user_path(name)
    try:
        if exists(path):
            return _noted(path) or _in_snapshots(path) or f"files {_digest(path, kind)}"
    except OSError:  # this only records what was used, and must not end the run
        return NOT_READABLE
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / f"{kind}s--{str(name).replace('/', '--')}"
    wanted = revision or constants.DEFAULT_REVISION
    try:
        return read_text(folder / "refs" / wanted).strip()
    except (OSError, ValueError):
        commits = [path.name for path in folder.glob("snapshots/*")] if os.path.exists(folder) else []
        if wanted in commits or (revision is None and len(commits) == 1):
            return wanted if revision else commits[0]
        return NOT_FETCHED


def public_name(name: str | Path) -> str:
    """Return a name as published results show it: the last part of an absolute path; any other name unchanged.

    A slash and one more part (`/imagine a cat`) counts as a path only if that file exists.
    """
    name = str(name)
    path = PureWindowsPath(name) if re.match(r"[A-Za-z]:[\\/]|\\\\", name) else PurePath(name)
    if not (path.is_absolute() or name.startswith("~")):
        return name
    if name.startswith("/") and len(path.parts) <= 2 and not os.path.exists(name):
        return name
    return path.name or "local"


def public_names(revisions: Iterable[tuple[str | Path, str]]) -> dict[str, str]:
    """Return `public_name` -> revision, given (name, revision); equal public names are numbered from the second on."""
    shown: dict[str, str] = {}
    for place, revision in dict(revisions).items():
        name, number = public_name(place), 1
        while (key := name if number == 1 else f"{name} ({number})") in shown:
            number += 1
        shown[key] = revision
    return shown


def _digest(path: Path, kind: str) -> str:
    found = hashlib.blake2b(digest_size=8)
    for file in [path] if path.is_file() else _files(path, kind):
        name = file.name if file == path else file.relative_to(path).as_posix()
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            found.update(f"{name}\n{size}\n".encode(errors="surrogateescape"))
            opened.seek(0)
            found.update(opened.read(_END))
            opened.seek(max(_END, size - _END))
            found.update(opened.read(_END))
    return found.hexdigest()


def _files(folder: Path, kind: str) -> list[Path]:
    """The visible files of a folder, sorted; for a pipeline only its index and the files of its parts."""
    if kind == "dataset":  # it may hold a million images
        return sorted(file for pattern in _TABLES for file in folder.rglob(pattern) if _is_shown(file, folder))
    index = folder / "model_index.json"
    try:
        parts = {name for name in read_json(index) if (folder / name).is_dir()}
    except (OSError, ValueError, TypeError):
        parts = None
    files = sorted(file for file in folder.rglob("*") if _is_shown(file, folder))
    if parts is None:
        return files
    return [file for file in files if file == index or file.relative_to(folder).parts[0] in parts]


def _is_shown(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _noted(folder: Path) -> str | None:
    """The commit that all metadata files of a download into this folder name; None if a file has changed since.

    A metadata file has three lines: commit, etag, and the time of the download.
    """
    notes, commits = folder / ".cache" / "huggingface" / "download", set()
    for note in notes.glob("**/*.metadata"):
        try:
            commit, _, time = read_text(note).split()
            file = folder / note.relative_to(notes).with_suffix("")
            if file.stat().st_mtime - 1 > float(time):  # the tolerance of huggingface_hub
                return None
        except (OSError, ValueError):
            return None
        commits.add(commit)
    return commits.pop() if len(commits) == 1 and _COMMIT.fullmatch(min(commits)) else None


def _in_snapshots(path: Path) -> str | None:
    """`.../snapshots/COMMIT/...` -> COMMIT."""
    parts = path.absolute().parts
    for above, commit in pairwise(parts):
        if above == "snapshots" and _COMMIT.fullmatch(commit):
            return commit
    return None
