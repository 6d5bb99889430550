"""ImageReward: how people would rate an image for its prompt.

Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023, arXiv
2304.05977; https://github.com/THUDM/ImageReward (Apache-2.0), on the hub zai-org/ImageReward. BLIP (Li et al., 2022,
arXiv 2201.12086; BSD-3-Clause): a ViT-L/16 at 224 pixels, a BERT that attends to it, a linear head on the first token.

The score is the raw reward minus its mean, divided by its standard deviation, both over the authors' images; larger is
better; published means of Stable Diffusion models are -0.2 to 1.3. Prompts are cut after 35 tokens, as in the published
code.
"""

import re

from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from dpo_fast.files import read_json
from dpo_fast.models.load_errors import bad_input
from dpo_fast.scorers import Loading, Scorer
from dpo_fast.scorers.linear_head import linear_head
from dpo_fast.scorers.preprocessing import crop_to_square, rounded
from dpo_fast.scorers.published import file, fill, of_model, tokenizer

REPOSITORY = "zai-org/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
REPOSITORIES = {"imagereward": (REPOSITORY, TOKENIZER)}
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rewards, from the published code
VISION = BlipVisionConfig(  # BLIP's "large", which no published file describes
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
)
_OF_MED_CONFIG = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)

# BLIP's parameter names -> transformers'; its BERT's are the same in both. The file's other tensors (the projections of
# BLIP's other losses, and position_ids) are not used, as in the published code, which loads it with strict=False.
_RENAMED = [
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
]


class ImageReward(nn.Module):
    """Computes the rewards of images for the tokens of their prompts."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = linear_head(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:  # [B,3,H,W], int64 [B,T] twice -> [B]
        seen = self.vision(pixel_values=pixels.to(self.vision.device, self.vision.dtype)).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0].float()).squeeze(1) - MEAN) / STD


def load(name: str, loading: Loading) -> Scorer:
    path, config = (file(REPOSITORY, wanted, loading) for wanted in ("ImageReward.pt", "med_config.json"))
    with bad_input(f"{config} does not describe ImageReward's BERT", "take the published file"):
        given = read_json(config)
        text = {key: given[key] for key in _OF_MED_CONFIG}
        text_config = BlipTextConfig(**text, encoder_hidden_size=VISION.hidden_size, is_decoder=True)
    model = ImageReward(VISION, text_config).requires_grad_(False).eval()
    fill(model, path, from_blip, others=True)
    model.vision.to(loading.device, loading.dtype)
    model.text.to(loading.device, loading.dtype)
    model.head.to(loading.device)  # fp32
    tokens_of_prompts = text_config.vocab_size - 2  # no prompt contains BLIP's [DEC] and [ENC]
    bert = tokenizer(TOKENIZER, BertTokenizerFast, tokens_of_prompts, loading)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = bert(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        tokens = tokens.to(loading.device)
        return model(crop_to_square(images, VISION.image_size, rounded), tokens.input_ids, tokens.attention_mask)

    return of_model(score)


def from_blip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of the published ImageReward to that of our `ImageReward`."""
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted
