"""HPSv2 and HPSv2.1: which image people prefer for a prompt, trained on HPD v2.

Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis",
2023, arXiv 2306.09341; https://github.com/tgxs002/HPSv2 (Apache-2.0). CLIP ViT-H/14 of open_clip, fine-tuned.

The score is 100 x cosine, -100 to 100, larger is better: the unit of the published tables (the package returns the
cosine), where Stable Diffusion models have means of 23.6 to 32.5 by version 2.1. Scores of version 2 and of version 2.1
are not comparable, nor are scores of different prompts.

As in the published code, the complete image is seen, resized as a tensor and padded, not cropped. torchvision before
0.17 resized without antialiasing, which gives different scores. Prompts are cleaned as in open_clip (`cleaning`).
"""

import re

from torch import Tensor

from dpo_fast.scorers import Loading, Scorer, cleaning
from dpo_fast.scorers.clip_models import VIT_H, Clip, empty_clip
from dpo_fast.scorers.preprocessing import pad_to_square
from dpo_fast.scorers.published import file, fill, of_model

REPOSITORY = "xswu/HPSv2"
FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
REPOSITORIES = dict.fromkeys(FILES, (REPOSITORY, VIT_H))
more_facts = cleaning.more_facts

# open_clip's parameter names -> transformers': first the two towers, then their parts and those of a block.
_RENAMED = [
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def load(name: str, loading: Loading) -> Scorer:
    path = file(REPOSITORY, FILES[name], loading)
    clip = empty_clip(VIT_H, loading)
    fill(clip, path, from_open_clip, under="state_dict")
    model = Clip(clip, VIT_H, loading)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = pad_to_square(images.to(loading.device), model.size)
        return 100 * model.cosine(pixels, [cleaning.cleaned(prompt) for prompt in prompts])

    return of_model(score, cleaning.check)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of an open_clip ViT to that of transformers' CLIPModel."""
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if name in ("visual_projection.weight", "text_projection.weight"):
            converted[name] = tensor.T
        elif ".self_attn.in_proj_" in name:  # queries, keys and values in one
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            converted[name] = tensor
    return converted
