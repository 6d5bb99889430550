"""What Salesforce's train.py (the paper's authors) does in each step, in our own plain code.

Full fine-tuning of an fp32 UNet under autocast, one pair per forward pass with accumulation, VAE and text encoders run
in the step in the compute dtype, JPEGs decoded by loader workers, a second UNet as the reference, five values read back
per pair. For SDXL: reference, VAE and text encoders offloaded to the host (on a GPU), gradient checkpointing, Adafactor
without relative steps. For SD1.5, as its launcher has it: nothing offloaded or checkpointed, unfused AdamW.
"""

import os
import time
from pathlib import Path

import torch
from accelerate import cpu_offload
from torch.utils.data import DataLoader, Dataset
from transformers.optimization import Adafactor

from benchmarks.step.plain import MAX_GRAD_NORM, WEIGHT_DECAY, Plain, Seen, dpo, embedded, errors, tokenized
from benchmarks.step.work import Work, decoded

WORKERS = 16  # as in the launchers, but at most one per core


class _Pairs(Dataset):
    """Decoded pairs in the order in which the steps train on them."""

    def __init__(self, work: Work, resolution: int, tokenizers: list) -> None:
        self.work, self.resolution, self.tokenizers = work, resolution, tokenizers
        self.rows = work.tensors["rows"].flatten().tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        pixels = torch.cat([decoded(image, self.resolution) for image in self.work.images(row)])
        return pixels, [ids[0] for ids in tokenized(self.tokenizers, [self.work.caption(row)])]


class PeerSalesforce(Plain):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sdxl = self.case.model.family == "sdxl"
        self.unet_, self.reference = self.unet(torch.float32), self.unet(self.dtype).requires_grad_(False).eval()
        self.vae_, self.encoders = self.vae(self.dtype), self.text_encoders(self.dtype)
        rate = self.settings.learning_rate
        if self.sdxl:
            self.unet_.enable_gradient_checkpointing()
            self.optimizer = Adafactor(
                self.unet_.parameters(),
                lr=rate,
                weight_decay=WEIGHT_DECAY,
                clip_threshold=1.0,
                scale_parameter=False,
                relative_step=False,
            )
            if self.device.type == "cuda":
                for module in (self.reference, self.vae_, *self.encoders):
                    cpu_offload(module, execution_device=self.device)
        else:
            self.optimizer = torch.optim.AdamW(self.unet_.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        pairs = _Pairs(self.work, self.case.resolution, self.tokenizers())
        workers = min(WORKERS, os.cpu_count() or 1)
        self.batches = iter(DataLoader(pairs, batch_size=1, num_workers=workers))

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return latents, noise and embeddings as the script makes them, recomputed at every step."""
        images = torch.cat(pixels.to(self.device).chunk(2, dim=1)).to(self.dtype)
        latents = self.vae_.encode(images).latent_dist.sample() * self.vae_.config.scaling_factor
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        return latents, noise, *embedded(self.encoders, tokens, self.device)

    def step(self) -> None:
        parts, total = [], self.case.pairs
        for pair in range(total):
            started = time.perf_counter()
            pixels, tokens = next(self.batches)
            self.waited += time.perf_counter() - started
            self.encoded = self._encode(pixels, tokens)
            given = self.injected(slice(pair, pair + 1))  # replaces what was just encoded and drawn
            noisy, target = self.noisy(given, self.dtype)
            policy_error = errors(self.predict(self.unet_, noisy, given), target)
            with torch.no_grad():
                ref_error = errors(self.predict(self.reference, noisy, given), target)
            loss, margin = dpo(policy_error, ref_error)
            accuracy = (margin > 0).float().mean()
            self.logged = [v.detach().item() for v in (loss, policy_error.mean(), ref_error.mean(), accuracy)]
            self.scaler.scale(loss / total).backward()
            parts.append(Seen(policy_error.detach(), ref_error, margin.detach(), loss))
            self.logged.append(loss.detach().item())
        self.scaler.unscale_(self.optimizer)
        parts[-1].grad_norm = torch.nn.utils.clip_grad_norm_(self.unet_.parameters(), MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.seen = Seen.joined(parts)
        self.index += 1
