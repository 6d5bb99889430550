"""The built-in world's exact scorers: faithfulness to the caption, whether the scene is right, appeal."""

import torch

from dpo_fast.evaluation.scorers import Loading, Scorer
from dpo_fast.shapes import score
from dpo_fast.shapes.render import RESOLUTION

_SCORES = {
    "faithfulness": score.faithfulness,
    "right": lambda images, prompts: score.is_right(images, prompts).double(),
    "appeal": lambda images, prompts: score.appeal(images),
}


def load(name: str, loading: Loading) -> Scorer:
    """These run on the CPU, whatever the device: the images are 16 x 16 pixels."""

    def check(prompts: list[str]) -> None:
        _SCORES[name](torch.zeros(len(prompts), 3, RESOLUTION, RESOLUTION), prompts)

    return Scorer(lambda images, prompts: _SCORES[name](images.cpu() / 255, prompts), check)
