"""Captioned scenes: one shape of one colour on a background of another, such as "a red circle on a blue background"."""

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
CENTRES = tuple(product((6.5, 7.5, 8.5), repeat=2))  # (row, column), pixels
RADIUS = 4.5  # pixels: a shape is 9 or 10 pixels wide


class Scene(NamedTuple):
    shape: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} on a {self.background} background"


SCENES = tuple(
    Scene(shape, colour, background)
    for shape, colour, background in product(SHAPES, COLOURS, COLOURS)
    if colour != background
)
SCENE_OF = {scene.caption: scene for scene in SCENES}


def masks() -> Tensor:
    """bool [shapes, centres, 16, 16]: where each shape lies for each centre."""
    row, column = torch.meshgrid(torch.arange(RESOLUTION), torch.arange(RESOLUTION), indexing="ij")
    return torch.stack([torch.stack([_inside(shape, row - y, column - x) for y, x in CENTRES]) for shape in SHAPES])


def _inside(shape: str, dy: Tensor, dx: Tensor) -> Tensor:
    if shape == "circle":
        return dy**2 + dx**2 <= RADIUS**2
    if shape == "square":
        return (dy.abs() <= RADIUS) & (dx.abs() <= RADIUS)
    return (dy.abs() <= RADIUS) & (dx.abs() <= (dy + RADIUS) / 2)  # a triangle, its tip above


def palette() -> Tensor:
    """float32 [colours, 3] in [0, 1], in the order of COLOURS."""
    return torch.tensor(list(COLOURS.values()))


def render(scenes: list[Scene], centres: Tensor) -> Tensor:  # centres: int64 [N], rows of CENTRES
    """Draw the scenes: float32 [N, 3, 16, 16] in [0, 1]."""
    names = list(COLOURS)
    colours = palette()
    shape = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    ink = colours[[names.index(scene.colour) for scene in scenes]][:, :, None, None]
    ground = colours[[names.index(scene.background) for scene in scenes]][:, :, None, None]
    return torch.where(masks()[shape, centres][:, None], ink, ground)
