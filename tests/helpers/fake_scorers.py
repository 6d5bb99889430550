"""Scorers that anybody can compute again, in the place of models, for relabelling here and in other processes.

python -m tests.helpers.fake_scorers PART_ROWS LOG FLAGS     the command with small parts; every image scored is a line
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dpo_fast import relabel, scorers
from dpo_fast.errors import BadInput
from dpo_fast.relabeling import pair_scores

# name -> (float64 [H,W,3] in [0, 255], caption) -> score
FORMULAS = {
    "red": lambda pixels, caption: pixels[..., 0].mean() / 100,
    "left": lambda pixels, caption: (pixels[:, : pixels.shape[1] // 2].mean() - pixels.mean()) * (1 + len(caption) % 3),
    "nothing": lambda pixels, caption: 3.0,
    "broken": lambda pixels, caption: float("nan"),
    "not everywhere": lambda pixels, caption: 3.0,  # its files are on the main rank's disk only
}


def load(name: str, log: Path, seconds: float = 0.0) -> scorers.Scorer:
    """A scorer of FORMULAS, which notes what it is given and takes its time."""

    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and len(images) == len(prompts)
        arrays = images.permute(0, 2, 3, 1).double().numpy()
        with log.open("a") as file:
            for array, prompt in zip(arrays, prompts, strict=True):
                file.write(f"{name}\t{prompt}\t{int(array.sum())}\n")
        time.sleep(seconds)
        values = [FORMULAS[name](array, prompt) for array, prompt in zip(arrays, prompts, strict=True)]
        return torch.tensor(np.array(values), dtype=torch.float64)

    if name == "not everywhere" and os.environ.get("RANK", "0") != "0":
        raise BadInput(f"scorer {name} has no files here")
    return scorers.Scorer(score)


def started(part_rows: int, log: Path, argv: list[object]) -> multiprocessing.Process:
    """A process of the command with `argv`; its imports were done before by one that it is forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpo_fast.relabeling.pair_scores", "tests.helpers.fake_scorers"])
    process = context.Process(target=_quietly, args=(part_rows, log, [str(word) for word in argv]))
    process.start()
    return process


def _quietly(part_rows: int, log: Path, argv: list[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.exit(_main(part_rows, log, argv, 0.01))


def _main(part_rows: int, log: Path, argv: list[str], seconds: float) -> int:
    pair_scores.PART_ROWS = part_rows
    scorers.MODULE_OF |= dict.fromkeys(FORMULAS, "fake")
    scorers.load_scorer = lambda name, device, **_: load(name, log, seconds)
    scorers.facts = lambda name, device, **_: {"scorer": name}
    scorers.provenance = lambda name, device, **_: {"revisions": {f"owner/{name}": "a" * 40}}
    return relabel.main(argv)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], 0.0))
