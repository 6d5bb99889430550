"""Signs of over-optimisation that need no scorer: what became of colours, edges, variety, and how far images moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from dpo_fast.evaluation.statistics import Bootstrap, Interval, spread

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


def measure(base: Images, policy: Images, prompts: Sequence[str]) -> list[Signal]:
    """All signals of images that are row by row a pair; only the images of one prompt are held at a time.

    Left out: diversity where no prompt has two images, the distance of pixels where images of a pair differ in size.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    of_image: dict[str, list[float | None]] = {name: [None] * len(prompts) for name in MEANING}
    of_prompt: dict[str, tuple[float, float]] = {}
    for prompt, places in rows.items():
        sides = [[images[row] for row in places] for images in (base, policy)]
        for row, before, after in zip(places, *sides, strict=True):
            of_image["saturation"][row] = saturation(before), saturation(after)
            of_image["sharpness"][row] = sharpness(before), sharpness(after)
            of_image["coarse distance"][row] = coarse_distance(before, after)
            if before.shape == after.shape:
                of_image["distance"][row] = distance(before, after)
        if len(places) > 1 and all(len({image.shape for image in side}) == 1 for side in sides):
            of_prompt[prompt] = spread(torch.stack(sides[0])).item(), spread(torch.stack(sides[1])).item()
    bootstrap, found = Bootstrap(prompts), []
    for name in ("saturation", "sharpness"):
        found.append(_paired(name, of_image[name], bootstrap))
    if of_prompt:
        found.append(_paired("diversity", list(of_prompt.values()), Bootstrap(list(of_prompt))))
    for name in ("distance", "coarse distance"):
        if None not in of_image[name]:
            mean = bootstrap.mean(torch.tensor(of_image[name], dtype=torch.float64))
            found.append(Signal(name, MEANING[name], None, mean.value, mean))
    return found


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
