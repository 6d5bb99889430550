"""Maintain a cache folder: list what it holds, verify it, and delete what is no longer needed."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.caching.manifest import Manifest
from dpo_fast.caching.recipe import read_recipe, remedies
from dpo_fast.checksums import sha256_of
from dpo_fast.errors import BadInput
from dpo_fast.files import contents, read_json, remove_folder, rename_away
from dpo_fast.store import Recipe, damaged_records, locked, read_shard, remove_shard, shard_indices

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass
class Entry:
    """One folder of a cache: the entries of a recipe, or the manifest of a data set."""

    folder: Path
    about: str  # one line
    items: int
    bytes: int
    used: float  # seconds since the epoch


def entries(root: Path) -> list[Entry]:
    """List the folders of the cache at `root`, most recently used first. Raises BadInput if there is no such cache."""
    if not root.is_dir():
        raise BadInput(f"there is no cache folder {root}: name it with --latent_cache_dir")
    found = []
    for folder in sorted(contents(root)):
        mark, about, items = folder / "recipe.json", "", 0
        if mark.is_file() or shard_indices(folder):
            about, items = _about_recipe(mark)
        elif (mark := folder / "manifest.json").is_file():
            about = _about_pairs(mark)
        else:
            continue
        size = sum(file.stat().st_size for file in contents(folder) if file.is_file())
        used = (mark if mark.exists() else folder).stat().st_mtime
        found.append(Entry(folder, about, items, size, used))
    return sorted(found, key=lambda entry: -entry.used)


def verify(root: Path, *, remove: bool = False) -> Iterator[tuple[Path, str | None]]:
    """Check every file against its checksums; yield (path, None), or a damaged file's path and what is wrong.

    With `remove`, damaged files are deleted, so that the next build recreates them; raises BadInput if one is running.
    """
    for entry in entries(root):
        with locked(entry.folder, remedies()) if remove else nullcontext():
            if (entry.folder / "manifest.json").is_file():
                fault = _manifest_fault(entry.folder)
                if fault and remove:
                    remove_folder(rename_away(entry.folder))
                yield entry.folder, fault
                continue
            try:
                path = entry.folder / "recipe.json"
                recipe = read_recipe(path)
                if recipe.folder_name != entry.folder.name:
                    raise ValueError(f"it is the recipe of {recipe.folder_name}")
            except (FileNotFoundError, ValueError) as error:
                if remove:
                    path.unlink(missing_ok=True)
                yield path, f"{error}; its shards were not looked at"
                continue
            for path in shard_indices(entry.folder):
                fault = _shard_fault(path, recipe)
                if fault and remove:
                    remove_shard(path)
                yield path.with_suffix(".bin"), fault


def to_prune(found: list[Entry], *, unused_days: float | None, names: list[str], max_gib: float | None) -> list[Entry]:
    """Choose the folders to delete: those in `names`, those unused for longer than `unused_days`, and then the least
    recently used ones until the rest is at most `max_gib`. Raises BadInput for an unknown name."""
    unknown = set(names) - {entry.folder.name for entry in found}
    if unknown:
        raise BadInput(f"--name {' '.join(sorted(unknown))}: no such folder; `info` lists those there are")
    going = [entry for entry in found if entry.folder.name in names]
    if unused_days is not None:
        going += [e for e in found if e not in going and time.time() - e.used > unused_days * 86400]
    if max_gib is not None:
        left = sum(entry.bytes for entry in found if entry not in going)
        for entry in reversed(found):
            if left <= max_gib * 2**30:
                break
            if entry not in going:
                going.append(entry)
                left -= entry.bytes
    return going


def delete(entry: Entry) -> None:
    """Delete one folder. Raises BadInput if it is being built."""
    with locked(entry.folder, remedies()):
        going = rename_away(entry.folder)
    remove_folder(going)  # after its lock is released: NFS cannot delete a folder with an open file


def _shard_fault(path: Path, recipe: Recipe) -> str | None:
    try:
        shard = read_shard(path, recipe)
    except BadInput as error:
        return str(error)
    if sha256_of(shard.path) == shard.sha256:
        return None
    wrong = ", ".join(map(str, damaged_records(shard)))
    return f"its sha256 differs; damaged records: {wrong or 'none'}"


def _manifest_fault(folder: Path) -> str | None:
    try:
        Manifest(folder)
    except BadInput as error:
        return str(error)
    return None


def _about_recipe(file: Path) -> tuple[str, int]:
    """Describe a recipe and count its entries; finding what is unreadable is left to `verify`."""
    try:
        facts = read_json(file)["facts"]
        items = sum(len(read_json(path)["keys"]) for path in shard_indices(file.parent))
        shown = {k: v for k, v in facts.items() if isinstance(v, (str, int, float)) and k != "images"}
        return ", ".join(f"{name} {value}" for name, value in shown.items()), items
    except _UNREADABLE:
        return "damaged: see verify", 0


def _about_pairs(file: Path) -> str:
    try:
        return str(read_json(file)["description"])
    except _UNREADABLE:
        return "damaged: see verify"
