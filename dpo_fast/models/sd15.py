"""Stable Diffusion 1.x and 2.x: one text encoder, no micro-conditioning."""

from dpo_fast.models.family import Conditioning, Family


class SD15(Family):
    """Conditioning: prompt_embeds [N,77,768] (1024 wide in 2.x)."""

    name = "sd15"
    text_kind = "last hidden state, normed"
    sampling_steps = 50
    sampling_guidance = 7.5

    def _encode(self, prompts: list[str]) -> Conditioning:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds}
