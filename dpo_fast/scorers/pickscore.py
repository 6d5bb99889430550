"""PickScore: which image people prefer for a prompt, trained on Pick-a-Pic v1.

Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", 2023, arXiv 2305.01569;
https://github.com/yuvalkirstain/PickScore. CLIP ViT-H/14, fine-tuned; preprocessing is that of its README.

The score is logit_scale.exp() x cosine, about -100 to 100, larger is better; published means of Stable Diffusion models
are 20.5 to 23.1. The softmax over two images of one prompt gives the probability that each is preferred, so only
differences matter, and scores of different prompts are not comparable. Prompts go to transformers' tokenizer unchanged,
as in the README: curly quotes and entities are kept.
"""

from torch import Tensor

from dpo_fast.scorers import Loading, Scorer
from dpo_fast.scorers.clip_models import VIT_H, Clip, clip
from dpo_fast.scorers.preprocessing import crop_to_square, floored
from dpo_fast.scorers.published import of_model

REPOSITORY = "yuvalkirstain/PickScore_v1"
REPOSITORIES = {"pickscore": (REPOSITORY, VIT_H)}


def load(name: str, loading: Loading) -> Scorer:
    model = Clip(clip(REPOSITORY, loading), VIT_H, loading)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return model.scale * model.cosine(crop_to_square(images, model.size, floored), prompts)

    return of_model(score)
