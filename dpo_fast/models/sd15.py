"""Stable Diffusion 1.x and 2.x: one text encoder, no micro-conditioning."""

from typing import ClassVar

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from dpo_fast.models.family import Conditioning, Family
from dpo_fast.models.text_chunks import CHUNK, chunk_ids, joined


class SD15(Family):
    """Conditioning: prompt_embeds [N,77,768] (1024 wide in 2.x); with n chunks of text [N,75n+2,768]."""

    name = "sd15"
    pipeline_class = StableDiffusionPipeline
    image_to_image_class = StableDiffusionImg2ImgPipeline
    text_encoders = ("text_encoder",)
    usual_config = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    unused_parts: ClassVar = {**Family.unused_parts, "safety_checker": None, "requires_safety_checker": False}
    text_kind = "last hidden state, normed"
    sampling_steps = 50
    sampling_guidance = 7.5

    def image_to_image_options(self) -> dict[str, object]:
        return {"requires_safety_checker": False}

    def _encode(self, prompts: list[str]) -> Conditioning:
        if self.max_token_length != CHUNK:
            ids = chunk_ids(self.pipeline.tokenizer, prompts, self.max_token_length).to(self.device)
            states = self.pipeline.text_encoder(ids.flatten(0, 1))[0]
            return {"prompt_embeds": joined(states.unflatten(0, ids.shape[:2]))}
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds}


class SDTurbo(SD15):
    """SD-Turbo (arXiv 2311.17042): Stable Diffusion 2.1's architecture, trained and sampled at four timesteps without
    guidance.
    """

    name = "sd-turbo"
    sampling_steps = 4
    sampling_guidance = 0.0
    timestep_grid = True


SD15.few_steps = SDTurbo
