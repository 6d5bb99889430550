"""Stable Diffusion XL, and SDXL-Turbo: two text encoders, a pooled embedding, sizes and crops as time ids."""

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from dpo_fast.models.family import Conditioning, Family
from dpo_fast.models.text_chunks import CHUNK, chunk_ids, joined


class SDXL(Family):
    """Conditioning: prompt_embeds [N,77,2048], pooled_prompt_embeds [N,1280] and, for `denoise`, time_ids [N,6]. With n
    chunks of text prompt_embeds is [N,75n+2,2048]."""

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
        if self.max_token_length != CHUNK:
            return self._encode_chunks(prompts)
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _encode_chunks(self, prompts: list[str]) -> Conditioning:
        """As the pipeline does, in chunks: the last but one hidden states of both encoders, not normed; the pooled
        embedding is that of the first chunk."""
        states = []
        for suffix in ("", "_2"):
            tokenizer = getattr(self.pipeline, f"tokenizer{suffix}")
            ids = chunk_ids(tokenizer, prompts, self.max_token_length).to(self.device)
            encoded = getattr(self.pipeline, f"text_encoder{suffix}")(ids.flatten(0, 1), output_hidden_states=True)
            states.append(joined(encoded.hidden_states[-2].unflatten(0, ids.shape[:2])))
        pooled = encoded.text_embeds.unflatten(0, ids.shape[:2])[:, 0]
        return {"prompt_embeds": torch.cat(states, -1), "pooled_prompt_embeds": pooled}

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
