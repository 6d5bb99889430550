"""The cost of a run before it starts: parameters, memory by part, disk space and FLOPs per step.

Counted on the meta device from the model's configuration alone: no weights are loaded and nothing is computed.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.config import TrainConfig, to_yaml
from dpo_fast.files import human_bytes
from dpo_fast.models.checkpointing import recompute_activations
from dpo_fast.models.family import COMPUTE_DTYPES
from dpo_fast.models.inputs import of_one_image, pooled_width
from dpo_fast.models.load import component_config, family_of
from dpo_fast.models.lora import add_lora
from dpo_fast.models.source import base_of
from dpo_fast.objectives import find_objective

# Bytes of optimizer state per trained parameter: two fp32 moments; two 8-bit ones with their scales; factored moments.
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256, "adafactor": 0.0}


@dataclass
class UNetCosts:
    """The cost of one image (half a pair) through the UNet."""

    parameters: int
    trained: int
    forward: float  # FLOPs, 2 per multiply-add
    backward: float  # FLOPs, including recomputed activations
    saved_bytes: int  # activations kept for the backward pass


def plan(config: TrainConfig) -> str:
    """Return the resolved configuration and the costs as text. Raises BadInput for a model that cannot be read."""
    source = base_of(config)
    unet_config = component_config(source, "unet")
    sides = family_of(source).sides(unet_config, component_config(source, "vae"))
    resolution = config.resolution or sides.default_resolution
    costs = unet_costs(unet_config, config, resolution // sides.vae_factor)
    needs_reference = _runs_reference(config)
    pairs = config.pairs_per_step or config.train_batch_size * config.gradient_accumulation_steps

    tokens = component_config(source, "text_encoder").get("max_position_embeddings", 77)
    a_latent, a_prompt = record_bytes(unet_config, resolution // sides.vae_factor, tokens)
    memory = memory_by_part(costs, config)
    checkpoint = costs.trained * (4 + STATE_BYTES[config.optimizer] + 4 * config.use_ema)
    result = costs.trained * 4 if config.tuning == "lora" else costs.parameters * 4
    forwards = 1 + needs_reference
    flops = 2 * pairs * (forwards * costs.forward + costs.backward)
    kept = f", {config.checkpoints_total_limit} kept" if config.checkpoints_total_limit else ""
    recomputes = config.gradient_checkpointing != "none"

    lines = [
        to_yaml(config).rstrip(),
        "",
        f"parameters        {costs.parameters:,} in the UNet, {costs.trained:,} trained",
        f"a step            {pairs} pairs at {resolution} x {resolution}",
        *(f"memory            {human_bytes(value):>10}  {name}" for name, value in memory.items()),
        f"memory            {human_bytes(sum(memory.values())):>10}  in all, without VAE and text encoders",
        f"disk              {human_bytes(checkpoint):>10}  a checkpoint{kept}",
        f"disk              {human_bytes(result):>10}  the result",
        *_cache_lines(config, pairs, a_latent, a_prompt),
        f"UNet FLOPs a step {flops / 1e12:>10.3f}  TFLOP: policy forward and backward"
        + (", reference forward" if needs_reference else "")
        + (", recomputation" if recomputes else ""),
    ]
    return "\n".join(lines)


def memory_by_part(costs: UNetCosts, config: TrainConfig) -> dict[str, float]:
    """Return the bytes that a training step holds, by purpose; VAE and text encoders are freed by then."""
    width = COMPUTE_DTYPES[config.mixed_precision].itemsize
    separate = width == 2 or config.optimizer == "adamw8bit"  # masters are copies, not the weights themselves
    return {
        "UNet weights": costs.parameters * width,
        "fp32 masters": costs.trained * 4 * separate,
        "gradients": costs.trained * (4 + width * separate),
        "optimizer state": costs.trained * STATE_BYTES[config.optimizer],
        "EMA": costs.trained * 4 * config.use_ema,
        "reference": costs.parameters * width * (_runs_reference(config) and config.tuning == "full"),
        f"activations of {config.train_batch_size} pairs": 2 * config.train_batch_size * costs.saved_bytes,
    }


def _runs_reference(config: TrainConfig) -> bool:
    """Whether the reference runs at every visit (with full fine-tuning it is then also held in memory)."""
    return find_objective(config.objective).needs_reference and not config.cached_reference


def record_bytes(unet_config: dict, latent_size: int, tokens: int) -> tuple[int, int]:
    """Return the bytes that the cache stores per image and per caption, both in fp16."""
    text = tokens * unet_config["cross_attention_dim"] + pooled_width(unet_config)
    return 2 * unet_config["in_channels"] * latent_size**2, 2 * text


def _cache_lines(config: TrainConfig, pairs_a_step: int, a_latent: int, a_prompt: int) -> list[str]:
    """The size of the cache, as far as it is known without opening the pairs."""
    if not config.cache:
        return []
    lines = [f"cache             {a_latent} bytes an image, {a_prompt} a prompt, each stored once"]
    visits = None if config.max_train_steps is None else config.max_train_steps * pairs_a_step
    most = min((n for n in (visits, config.max_train_samples) if n is not None), default=None)
    if most is not None:
        size = most * (2 * a_latent * (1 + config.hflip) + a_prompt)
        lines.append(f"cache             {human_bytes(size):>10}  at most, for {most} pairs with nothing in common")
        if config.cached_reference:
            size = human_bytes(8 * most * config.cached_reference)
            lines.append(f"cache             {size:>10}  at most, errors of the reference at every draw")
    return lines


def unet_costs(unet_config: dict, config: TrainConfig, latent_size: int) -> UNetCosts:
    """Count the costs of one image of `latent_size` x `latent_size` latents in a UNet of this configuration."""
    dtype = COMPUTE_DTYPES[config.mixed_precision]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        parameters = sum(p.numel() for p in unet.parameters())
        if config.tuning == "lora":
            add_lora(unet, config.rank, config.lora_alpha or config.rank, config.lora_targets)
        unet.to(dtype)
        inputs = of_one_image(unet_config, latent_size, 77, dtype)
        recompute_activations(unet, config.gradient_checkpointing)
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        counter, made = FlopCounterMode(display=False), _Storages()
        with counter, _flash_attention():
            with made:
                prediction = unet(**inputs).sample
            saved, forward = made.alive(without=weights), counter.get_total_flops()
            prediction.backward(torch.ones_like(prediction))
        backward = counter.get_total_flops() - forward
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return UNetCosts(parameters, trained, float(forward), float(backward), saved)


class _Storages(TorchDispatchMode):
    """Records the storages of the tensors that operators return within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return given

    def alive(self, without: set[int]) -> int:
        """Bytes of the storages still in use: after a forward pass, those kept for the backward pass."""
        gc.collect()
        return sum(size for name, (storage, size) in self.made.items() if name not in without and not storage.expired())


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Within the block, use flash attention, which never stores the scores; on the meta device PyTorch would not."""
    torch_attention, flash = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention
    F.scaled_dot_product_attention = lambda query, key, value, **_: flash(query, key, value)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torch_attention
