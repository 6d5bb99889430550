"""CLIP for the scorers that are built on it: load its files, compute unit-length embeddings."""

from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from dpo_fast.errors import BadInput
from dpo_fast.models.load_errors import bad_input
from dpo_fast.quiet import no_loading_bars
from dpo_fast.scorers import Loading
from dpo_fast.scorers.published import ADVICE, repository, tokenizer

MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Clip:
    """A CLIP model in eval mode on the device and in the dtype of `loading`, with the tokenizer of a repository."""

    def __init__(self, model: CLIPModel, tokenizer_of: str, loading: Loading) -> None:
        self.size: int = model.config.vision_config.image_size  # pixels
        self.width: int = model.config.projection_dim  # of an embedding
        self.scale = model.logit_scale.exp().item()
        self._model = model.requires_grad_(False).eval().to(loading.device, loading.dtype)
        self._tokenizer = tokenizer(tokenizer_of, CLIPTokenizerFast, model.config.text_config.vocab_size, loading)
        self._length = model.config.text_config.max_position_embeddings

    def of_images(self, pixels: Tensor) -> Tensor:  # fp32 [B,3,size,size], normalised
        """Return the unit-length embeddings of images, fp32 [B,D]."""
        pooled = self._model.vision_model(pixel_values=pixels.to(self._model.device, self._model.dtype)).pooler_output
        return F.normalize(self._model.visual_projection(pooled).float(), dim=-1)

    def of_prompts(self, prompts: list[str]) -> Tensor:
        """Return the unit-length embeddings of prompts, fp32 [B,D]. Prompts are cut after the model's 77 tokens."""
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).input_ids  # without a mask: a token sees only those before it, and the padding comes last
        pooled = self._model.text_model(input_ids=tokens.to(self._model.device)).pooler_output
        return F.normalize(self._model.text_projection(pooled).float(), dim=-1)

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The cosine between each image and its prompt, fp32 [B]."""
        return (self.of_images(pixels) * self.of_prompts(prompts)).sum(-1)


def clip(name: str, loading: Loading) -> CLIPModel:
    """Load the CLIP model of the repository OWNER/NAME from its safetensors. Raises BadInput if it cannot be loaded."""
    source = repository(name, loading, MODEL_FILES)
    with bad_input(f"{source} cannot be loaded as a CLIP model", ADVICE), no_loading_bars():
        model, found = CLIPModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise BadInput(f"{source} is not a whole CLIP model, {missing} is missing: take the published files")
    return model


def empty_clip(name: str, loading: Loading) -> CLIPModel:
    """Return a CLIP model of the repository's architecture, with weights still to be filled in."""
    source = repository(name, loading, MODEL_FILES[:1])
    with bad_input(f"the configuration of {source} cannot be read", ADVICE):
        return CLIPModel(CLIPConfig.from_pretrained(source))
