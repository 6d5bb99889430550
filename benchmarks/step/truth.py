"""The fp32 truth that every row is compared with: the same loss, eager, without autocast, its reference a second UNet.

Not timed. It takes one pair per forward pass, with checkpointing, so that the largest case fits.
"""

from pathlib import Path

import torch
from transformers.optimization import Adafactor

from benchmarks.step.plain import MAX_GRAD_NORM, WEIGHT_DECAY, Plain, Seen, dpo, errors


class Truth(Plain):
    def __init__(self, folder: Path, optimizer: str) -> None:
        super().__init__(folder)
        self.dtype = torch.float32
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.unet_, self.reference = self.unet(torch.float32), self.unet(torch.float32).requires_grad_(False)
        self.trained = self.add_lora(self.unet_) if self.case.tuning == "lora" else list(self.unet_.parameters())
        self.unet_.enable_gradient_checkpointing()
        options = dict(lr=self.settings.learning_rate, weight_decay=WEIGHT_DECAY)
        if optimizer == "adafactor":
            self.optimizer = Adafactor(self.trained, scale_parameter=False, relative_step=False, **options)
        else:
            self.optimizer = torch.optim.AdamW(self.trained, **options)

    def step(self) -> None:
        parts, total = [], self.case.pairs
        for pair in range(total):
            given = self.injected(slice(pair, pair + 1))
            noisy, target = self.noisy(given, torch.float32)
            with torch.no_grad():
                ref_error = errors(self.predict(self.reference, noisy, given), target)
            policy_error = errors(self.predict(self.unet_, noisy, given), target)
            loss, margin = dpo(policy_error, ref_error)
            (loss / total).backward()
            parts.append(Seen(policy_error.detach(), ref_error, margin.detach(), loss))
        parts[-1].grad_norm = torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen = Seen.joined(parts)
        self.index += 1
