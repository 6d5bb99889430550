"""Stable Diffusion XL, and SDXL-Turbo: two text encoders, a pooled embedding, sizes and crops as time ids."""

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from dpo_fast.models.family import Conditioning, Family


class SDXL(Family):
    """Conditioning: prompt_embeds [N,77,2048], pooled_prompt_embeds [N,1280] and, for `denoise`, time_ids [N,6]."""

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    image_to_image_class = StableDiffusionXLImg2ImgPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    usual_config = "stabilityai/stable-diffusion-xl-base-1.0"
    text_kind = "last but one hidden states of both encoders, pooled embedding of the second"
    sampling_steps = 50
    sampling_guidance = 5.0
    needs_time_ids = True
    normalizes_latents = True

    def image_to_image_options(self) -> dict[str, object]:
        empty = self.pipeline.config.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": empty, "add_watermarker": False}

    def _encode(self, prompts: list[str]) -> Conditioning:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _added_conditioning(self, conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
        # time ids stay in fp32: bf16 cannot represent 1023
        return {
            "text_embeds": conditioning["pooled_prompt_embeds"].to(dtype),
            "time_ids": conditioning["time_ids"].float(),
        }


class Turbo(SDXL):
    """SDXL-Turbo (arXiv 2311.17042): SDXL's architecture, trained and sampled at four timesteps without guidance."""

    name = "turbo"
    sampling_steps = 4
    sampling_guidance = 0.0
    timestep_grid = True


SDXL.few_steps = Turbo
