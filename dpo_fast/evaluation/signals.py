"""Signs of over-optimisation that need no scorer: what became of colours, edges, variety, and how far images moved."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d
from tqdm import tqdm

from dpo_fast.caching import ahead
from dpo_fast.evaluation.statistics import Bootstrap, Interval, spread

THREADS = min(8, os.cpu_count() or 1)  # a prompt's images each
CELLS = 8  # a coarse picture has 8 x 8 cells
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
SUSPECT = {"saturation": 1.25, "sharpness": 1.5}  # times the base's: above, it is said
LESS_DIVERSE = 0.8  # of the base's diversity: below, it is said


class Images(Protocol):
    """One image a row, uint8 [3, H, W] on the CPU: a tensor [N, 3, H, W], or something that reads files when asked."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Signal:
    """One measure of base and policy: means over images, and their paired difference."""

    name: str
    meaning: str  # what is measured, and its unit
    base: float | None  # None: the measure is of policy against base
    policy: float
    difference: Interval  # policy minus base; of a distance: the distance itself

    def warning(self) -> str | None:
        """One line where the change is large and no accident."""
        if not self.base:
            return None
        ratio = self.policy / self.base
        if self.name in SUSPECT and ratio > SUSPECT[self.name] and self.difference.low > 0:
            return f"{self.name} is {ratio:.0%} of the base's, a usual sign of over-optimisation: look at the pairs"
        if self.name == "diversity" and ratio < LESS_DIVERSE:
            return f"diversity is {ratio:.0%} of the base's"
        return None


def saturation(image: Tensor) -> float:  # uint8 [3,H,W]
    """The mean saturation of HSV, (largest - smallest) / largest channel: 0 grey, 1 pure colours; black counts 0."""
    highest, lowest = image.amax(0).double(), image.amin(0).double()
    return ((highest - lowest) / highest.clamp(min=1)).mean().item()


def sharpness(image: Tensor) -> float:  # uint8 [3,H,W], at least 3 x 3
    """The variance of the Laplacian of luma, in squared grey levels of 255. Detail, edges and noise all raise it."""
    luma = torch.einsum("c,chw->hw", torch.tensor(LUMA, dtype=torch.float64), image.double())
    kernel = torch.tensor(LAPLACIAN, dtype=torch.float64)
    return conv2d(luma[None, None], kernel[None, None]).var(correction=0).item()


def distance(base: Tensor, policy: Tensor) -> float:  # uint8 [3,H,W] each, of one size
    """The root mean square distance of pixels in [0, 1]."""
    return ((policy.double() - base.double()) / 255).square().mean().sqrt().item()


def coarse_distance(base: Tensor, policy: Tensor) -> float:  # uint8 [3,H,W] each, of any sizes
    """The same of the pictures averaged down to 8 x 8 cells: composition and colour without detail."""
    small = [adaptive_avg_pool2d(image.double() / 255, CELLS) for image in (base, policy)]
    return (small[1] - small[0]).square().mean().sqrt().item()


def measure(base: Images, policy: Images, prompts: Sequence[str], show: bool = False) -> list[Signal]:
    """All signals of images that are row by row a pair; the images of a few prompts are held at a time.

    show: with a progress bar. Left out: diversity where no prompt has two images, the distance of pixels where images
    of a pair differ in size.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    of_image: dict[str, list[tuple[float, float] | float | None]] = {name: [None] * len(prompts) for name in MEANING}
    of_prompt: dict[str, tuple[float, float]] = {}
    bar = tqdm(total=len(prompts), desc="measuring", unit=" pairs", disable=not show)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        plans = (partial(_of_prompt, base, policy, places) for places in rows.values())
        for (prompt, places), found in zip(rows.items(), ahead(pool, plans, THREADS), strict=True):
            for name, values in found.of_image.items():
                for row, value in zip(places, values, strict=True):
                    of_image[name][row] = value
            if found.diversity is not None:
                of_prompt[prompt] = found.diversity
            bar.update(len(places))
    bootstrap, signals = Bootstrap(prompts), []
    for name in ("saturation", "sharpness"):
        signals.append(_paired(name, of_image[name], bootstrap))
    if of_prompt:
        signals.append(_paired("diversity", list(of_prompt.values()), Bootstrap(list(of_prompt))))
    for name in ("distance", "coarse distance"):
        if None not in of_image[name]:
            mean = bootstrap.mean(torch.tensor(of_image[name], dtype=torch.float64))
            signals.append(Signal(name, MEANING[name], None, mean.value, mean))
    return signals


class _Measured(NamedTuple):
    """The signals of one prompt's images."""

    of_image: dict[str, list[tuple[float, float] | float | None]]  # an image each: base and policy, or between them
    diversity: tuple[float, float] | None


def _of_prompt(base: Images, policy: Images, rows: Sequence[int]) -> _Measured:
    sides = [[images[row] for row in rows] for images in (base, policy)]
    pairs = list(zip(*sides, strict=True))
    of_image = {
        "saturation": [(saturation(before), saturation(after)) for before, after in pairs],
        "sharpness": [(sharpness(before), sharpness(after)) for before, after in pairs],
        "coarse distance": [coarse_distance(before, after) for before, after in pairs],
        "distance": [
            distance(before, after) if before.shape == after.shape else None  # pixels that do not meet
            for before, after in pairs
        ],
    }
    of_one_size = all(len({image.shape for image in side}) == 1 for side in sides)
    both = [spread(torch.stack(side)).item() for side in sides] if len(rows) > 1 and of_one_size else None
    return _Measured(of_image, both and (both[0], both[1]))


MEANING = {
    "saturation": "mean HSV saturation, 0 to 1",
    "sharpness": "variance of the Laplacian of luma, squared grey levels",
    "diversity": "root mean square distance of pixels in [0, 1] between images of one prompt",
    "distance": "root mean square distance of pixels in [0, 1] between the policy's image and the base's",
    "coarse distance": f"the same after averaging to {CELLS} x {CELLS} cells: composition and colour",
}


def _paired(name: str, pairs: list[tuple[float, float]], bootstrap: Bootstrap) -> Signal:
    base, policy = torch.tensor(pairs, dtype=torch.float64).T
    return Signal(name, MEANING[name], base.mean().item(), policy.mean().item(), bootstrap.mean(policy - base))
