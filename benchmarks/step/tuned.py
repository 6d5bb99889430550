"""A tuned baseline: what an expert gets from PyTorch and diffusers alone, with none of our kernels or code.

Latents and embeddings cached, no gradient checkpointing, channels_last, the repeated blocks compiled (fullgraph, static
shapes), the attention backend that is fastest here, fused AdamW, nothing read back in the step.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step.plain import MAX_GRAD_NORM, WEIGHT_DECAY, Plain, Seen, dpo, errors

_GPU_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class Tuned(Plain):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch._dynamo.config.recompile_limit = 64  # blocks of every width, with and without gradients
        lora = self.case.tuning == "lora"
        self.unet_ = self._fast(self.unet(self.dtype if lora else torch.float32))
        if lora:
            self.trained, self.reference = self.add_lora(self.unet_), self.unet_
        else:
            self.trained = list(self.unet_.parameters())
            self.reference = self._fast(self.unet(self.dtype)).requires_grad_(False)
        if self.settings.compiled:
            for unet in {self.unet_, self.reference}:
                unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=self.settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.backends = _fastest_first(self.case, self.dtype) if self.device.type == "cuda" else None

    def _fast(self, unet):
        return unet.to(memory_format=torch.channels_last)

    def _attention(self):
        return sdpa_kernel(self.backends, set_priority=True) if self.backends else nullcontext()

    @torch.no_grad()
    def _reference_error(self, noisy, target, given):
        if self.reference is self.unet_:
            self.unet_.disable_adapters()
        error = errors(self.predict(self.reference, noisy, given), target)
        if self.reference is self.unet_:
            self.unet_.enable_adapters()
        return error

    def step(self) -> None:
        parts, size, total = [], self.settings.batch_size, self.case.pairs
        with self._attention():
            for first in range(0, total, size):
                given = self.injected(slice(first, first + size))
                noisy, target = self.noisy(given, self.dtype)
                noisy = noisy.contiguous(memory_format=torch.channels_last)
                ref_error = self._reference_error(noisy, target, given)
                policy_error = errors(self.predict(self.unet_, noisy, given), target)
                loss, margin = dpo(policy_error, ref_error)
                self.scaler.scale(loss * (size / total)).backward()
                parts.append(Seen(policy_error.detach(), ref_error, margin.detach(), loss))
        self.scaler.unscale_(self.optimizer)
        parts[-1].grad_norm = torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.seen = Seen.joined(parts)
        self.index += 1


def _fastest_first(case, dtype: torch.dtype) -> list[SDPBackend]:
    """Return the GPU's attention backends, fastest first on the case's largest self-attention, forward and backward."""
    width, heads = case.model.unet["block_out_channels"], case.model.unet["attention_head_dim"]
    level = next(i for i, kind in enumerate(case.model.unet["down_block_types"]) if "CrossAttn" in kind)
    heads = heads if isinstance(heads, int) else heads[level]
    tokens = (case.latent_side >> level) ** 2
    query = torch.randn(2, heads, tokens, width[level] // heads, device="cuda", dtype=dtype, requires_grad=True)
    times = {}
    for backend in _GPU_BACKENDS:
        try:
            with sdpa_kernel(backend):
                for attempt in range(4):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    F.scaled_dot_product_attention(query, query, query).sum().backward()
                    end.record()
                    torch.cuda.synchronize()
                    if attempt:
                        times[backend] = min(times.get(backend, float("inf")), start.elapsed_time(end))
        except RuntimeError:  # not built, or not for this shape
            continue
    return [*sorted(times, key=times.get), SDPBackend.MATH]
