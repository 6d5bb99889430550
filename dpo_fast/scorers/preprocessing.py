"""Prepare images as the published models expect: bicubic resize, a square, CLIP's mean and standard deviation."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def floored(excess: int) -> int:
    """Where a centre crop starts in transformers; excess is the side minus the crop's, in pixels."""
    return excess // 2


def rounded(excess: int) -> int:
    """Where a centre crop starts in torchvision."""
    return round(excess / 2)


def crop_to_square(images: Tensor, size: int, start: Callable[[int], int]) -> Tensor:  # uint8 [N,3,H,W] -> fp32
    """Resize the shorter side to `size` with PIL and crop the centre; normalised fp32 [N,3,size,size] on the CPU.

    start: `floored` or `rounded`, depending on the published recipe's library; they differ by one pixel at most.
    """
    squares = []
    for pixels in images.cpu().permute(0, 2, 3, 1).contiguous().numpy():
        height, width = pixels.shape[:2]
        short = min(height, width)
        height, width = int(size * height / short), int(size * width / short)
        left, top = start(width - size), start(height - size)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        squares.append(np.asarray(picture.crop((left, top, left + size, top + size))))
    return _normalised(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255)


def pad_to_square(images: Tensor, size: int) -> Tensor:  # uint8 [N,3,H,W] -> fp32, on the images' device
    """Resize the longer side to `size` and pad with black to a square; normalised fp32 [N,3,size,size].

    The resize is on fp32 tensors with antialiasing and without clipping, as torchvision resizes tensors since 0.17.
    """
    longest = max(images.shape[-2:])
    height, width = (round(side * (size / longest)) for side in images.shape[-2:])
    pixels = images.float() / 255
    if longest != size:
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return _normalised(F.pad(pixels, (left, size - width - left, top, size - height - top)))


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pixels - mean) / std
