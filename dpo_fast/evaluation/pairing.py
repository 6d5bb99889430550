"""Images of two sides set against each other: row by row a pair of one prompt, from wherever the images come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo_fast.data.images import BadImage, decode
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.prompts import Prompt

UNCATEGORISED = "no category"


class Files:
    """Images that are read when asked for: uint8 [3,H,W], upright and over white. Raises BadInput where one cannot."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        path = self.paths[row]
        try:
            pixels = np.array(decode(path.read_bytes()))
        except (OSError, BadImage) as error:
            raise BadInput(f"{path} {error}: mend it, or take it away") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Pairs:
    """Rows of one prompt and seed each, and the file of either side."""

    prompts: list[str]
    seeds: list[int]
    categories: list[str] | None  # None: no prompt has one
    base: Files
    policy: Files
    remarks: list[str]  # on what was left out or used twice, a line each


def pair_up(
    prompts: Sequence[Prompt],
    seeds: Sequence[int] | None,  # of a prompt's images, in this order; None: as many as the side with fewer has
    base: Mapping[str, Sequence[Path]],  # prompt -> its images
    policy: Mapping[str, Sequence[Path]],
    names: tuple[str, str],  # of base and policy, for the remarks
) -> Pairs:
    """The k-th image of a prompt stands against the other side's k-th; with seeds a side that has fewer starts again.

    A prompt that recurs counts once. Raises BadInput where no prompt has images of both sides.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    remarks, sides = [], (base, policy)
    for name, side in zip(names, sides, strict=True):
        if absent := sum(text not in side for text in first):
            remarks.append(f"{absent} of {len(first)} prompts have no image in {name} and are left out")
        if seeds is not None and (few := sum(len(side[text]) < len(seeds) for text in first if text in side)):
            remarks.append(f"{few} prompts have fewer images in {name} than seeds: some stand in several pairs")
    texts = [text for text in first if text in base and text in policy]
    if not texts:
        raise BadInput(
            f"no prompt has an image in both {names[0]} and {names[1]} ({'; '.join(remarks)}): images are found by"
            " their names, which must be the prompts (letters and digits count)"
        )
    rows = []
    for text in texts:
        number = min(len(side[text]) for side in sides) if seeds is None else len(seeds)
        rows += [(text, k) for k in range(number)]
    categories = [first[text].category or UNCATEGORISED for text, _ in rows]
    return Pairs(
        [text for text, _ in rows],
        [k if seeds is None else seeds[k] for _, k in rows],
        categories if any(first[text].category for text in texts) else None,
        *(Files([side[text][k % len(side[text])] for text, k in rows]) for side in sides),
        remarks,
    )
