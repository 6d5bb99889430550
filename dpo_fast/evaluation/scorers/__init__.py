"""Scorers: each is a module of this folder with a function `load(name, loading)`; a new one is a file and a row."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from dpo_fast.errors import BadInput


@dataclass(frozen=True)
class Scorer:
    """How good images are for their prompts."""

    score: Callable[[torch.Tensor, list[str]], torch.Tensor]  # uint8 [N,3,H,W], N prompts -> fp64 [N] on the CPU
    check: Callable[[list[str]], None] = lambda prompts: None  # raises BadInput for a prompt it cannot judge


@dataclass(frozen=True)
class Loading:
    """Where a scorer's model runs, in which precision, and where its files are."""

    device: torch.device
    dtype: torch.dtype
    where: Path | None  # a folder that holds repositories as OWNER/NAME; None: the hub
    cache_dir: str | None
    token: str | None


MODULE_OF = {
    "faithfulness": "shapes",
    "right": "shapes",
    "appeal": "shapes",
    "pickscore": "pickscore",
    "hpsv2": "hpsv2",
    "hpsv2.1": "hpsv2",
    "imagereward": "imagereward",
    "clip": "clip",
    "aesthetic": "aesthetic",
}


def check_name(name: str) -> None:
    """Raise BadInput for a scorer that there is not, before anything is loaded."""
    if name not in MODULE_OF:
        raise BadInput(f"there is no scorer {name!r}; choose from {', '.join(MODULE_OF)}")


def load_scorer(
    name: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    where: str | Path | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Scorer:
    """The scorer of that name, ready to run on `device`.

    dtype: of the model; None: fp32 on a CPU, fp16 elsewhere (it rounds eight times finer than bf16).
    where: a folder that holds the model's repositories as OWNER/NAME (`hf download OWNER/NAME --local-dir
    FOLDER/OWNER/NAME`); None: the hub, with cache_dir and token as in transformers.
    The built-in world's scorers have no files and ignore all but the name.

    Raises BadInput, in one line, for an unknown name and for files that cannot be found, read or trusted.
    """
    check_name(name)
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    loading = Loading(device, dtype, None if where is None else Path(where), cache_dir, token)
    return import_module(f"{__name__}.{MODULE_OF[name]}").load(name, loading)
