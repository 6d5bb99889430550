"""Scorers: each is a module of this folder with a function `load(name, device)`; adding one is one file and one row."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from dpo_fast.errors import BadInput


@dataclass(frozen=True)
class Scorer:
    """How good images are for their prompts."""

    score: Callable[[torch.Tensor, list[str]], torch.Tensor]  # uint8 [N,3,H,W], N prompts -> fp64 [N] on the CPU
    check: Callable[[list[str]], None] = lambda prompts: None  # raises BadInput for a prompt it cannot judge


MODULE_OF = {"faithfulness": "shapes", "right": "shapes", "appeal": "shapes"}


def load_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer of that name, ready to run on `device`. Raises BadInput for an unknown name."""
    if name not in MODULE_OF:
        raise BadInput(f"there is no scorer {name!r}; choose from {', '.join(MODULE_OF)}")
    return import_module(f"{__name__}.{MODULE_OF[name]}").load(name, device)
