"""What a cache already holds of the pairs that a run needs, as far as it shows without loading the model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_fast.caching.manifest import Manifest
from dpo_fast.caching.recipe import caption_key, mirrored, read_recipe
from dpo_fast.checksums import Damaged
from dpo_fast.errors import BadInput
from dpo_fast.models.fingerprints import token_facts
from dpo_fast.store import Store


class Known(NamedTuple):
    """What is known of the rows that a run needs, and what of them is kept.

    Which latents belong to a run depends on its VAE's weights, and which embeddings on its text encoders': the fullest
    store of latents of the run's resolution and the fullest store of embeddings of its max_token_length are counted,
    which may be of other models.
    """

    needed: int  # rows
    rows: int  # of them, whose images were hashed, in this process or before
    images: int  # different ones in those
    latents_needed: int  # mirror images included; those of other rows as if no image recurred
    latents: int  # of these, kept
    captions: int  # different ones
    embeddings: int  # of these, kept


def known_of(
    root: Path,
    manifest: Manifest,
    rows: Sequence[int],
    captions: Iterable[str],
    *,
    resolution: int,
    hflip: bool,
    max_token_length: int,
) -> Known:
    """Count what the cache at `root` holds of some rows and their captions. Damaged stores count as empty."""
    hashed = [row for row in rows if row in manifest]
    images = {key for row in hashed for key in manifest.images(row) if isinstance(key, bytes)}
    wanted = {*images, *map(mirrored, images)} if hflip else images
    texts = {caption_key(caption) for caption in captions}
    return Known(
        len(rows),
        len(hashed),
        len(images),
        len(wanted) + 2 * (1 + hflip) * (len(rows) - len(hashed)),
        _most_kept(root, "latents", wanted, resolution=resolution),
        len(texts),
        _most_kept(root, "text", texts, **token_facts(max_token_length)),
    )


def _most_kept(root: Path, kind: str, keys: set[bytes], **facts: object) -> int:
    """Return how many of the keys the store of that kind and with those facts has that has most of them."""
    most = 0
    for file in root.glob(f"{kind}-*/recipe.json"):
        try:
            recipe = read_recipe(file)
            if all(recipe.facts.get(name) == value for name, value in facts.items()):
                most = max(most, len(keys & Store(root, recipe).keys()))
        except (BadInput, Damaged, OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # the run will say what is wrong with it, if it is its own
    return most
