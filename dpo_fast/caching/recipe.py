"""The stores of the cache: how their entries are keyed, and what to do about a damaged one."""

import hashlib
import os
from pathlib import Path
from typing import Any

from dpo_fast.data.images import ImageKey
from dpo_fast.files import read_json, user_path
from dpo_fast.store import KEY_BYTES, Field, Recipe, Remedies


def caption_key(caption: str) -> bytes:
    """The key of a caption's prompt embeddings, KEY_BYTES long."""
    return hashlib.blake2b(caption.encode(), digest_size=KEY_BYTES).digest()


def mirrored(key: ImageKey) -> ImageKey:
    """The key of an image's mirror image."""
    return ImageKey(hashlib.blake2b(key, digest_size=KEY_BYTES, person=b"mirrored").digest())


def remedies(kind: str = "latents") -> Remedies:
    """The remedies that the cache's error messages suggest."""
    command = "reference --draws K" if kind == "reference" else "build"
    return Remedies(
        flag="--latent_cache_dir",
        name="the cache folder",
        unwritable="name another --latent_cache_dir, or train with --no-cache; what is complete can be read as it is",
        damaged="`python -m dpo_fast.cache verify --remove --latent_cache_dir {root}` removes damaged shards, and a"
        " build or the next run encodes them again",
        lost=f"`python -m dpo_fast.cache {command}` with the flags of the run makes it again",
    )


def cache_recipe(kind: str, facts: dict[str, Any], fields: tuple[Field, ...]) -> Recipe:
    """The recipe of a store of the cache; `kind` is latents, text or reference."""
    return Recipe(kind, facts, fields, remedies(kind))


def read_recipe(file: Path) -> Recipe:
    """Read a recipe.json of the cache. Raises OSError, and ValueError for a file that is not a recipe."""
    recipe = Recipe.from_json(read_json(file))
    return cache_recipe(recipe.kind, recipe.facts, recipe.fields)


def default_root() -> Path:
    """Where the cache is kept by default: $DPO_FAST_CACHE, or dpo_fast in $HF_HOME or in ~/.cache."""
    if given := os.environ.get("DPO_FAST_CACHE"):
        return user_path(given)
    return user_path(os.environ.get("HF_HOME") or "~/.cache") / "dpo_fast"
