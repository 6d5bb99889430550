"""The LAION aesthetic predictor: how much people would like the picture, whatever the prompt.

Schuhmann, 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor: the "linear" version 2, trained on
SAC, logos and AVA, with which LAION-Aesthetics was selected (Schuhmann et al., "LAION-5B", 2022, arXiv 2210.08402). It
is a linear head on the unit-length embedding of OpenAI's CLIP ViT-L/14.

The score is a predicted rating, 1 to 10, larger is better; published means of Stable Diffusion models are 5.4 to 6.4.
Version 1 and the versions with ReLU give different scores.
"""

from torch import Tensor

from dpo_fast.scorers import Loading, Scorer
from dpo_fast.scorers.clip_models import VIT_L, Clip, clip
from dpo_fast.scorers.linear_head import linear_head
from dpo_fast.scorers.preprocessing import crop_to_square, rounded
from dpo_fast.scorers.published import file, fill, of_model

REPOSITORY = "camenduru/improved-aesthetic-predictor"  # a copy on the hub of the file in the predictor's repository
REPOSITORIES = {"aesthetic": (REPOSITORY, VIT_L)}
FILE = "sac+logos+ava1-l14-linearMSE.pth"


def load(name: str, loading: Loading) -> Scorer:
    path = file(REPOSITORY, FILE, loading)
    model = Clip(clip(VIT_L, loading), VIT_L, loading)
    head = linear_head(model.width)
    fill(head, path, lambda state: {name.removeprefix("layers."): tensor for name, tensor in state.items()})
    head.to(loading.device)  # fp32

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return head(model.of_images(crop_to_square(images, model.size, rounded))).squeeze(1)

    return of_model(score)
