"""Pair up the images of two sides, row by row of the same prompt, wherever the images come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpo_fast.data.image_files import Files
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.image_names import PromptImage
from dpo_fast.evaluation.prompts import Prompt

UNCATEGORISED = "no category"


@dataclass(frozen=True)
class ImagePairs:
    """Pairs of images: each row has one prompt, one seed and one file per side."""

    prompts: list[str]
    seeds: list[int]
    categories: list[str] | None  # None: no prompt has one
    base: Files
    policy: Files
    remarks: list[str]  # on what was left out or used twice, one line each


class _Row(NamedTuple):
    seed: int
    base: PromptImage
    policy: PromptImage


def pair_up(
    prompts: Sequence[Prompt],
    seeds: Mapping[str, Sequence[int]] | None,  # of each prompt's images; None: as many as the side with fewer has
    base: Mapping[str, Sequence[PromptImage]],  # prompt -> its images
    policy: Mapping[str, Sequence[PromptImage]],
    names: tuple[str, str],  # of base and policy, for the remarks
) -> ImagePairs:
    """Pair images of the same seed where both sides know theirs, and the other images in order.

    With `seeds`, a side that has fewer images reuses them in turn. A repeated prompt counts once. Raises BadInput if no
    prompt has images on both sides.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    remarks, sides = [], (base, policy)
    for name, side in zip(names, sides, strict=True):
        if absent := sum(text not in side for text in first):
            remarks.append(f"{absent} of {len(first)} prompts have no image in {name} and are left out")
        if seeds is not None and (few := sum(len(side[text]) < len(seeds[text]) for text in first if text in side)):
            remarks.append(f"{few} prompts have fewer images in {name} than seeds: some stand in several pairs")
    texts = [text for text in first if text in base and text in policy]
    if not texts:
        raise BadInput(
            f"no prompt has an image in both {names[0]} and {names[1]} ({'; '.join(remarks)}): images are found by"
            " their names, which must be the prompts (letters and digits count)"
        )
    rows = [(text, row) for text in texts for row in _rows(seeds and seeds[text], base[text], policy[text])]
    known = [row for _, row in rows if None not in (row.base.seed, row.policy.seed)]
    if other := sum(row.base.seed != row.policy.seed for row in known):
        remarks.append(f"{other} of {len(rows)} pairs are of different noise: their seeds differ")
    categories = [first[text].category or UNCATEGORISED for text, _ in rows]
    return ImagePairs(
        [text for text, _ in rows],
        [row.seed for _, row in rows],
        categories if any(first[text].category for text in texts) else None,
        Files([row.base.file for _, row in rows]),
        Files([row.policy.file for _, row in rows]),
        remarks,
    )


def _rows(seeds: Sequence[int] | None, base: Sequence[PromptImage], policy: Sequence[PromptImage]) -> list[_Row]:
    """Return the pairs of one prompt."""
    sides = (base, policy)
    if seeds is None:
        common = {image.seed for image in base} & {image.seed for image in policy} - {None}
        named = [{image.seed: image for image in side if image.seed in common} for side in sides]
        rows = [_Row(seed, named[0][seed], named[1][seed]) for seed in named[0]]
        rest = [[image for image in side if image.seed not in common] for side in sides]
        return rows + [_Row(k, *both) for k, both in enumerate(zip(*rest, strict=False), start=len(rows))]
    found = []
    for side in sides:
        named = {image.seed: image for image in side if image.seed in seeds}
        rest = [image for image in side if image.seed not in named] or list(side)
        left = [seed for seed in seeds if seed not in named]
        found.append(named | {seed: rest[k % len(rest)] for k, seed in enumerate(left)})
    return [_Row(seed, found[0][seed], found[1][seed]) for seed in seeds]
