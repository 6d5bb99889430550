"""Signs of over-optimisation that need no scorer: changes in colour, edges and variety, and how far images moved."""

import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dpo_fast.statistics import Bootstrap, Interval
from dpo_fast.threads import ahead

THREADS = min(8, os.cpu_count() or 1)  # each measures one prompt's images
CELLS = 8  # a coarse picture has 8 x 8 cells
LUMA = (299, 587, 114)  # thousandths, ITU-R BT.601
SUSPECT = {"saturation": 1.25, "sharpness": 1.5}  # times the base's: above this, a warning
LESS_DIVERSE = 0.8  # of the base's diversity: below this, a warning


class Images(Protocol):
    """One image per row, uint8 [3, H, W] on the CPU: a tensor [N, 3, H, W], or an object that reads files on demand."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Signal:
    """One measure of base and policy: means over images, and their paired difference."""

    name: str
    meaning: str  # what is measured, and its unit
    base: float | None  # None: the measure itself compares policy and base
    policy: float
    difference: Interval  # policy minus base; of a distance: the distance itself

    @property
    def suspect(self) -> bool:
        """Whether the change is one that over-optimisation usually brings."""
        if not self.base:
            return False
        ratio = self.policy / self.base
        if self.name in SUSPECT:
            return ratio > SUSPECT[self.name] and self.difference.low > 0
        return self.name == "diversity" and ratio < LESS_DIVERSE

    def warning(self) -> str | None:
        """Return a one-line warning if the change is suspiciously large, else None."""
        if not self.suspect:
            return None
        usual = "" if self.name == "diversity" else ", a usual sign of over-optimisation: look at the pairs"
        return f"{self.name} is {self.policy / self.base:.0%} of the base's{usual}"


# Pixels, and luma in thousandths, are integers: fp32 holds them, sums of a few, and sums over a column of up to 65,793
# pixels exactly. Ratios and squares are rounded; long sums of them are taken in fp64, or row by row first.


def saturation(image: Tensor) -> float:  # uint8 [3,H,W]
    """The mean saturation of HSV, (largest - smallest) / largest channel: 0 grey, 1 pure colour; black counts as 0."""
    red, green, blue = image
    highest = red.maximum(green).maximum(blue)
    lowest = red.minimum(green).minimum(blue)
    return ((highest - lowest).float() / highest.clamp(min=1)).mean(dtype=torch.float64).item()


def sharpness(image: Tensor) -> float:  # uint8 [3,H,W], at least 3 x 3
    """The variance of the Laplacian of luma, in squared grey levels of 255. Detail, edges and noise all raise it."""
    luma, green, blue = image.float()
    luma.mul_(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    edges = luma[:-2, 1:-1] + luma[2:, 1:-1]
    edges += luma[1:-1, :-2]
    edges += luma[1:-1, 2:]
    edges.sub_(luma[1:-1, 1:-1], alpha=4)
    return edges.var(correction=0).item() / 1e6


def distance(base: Tensor, policy: Tensor) -> float:  # uint8 [3,H,W] each, of one size
    """The root mean square distance of two images' pixels, scaled to [0, 1]."""
    apart = (base.maximum(policy) - base.minimum(policy)).float()
    return (apart.square_().sum(2).sum(dtype=torch.float64) / apart.numel()).sqrt().item() / 255


def coarse_distance(base: Tensor, policy: Tensor) -> float:  # uint8 [3,H,W] each, of any sizes
    """The same distance after averaging down to 8 x 8 cells: composition and colour without detail."""
    return (_coarse(policy) - _coarse(base)).square().mean().sqrt().item() / 255


def diversity(images: Sequence[Tensor]) -> float:  # uint8 [3,H,W] each, of one size, at least two
    """The mean `distance` over all pairs of the images."""
    apart = [distance(*two) for two in combinations(images, 2)]
    return sum(apart) / len(apart)


def _coarse(image: Tensor) -> Tensor:  # uint8 [3,H,W] -> fp64 [3, 8, 8], in levels of 255
    """Average over cells; they share a line of pixels where 8 does not divide the size, as in adaptive_avg_pool2d."""
    high, wide = _cells(image.shape[1]), _cells(image.shape[2])
    sums = (high @ image.float()).double() @ wide.double().T
    return sums / (high.sum(1)[:, None] * wide.sum(1))


@lru_cache
def _cells(size: int) -> Tensor:  # fp32 [8, size]: 1 where a cell holds the line
    cell, line = torch.arange(CELLS)[:, None], torch.arange(size)
    return ((line >= cell * size // CELLS) & (line < -(-(cell + 1) * size // CELLS))).float()


def measure(
    base: Images,
    policy: Images,
    prompts: Sequence[str],
    show: bool = False,  # a progress bar
    sources: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,  # of base and policy; None: no image recurs
) -> list[Signal]:
    """Measure all signals of images paired row by row, holding the images of only a few prompts at a time.

    sources: an identifier of each row's image, such as its file. Rows of a prompt with the same identifier are one
    image used again, which diversity counts once; images that merely look the same count as two. Diversity covers the
    prompts of which both sides have at least two images, all of one size on each side, and is left out if there are
    none; the distance of pixels is left out if the images of any pair differ in size.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    of_image: dict[str, list[tuple[float, float] | float | None]] = {name: [None] * len(prompts) for name in MEANING}
    of_prompt: dict[str, tuple[float, float]] = {}
    bar = tqdm(total=len(prompts), desc="measuring", unit=" pairs", disable=not show)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        plans = (partial(_of_prompt, (base, policy), places, sources) for places in rows.values())
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

    of_image: dict[str, list[tuple[float, float] | float | None]]  # per pair: (base, policy), or their distance
    diversity: tuple[float, float] | None


def _of_prompt(
    images: tuple[Images, Images], rows: Sequence[int], sources: tuple[Sequence[Hashable], Sequence[Hashable]] | None
) -> _Measured:
    sides = [[of_side[row] for row in rows] for of_side in images]
    pairs = list(zip(*sides, strict=True))
    of_image = {
        "saturation": [(saturation(before), saturation(after)) for before, after in pairs],
        "sharpness": [(sharpness(before), sharpness(after)) for before, after in pairs],
        "coarse distance": [coarse_distance(before, after) for before, after in pairs],
        "distance": [
            distance(before, after) if before.shape == after.shape else None  # pixels do not correspond
            for before, after in pairs
        ],
    }
    distinct = sides
    if sources is not None:
        distinct = [
            list({of_side[row]: image for row, image in zip(rows, side, strict=True)}.values())
            for of_side, side in zip(sources, sides, strict=True)
        ]
    comparable = all(len(side) > 1 and len({image.shape for image in side}) == 1 for side in distinct)
    return _Measured(of_image, (diversity(distinct[0]), diversity(distinct[1])) if comparable else None)


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
