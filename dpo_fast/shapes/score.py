"""Exact scores of an image, at best 1: quality, how faithful it is to a caption, and how appealing it looks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo_fast.errors import BadInput
from dpo_fast.shapes.render import RESOLUTION, SCENE_OF, SCENES, as_numbers, masks, palette


def faithfulness(images: Tensor, captions: list[str]) -> Tensor:  # images: float [N, 3, 16, 16] in [0, 1]
    """Return 1 - the root mean square distance to the caption's nearest rendering: float64 [N] in [0, 1].

    Raises BadInput for a caption that is not of this world and for images of another shape.
    """
    return _scores(images)[torch.arange(len(captions)), _rows(captions)]


def quality(images: Tensor, captions: list[str]) -> Tensor:
    """Return half for the content and half for the looks of an image, float64 [N] in [0, 1].

    The looks are its appeal. The content is the mean of its faithfulness to the caption and of how well it is drawn,
    which is its faithfulness to whatever scene it shows: of two wrong images the better drawn one is better.
    """
    scores = _scores(images)
    content = (scores[torch.arange(len(captions)), _rows(captions)] + scores.amax(dim=1)) / 2
    return (content + appeal(images)) / 2


def is_right(images: Tensor, captions: list[str]) -> Tensor:
    """Whether no other caption of this world fits the image as well: bool [N]."""
    return _scores(images).argmax(dim=1) == _rows(captions)


def appeal(images: Tensor) -> Tensor:  # images: float [N, 3, 16, 16] in [0, 1]
    """Return vividness times cleanness: float64 [N] in [0, 1].

    Both use the image with speckles removed (each channel's median over 3 x 3 pixels, which keeps straight edges):
    vividness is the mean over its pixels of the largest minus the smallest channel, so that coloured noise is not
    vivid; cleanness is 1 - twice the original's mean absolute distance from it, at least 0.
    """
    images = images.double()
    neighbours = pad(images, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    smooth = neighbours.median(dim=-1).values
    vividness = (smooth.amax(dim=1) - smooth.amin(dim=1)).mean(dim=(1, 2))
    cleanness = (1 - 2 * (images - smooth).abs().mean(dim=(1, 2, 3))).clamp(min=0)
    return vividness * cleanness


def _rows(captions: list[str]) -> Tensor:
    for caption in captions:
        if caption not in SCENE_OF:
            raise BadInput(f"caption {caption!r} is none of the shapes world's, such as {SCENES[0].caption!r}")
    return torch.tensor([SCENES.index(SCENE_OF[caption]) for caption in captions])


def _scores(images: Tensor) -> Tensor:
    """Return the faithfulness to every scene: float64 [N, scenes].

    A rendering has one colour inside its mask and one outside, so its squared error splits into two sums over pixels,
    each computed once for every mask and colour.
    """
    if images.shape[1:] != (3, RESOLUTION, RESOLUTION):
        raise BadInput(f"images {tuple(images.shape)} must be [N, 3, {RESOLUTION}, {RESOLUTION}]")
    mask = masks().flatten(4).double()  # [shapes, sizes, places, heights, pixels]
    error = (images.double()[:, None] - palette().double()[:, :, None, None]).square().sum(dim=2).flatten(2)
    inside = torch.einsum("szxyp,nkp->nszxyk", mask, error)  # k: colours
    outside = torch.einsum("szxyp,nkp->nszxyk", 1 - mask, error)
    squared = (inside[..., :, None] + outside[..., None, :]).amin(dim=4)  # the height that fits best
    return 1 - (squared[(slice(None), *as_numbers(SCENES))] / (3 * RESOLUTION**2)).sqrt()
