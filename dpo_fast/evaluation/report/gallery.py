"""Choose the pairs of images that a page shows, and shrink them to fit."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.signals import Images
from dpo_fast.pictures import amplification, amplified, difference, to_picture

DEEP = 8  # pairs in a list over all prompts
DEEP_IN_CATEGORY = 4
QUALITY = 82  # of WebP
LOSSLESS = 64  # pixels: images no larger are kept as they are
SMALLEST = 96  # pixels: thumbnails are not made smaller than this


class Role(NamedTuple):
    """Why a pair is shown: among the best or worst by a scorer, or drawn at random, of all pairs or of one category."""

    kind: str  # best, worst, random
    scorer: str | None  # None: random
    category: str | None


@dataclass
class Shown:
    """A row of the scores, and its position (from 0) in each list that it belongs to."""

    row: int
    roles: dict[Role, int] = field(default_factory=dict)


def choose(scored: Scored, max_pairs: int, seed: int = 0) -> list[Shown]:
    """Choose at most `max_pairs` pairs, with the lists that each belongs to, in the order of the lists.

    The lists are the best (largest gain of the policy over the base) and the worst pairs by each scorer, and pairs
    drawn at random with `seed`; then the same for each category, as far as there is room. A list has a prompt once.
    """
    orders: dict[tuple[str, str | None], list[int]] = {}
    for scorer in scored.scorers:
        orders["best", scorer], orders["worst", scorer] = _extremes(scored, scorer)
    orders["random", None] = _shuffled(scored, seed)
    lists: list[tuple[Role, list[int]]] = []
    for category in [None, *dict.fromkeys(scored.categories or [])]:
        for (kind, scorer), rows in orders.items():
            inside = [row for row in rows if category is None or scored.categories[row] == category]
            lists.append((Role(kind, scorer, category), _one_a_prompt(inside, scored.prompts)))
    shown: dict[int, Shown] = {}
    full: set[Role] = set()  # once a pair of a list finds no room, none after it in that list is shown
    for role, place, row in _in_turn(lists):
        if role not in full and (row in shown or len(shown) < max_pairs):
            shown.setdefault(row, Shown(row)).roles[role] = place
        else:
            full.add(role)
    rank = {role: number for number, (role, _) in enumerate(lists)}
    for one in shown.values():
        one.roles = dict(sorted(one.roles.items(), key=lambda item: rank[item[0]]))
    return sorted(shown.values(), key=lambda one: [(rank[role], place) for role, place in one.roles.items()])


def extremes(scored: Scored, scorer: str) -> tuple[list[int], list[int]]:
    """Rows by how much the policy gained, and by how much it lost, by a scorer: the largest first, a prompt once."""
    gained, lost = _extremes(scored, scorer)
    return _one_a_prompt(gained, scored.prompts), _one_a_prompt(lost, scored.prompts)


def drawn(scored: Scored, seed: int = 0) -> list[int]:
    """Rows in an order drawn with `seed`, whatever the scores; a prompt once."""
    return _one_a_prompt(_shuffled(scored, seed), scored.prompts)


def _extremes(scored: Scored, scorer: str) -> tuple[list[int], list[int]]:
    gain = scored.gain(scorer)
    falling, rising = (gain.argsort(descending=order, stable=True).tolist() for order in (True, False))
    return [row for row in falling if gain[row] > 0], [row for row in rising if gain[row] < 0]


def _shuffled(scored: Scored, seed: int) -> list[int]:
    return torch.randperm(len(scored.prompts), generator=torch.Generator().manual_seed(seed)).tolist()


def _in_turn(lists: list[tuple[Role, list[int]]]) -> Iterator[tuple[Role, int, int]]:
    """Yield role, position and row: the first of every list, then the second, and so on.

    The first half of the lists over all prompts comes first, then the first half of those by category, then the second
    halves.
    """
    everywhere = [one for one in lists if one[0].category is None], DEEP
    inside = [one for one in lists if one[0].category is not None], DEEP_IN_CATEGORY
    for half in (0, 1):
        for some, deep in (everywhere, inside):
            for place in range(half * deep // 2, (half + 1) * deep // 2):
                for role, rows in some:
                    if place < len(rows):
                        yield role, place, rows[place]


def _one_a_prompt(rows: Sequence[int], prompts: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(prompts[row], row)
    return list(first.values())


class Thumbnail(NamedTuple):
    uri: str  # a data: URI
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class Compared:
    """Both images of a pair as thumbnails, and what changed between them."""

    base: Thumbnail
    policy: Thumbnail
    changed: Thumbnail | None  # amplified; None: not asked for, or the images are of different sizes


@dataclass(frozen=True)
class Gallery:
    """The thumbnails of a page."""

    pairs: dict[int, Compared]  # row -> its images
    size: int  # the longest side, pixels
    factor: int  # of all that changed


def thumbnails(
    base: Images,
    policy: Images,
    rows: Sequence[int],
    with_change: Sequence[int],  # rows that are shown once more, with what changed
    *,
    size: int,
    max_bytes: int,
) -> Gallery:
    """Shrink the images of `rows`, which include those `with_change`.

    Sides are at most `size`, and less if the thumbnails would take more than `max_bytes` of the page in total.
    """
    moved = {row: _moved(base[row], policy[row]) for row in with_change}
    moved = {row: one for row, one in moved.items() if one is not None}
    factor = amplification([*moved.values()]) if moved else 1
    changed = {row: amplified(one, factor) for row, one in moved.items()}
    while True:
        made = {
            row: Compared(
                _thumbnail(to_picture(base[row]), size),
                _thumbnail(to_picture(policy[row]), size),
                _thumbnail(changed[row], size) if row in changed else None,
            )
            for row in rows
        }
        pairs = [*made.values(), *(made[row] for row in with_change)]
        total = sum(len(one.base.uri) + len(one.policy.uri) for one in pairs)
        total += sum(len(one.changed.uri) for one in made.values() if one.changed is not None)
        if total <= max_bytes or size <= SMALLEST:
            sides = [side for one in made.values() for side in (*one.base[1:], *one.policy[1:])]
            return Gallery(made, max(sides, default=size), factor)
        size = max(SMALLEST, int(size * 0.95 * math.sqrt(max_bytes / total)))


def _moved(before: Tensor, after: Tensor) -> Tensor | None:  # uint8 [3,H,W] each -> uint8 [H,W]
    return difference(before, after) if before.shape == after.shape else None


def _thumbnail(image: Image.Image, size: int) -> Thumbnail:
    image = image.copy()
    lossless = max(image.size) <= LOSSLESS
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=lossless, quality=QUALITY)
    return Thumbnail("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size)
