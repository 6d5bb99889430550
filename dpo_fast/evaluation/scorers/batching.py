"""Scoring any number of images a few at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_fast.errors import BadInput

BATCH = 16  # images: of the largest model, ViT-H/14, activations stay far below its weights


def batched(
    score_batch: Callable[[Tensor, list[str]], Tensor],  # uint8 [B,3,H,W], B prompts -> [B]
) -> Callable[[Tensor, list[str]], Tensor]:
    """A Scorer's `score` from one that takes a small batch. It raises BadInput where a score is not finite."""

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, images.shape
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        scores = torch.empty(len(prompts), dtype=torch.float64)
        for first in range(0, len(prompts), BATCH):
            part = slice(first, first + BATCH)
            scores[part] = score_batch(images[part], prompts[part]).double().cpu()
        if not scores.isfinite().all():
            wrong = int((~scores.isfinite()).sum())
            raise BadInput(f"{wrong} of {len(scores)} scores are not finite: load the scorer in torch.bfloat16 or fp32")
        return scores

    return score
