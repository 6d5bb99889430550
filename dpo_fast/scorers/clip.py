"""CLIP score: how well an image shows what its prompt says.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv 2103.00020; used as
a score in Hessel et al., "CLIPScore", 2021, arXiv 2104.08718. OpenAI's ViT-L/14 (https://github.com/openai/CLIP, MIT).

The score is 100 x cosine, -100 to 100, larger is better: as in torchmetrics for one image, but without its floor at 0
(the paper has 2.5 x cosine, with that floor). Other CLIP models give different scores.

Prompts are cleaned as in OpenAI's code (`cleaning`); torchmetrics, which uses transformers' tokenizer, neither
straightens curly quotes nor resolves entities. Images are cropped as in transformers and torchmetrics; OpenAI's code
may start the crop one pixel further. Square images are the same for all three.
"""

from torch import Tensor

from dpo_fast.scorers import Loading, Scorer, cleaning
from dpo_fast.scorers.clip_models import VIT_L, Clip, clip
from dpo_fast.scorers.preprocessing import crop_to_square, floored
from dpo_fast.scorers.published import of_model

REPOSITORIES = {"clip": (VIT_L,)}
more_facts = cleaning.more_facts


def load(name: str, loading: Loading) -> Scorer:
    model = Clip(clip(VIT_L, loading), VIT_L, loading)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = crop_to_square(images, model.size, floored)
        return 100 * model.cosine(pixels, [cleaning.cleaned(prompt) for prompt in prompts])

    return of_model(score, cleaning.check)
