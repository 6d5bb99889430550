"""Captioned scenes: one shape on a plain background, as in "a red circle on a blue background, small, at the left"."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

RESOLUTION = 16  # pixels
COLOURS = {  # RGB; not fully saturated, so that appeal has room above a rendered scene
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.70, 0.20),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.90, 0.85, 0.15),
    "white": (0.92, 0.92, 0.92),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 2.75, "large": 4.5}  # half the width of a shape, in pixels
PLACES = {"left": 4.5, "centre": 7.5, "right": 10.5}  # the column of its centre, in pixels
HEIGHTS = (6.5, 7.5, 8.5)  # the row of its centre, in pixels, which captions do not mention


class Scene(NamedTuple):
    shape: str
    colour: str
    background: str
    size: str
    place: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} on a {self.background} background, {self.size}, at the {self.place}"


SCENES = tuple(Scene(*words) for words in product(SHAPES, COLOURS, COLOURS, SIZES, PLACES) if words[1] != words[2])
SCENE_OF = {scene.caption: scene for scene in SCENES}


def masks() -> Tensor:
    """Return where each shape lies, bool [shapes, sizes, places, heights, 16, 16]."""
    row, column = torch.meshgrid(torch.arange(RESOLUTION), torch.arange(RESOLUTION), indexing="ij")
    every = product(SHAPES, SIZES.values(), PLACES.values(), HEIGHTS)
    flat = torch.stack([_inside(shape, radius, row - y, column - x) for shape, radius, x, y in every])
    return flat.unflatten(0, (len(SHAPES), len(SIZES), len(PLACES), len(HEIGHTS)))


def _inside(shape: str, radius: float, dy: Tensor, dx: Tensor) -> Tensor:
    if shape == "circle":
        return dy**2 + dx**2 <= radius**2
    if shape == "square":
        return (dy.abs() <= radius) & (dx.abs() <= radius)
    return (dy.abs() <= radius) & (dx.abs() <= (dy + radius) / 2)  # a triangle with its tip at the top


def palette() -> Tensor:
    """Return the RGB colours, float32 [colours, 3] in [0, 1], in the order of COLOURS."""
    return torch.tensor(list(COLOURS.values()))


def as_numbers(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the scenes' words as indices, int64 [N] each: shape, size, place, colour, background."""
    tables = (SHAPES, tuple(SIZES), tuple(PLACES), tuple(COLOURS), tuple(COLOURS))
    words = [(scene.shape, scene.size, scene.place, scene.colour, scene.background) for scene in scenes]
    numbers = [[table.index(word) for table, word in zip(tables, row, strict=True)] for row in words]
    return tuple(torch.tensor(numbers).T)


def render(scenes: Sequence[Scene], heights: Tensor) -> Tensor:  # heights: int64 [N], indices into HEIGHTS
    """Draw the scenes: float32 [N, 3, 16, 16] in [0, 1]."""
    shape, size, place, colour, background = as_numbers(scenes)
    colours = palette()[:, :, None, None]
    return torch.where(masks()[shape, size, place, heights][:, None], colours[colour], colours[background])
