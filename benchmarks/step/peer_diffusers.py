"""What diffusers' train_diffusion_dpo.py and train_diffusion_dpo_sdxl.py do in each step, in our own plain code.

LoRA through peft on a frozen half-precision UNet under autocast, gradient checkpointing, JPEGs decoded in the training
process (dataloader_num_workers is 0 by default), the VAE (in fp32 for SDXL) and the text encoders run in the step, the
reference by switching the adapters off after the policy's forward, unfused AdamW, four values read back per step.
"""

import time
from pathlib import Path

import torch

from benchmarks.step.plain import MAX_GRAD_NORM, WEIGHT_DECAY, Plain, Seen, dpo, embedded, errors, tokenized
from benchmarks.step.work import decoded

VAE_BATCH = 8  # --vae_encode_batch_size


class PeerDiffusers(Plain):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        sdxl = self.case.model.family == "sdxl"
        self.unet_ = self.unet(self.dtype)
        self.trained = self.add_lora(self.unet_)
        self.unet_.enable_gradient_checkpointing()
        self.vae_ = self.vae(torch.float32 if sdxl else self.dtype)
        self.encoders, self.tokenizers_ = self.text_encoders(self.dtype), self.tokenizers()
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.settings.learning_rate, weight_decay=WEIGHT_DECAY)

    def _batch(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return pixels [P,6,R,R], chosen and rejected joined along the channels, and tokens, int64 [P,77] each."""
        rows = self.work.step(self.index)["rows"].tolist()
        pairs = [torch.cat([decoded(image, self.case.resolution) for image in self.work.images(row)]) for row in rows]
        return torch.stack(pairs), tokenized(self.tokenizers_, [self.work.caption(row) for row in rows])

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return latents, noise and embeddings as the script makes them, recomputed at every step."""
        images = torch.cat(pixels.to(self.device, self.vae_.dtype).chunk(2, dim=1))
        latents = torch.cat([self.vae_.encode(part).latent_dist.sample() for part in images.split(VAE_BATCH)])
        latents = (latents * self.vae_.config.scaling_factor).to(self.dtype)
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        return latents, noise, *embedded(self.encoders, tokens, self.device)

    def step(self) -> None:
        started = time.perf_counter()
        pixels, tokens = self._batch()
        self.waited += time.perf_counter() - started
        self.encoded = self._encode(pixels, tokens)
        given = self.injected()  # replaces what was just encoded and drawn: every provider's loss is the same
        noisy, target = self.noisy(given, self.dtype)
        policy_error = errors(self.predict(self.unet_, noisy, given), target)
        self.unet_.disable_adapters()
        with torch.no_grad():
            ref_error = errors(self.predict(self.unet_, noisy, given), target)
        self.unet_.enable_adapters()
        loss, margin = dpo(policy_error, ref_error)
        accuracy = (margin > 0).float().mean() + 0.5 * (margin == 0).float().mean()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.logged = [value.detach().item() for value in (loss, policy_error.mean(), ref_error.mean(), accuracy)]
        self.seen = Seen(policy_error.detach(), ref_error, margin.detach(), norm)
        self.index += 1
