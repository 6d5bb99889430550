"""The built-in world's exact scorers: quality, faithfulness to the caption, whether the scene is right, appeal."""

import torch

from dpo_fast.errors import BadInput
from dpo_fast.scorers import Loading, Scorer
from dpo_fast.shapes import score
from dpo_fast.shapes.render import RESOLUTION

_SCORES = {
    "quality": score.quality,
    "faithfulness": score.faithfulness,
    "right": lambda images, prompts: score.is_right(images, prompts).double(),
    "appeal": lambda images, prompts: score.appeal(images),
}
REPOSITORIES = dict.fromkeys(_SCORES, ())


def load(name: str, loading: Loading) -> Scorer:
    """Return the scorer `name`. It runs on the CPU, whatever the device: the images are 16 x 16 pixels."""

    def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        height, width = images.shape[2:]
        if (height, width) != (RESOLUTION, RESOLUTION):
            raise BadInput(
                f"scorer {name} judges images of the built-in world, {RESOLUTION} x {RESOLUTION} pixels, not {width} x"
                f" {height}: choose another scorer"
            )
        return _SCORES[name](images.cpu() / 255, prompts)

    def check(prompts: list[str]) -> None:
        _SCORES["right"](torch.zeros(len(prompts), 3, RESOLUTION, RESOLUTION), prompts)

    return Scorer(judge, check)
