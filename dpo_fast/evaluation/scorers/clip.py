"""CLIP score: how well an image shows what its prompt says.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv 2103.00020; as a
score Hessel et al., "CLIPScore", 2021, arXiv 2104.08718. OpenAI's ViT-L/14 (https://github.com/openai/CLIP, MIT).

The score is 100 x cosine, -100 to 100, larger is better: that of torchmetrics for one image, without its floor at 0
(the paper has 2.5 x cosine, with that floor). Other CLIP models give other numbers.
"""

from dpo_fast.evaluation.scorers import Loading, Scorer
from dpo_fast.evaluation.scorers.clip_models import VIT_L, Clip, clip
from dpo_fast.evaluation.scorers.preprocessing import crop_to_square, floored
from dpo_fast.evaluation.scorers.published import of_model

REPOSITORIES = {"clip": (VIT_L,)}


def load(name: str, loading: Loading) -> Scorer:
    model = Clip(clip(VIT_L, loading), VIT_L, loading)
    return of_model(lambda images, prompts: 100 * model.cosine(crop_to_square(images, model.size, floored), prompts))
