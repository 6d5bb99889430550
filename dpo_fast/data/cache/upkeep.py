"""Looking after a cache folder: what it holds, whether it is whole, and what may go."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dpo_fast.data.cache.recipe import Recipe
from dpo_fast.data.cache.store import Damaged, locked, read_shard, remove_shard, sha256_of, shard_indices
from dpo_fast.errors import BadInput


@dataclass
class Entry:
    """One folder of a cache: the entries of a recipe, or what is known of a data set's images."""

    folder: Path
    about: str  # one line
    items: int
    bytes: int
    used: float  # seconds since the epoch


def entries(root: Path) -> list[Entry]:
    """Every folder of the cache at `root`, the one used last first. Raises BadInput where there is none."""
    if not root.is_dir():
        raise BadInput(f"there is no cache folder {root}: name it with --latent_cache_dir")
    found = []
    for folder in sorted(root.iterdir()):
        if (folder / "recipe.json").is_file():
            indices = shard_indices(folder)
            items = sum(len(json.loads(path.read_text(encoding="utf-8"))["keys"]) for path in indices)
            about, mark = _about_recipe(folder), folder / "recipe.json"
        elif folder.name.startswith("pairs-") and (folder / "manifest.json").is_file():
            about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["description"]
            items, mark = 0, folder / "manifest.json"
        else:
            continue
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        found.append(Entry(folder, about, items, size, mark.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def verify(root: Path, *, remove: bool = False) -> Iterator[tuple[Path, str | None]]:
    """Read every shard and compare it with its checksums: (path, None), or the path of a damaged one and what is wrong.

    With `remove` damaged shards are deleted, so that the next build encodes them again.
    """
    for entry in entries(root):
        if not (entry.folder / "recipe.json").is_file():
            continue
        try:
            recipe = Recipe.from_json(json.loads((entry.folder / "recipe.json").read_text(encoding="utf-8")))
        except ValueError as error:
            yield entry.folder / "recipe.json", str(error)
            continue
        for path in shard_indices(entry.folder):
            fault = _fault(path, recipe)
            if fault and remove:
                remove_shard(path)
            yield path.with_suffix(".bin"), fault


def to_prune(found: list[Entry], *, unused_days: float | None, names: list[str], max_gib: float | None) -> list[Entry]:
    """Which folders to delete: those named, those not used for so long, and then the longest unused beyond a size."""
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
    """Delete one folder. Raises BadInput where it is being built."""
    with locked(entry.folder):
        shutil.rmtree(entry.folder)


def _fault(path: Path, recipe: Recipe) -> str | None:
    try:
        shard = read_shard(path, recipe)
    except (Damaged, BadInput) as error:
        return str(error)
    if sha256_of(shard.path) == shard.sha256:
        return None
    pairs = zip(shard.records, shard.checksums, strict=True)
    wrong = [str(row) for row, (record, checksum) in enumerate(pairs) if xxhash.xxh3_64_intdigest(record) != checksum]
    return f"its sha256 differs; damaged records: {', '.join(wrong) or 'none'}"


def _about_recipe(folder: Path) -> str:
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    facts = {k: v for k, v in recipe.get("facts", {}).items() if isinstance(v, (str, int, float)) and k != "images"}
    return ", ".join(f"{name} {value}" for name, value in facts.items())
