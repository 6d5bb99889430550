"""The cost of a run before it starts: parameters, memory by part, disk space and FLOPs per step.

Counted on the meta device from the model's configuration alone: no weights are loaded and nothing is computed.
"""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dpo_fast.config import TrainConfig
from dpo_fast.models.checkpointing import recompute_activations
from dpo_fast.models.family import COMPUTE_DTYPES, Family
from dpo_fast.models.inputs import of_one_image, pooled_width
from dpo_fast.models.load import component_config, family_of
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.lora import adapted_shapes, add_lora
from dpo_fast.models.source import ModelSource, base_of
from dpo_fast.models.text_chunks import positions_of
from dpo_fast.objectives import find_objective
from dpo_fast.training.exports import bytes_of_result, needs_encoders

# Bytes of optimizer state per trained parameter: two fp32 moments; two 8-bit ones with their scales; factored moments.
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256, "adafactor": 0.0}
# The settings of a text encoder that decide how many parameters it has.
_SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class UNetSize:
    """What one image (half a pair) in a UNet takes."""

    parameters: int
    trained: int
    saved_bytes: int  # activations kept for the backward pass
    ranks: tuple[int, ...] = ()  # the highest rank that an update of each adapted layer can have


class UNetFlops(NamedTuple):
    """The FLOPs of one image (half a pair) through a UNet, 2 per multiply-add."""

    forward: float
    backward: float  # including recomputed activations


@dataclass(frozen=True)
class ModelConfigs:
    """The configurations of a model's parts."""

    family: type[Family]
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, source: ModelSource) -> "ModelConfigs":
        """Read them. Raises BadInput for a model that cannot be read."""
        family = family_of(source)
        unet, vae, *text_encoders = (component_config(source, p) for p in ("unet", "vae", *family.text_encoders))
        return cls(family, unet, vae, tuple(text_encoders))


@dataclass(frozen=True)
class Costs:
    """What a run takes, as far as its configuration says; bytes."""

    configs: ModelConfigs
    resolution: int  # pixels
    latent_size: int
    unet: UNetSize
    memory: dict[str, float]  # of a training step, by purpose
    loading: float  # memory while the model is loaded, at least
    checkpoint: float
    result: float
    latent: int  # of an image in the cache
    prompt: int  # of a caption in the cache

    @property
    def needed(self) -> float:
        """The memory that the run needs, in bytes, without what the VAE and the text encoders compute."""
        return max(sum(self.memory.values()), self.loading)


def costs_of(config: TrainConfig, device: str, configs: ModelConfigs | None = None) -> Costs:
    """Count what a run takes on a device of this type ("cpu", "cuda"). configs: of its model; None: read now.

    Raises BadInput for a model that cannot be read and for LoRA targets that it does not have.
    """
    configs = configs or ModelConfigs.of(base_of(config))
    sides = configs.family.sides(configs.unet, configs.vae)
    resolution = config.resolution or sides.default_resolution
    latent_size = resolution // sides.vae_factor
    unet = unet_size(configs.unet, config, latent_size)
    width = COMPUTE_DTYPES[config.mixed_precision].itemsize
    vae, text_encoders = _encoder_parameters(json.dumps([configs.vae, configs.text_encoders], default=str))
    encoders = vae * (width if configs.vae["force_upcast"] is False else 4) + text_encoders * width
    memory = memory_by_part(unet, config)
    if holds_encoders(config, device):
        memory["VAE and text encoders"] = encoders
    tokens = positions_of(config.max_token_length, configs.text_encoders[0])
    latent, prompt = record_bytes(configs.unet, latent_size, tokens)
    return Costs(
        configs,
        resolution,
        latent_size,
        unet,
        memory,
        loading=unet.parameters * (4 if config.tuning == "full" else width) + encoders,
        checkpoint=unet.trained * (4 + STATE_BYTES[config.optimizer] + 4 * config.use_ema),
        result=bytes_of_result(config, unet.trained, unet.parameters, vae + text_encoders),
        latent=latent,
        prompt=prompt,
    )


def memory_by_part(unet: UNetSize, config: TrainConfig) -> dict[str, float]:
    """Return the bytes that a training step holds, by purpose, without VAE and text encoders."""
    width = COMPUTE_DTYPES[config.mixed_precision].itemsize
    separate = width == 2 or config.optimizer == "adamw8bit"  # masters are copies, not the weights themselves
    return {
        "UNet weights": unet.parameters * width,
        "fp32 masters": unet.trained * 4 * separate,
        "gradients": unet.trained * (4 + width * separate),
        "optimizer state": unet.trained * STATE_BYTES[config.optimizer],
        "EMA": unet.trained * 4 * config.use_ema,
        "reference": unet.parameters * width * (runs_reference(config) and config.tuning == "full"),
        f"activations of {config.train_batch_size} pairs": 2 * config.train_batch_size * unet.saved_bytes,
    }


def runs_reference(config: TrainConfig) -> bool:
    """Whether the reference runs at every visit (with full fine-tuning it is then also held in memory)."""
    return find_objective(config.objective).needs_reference and not config.cached_reference


def holds_encoders(config: TrainConfig, device: str) -> bool:
    """Whether VAE and text encoders stay in the memory of the device after the cache is filled.

    They are needed without a cache and for samples, and a whole model is written with them: until then they are kept in
    the host's memory.
    """
    return not config.cache or config.run_validation or (needs_encoders(config) and device == "cpu")


@lru_cache
def _encoder_parameters(configs: str) -> tuple[int, int]:
    """Return the number of parameters of the VAE, and of the text encoders together."""
    vae_config, text_configs = json.loads(configs)
    text_encoders, whole = 0, "name a whole diffusers pipeline"
    with torch.device("meta"):
        with bad_input("the configuration of the VAE cannot be used", whole):
            vae = AutoencoderKL.from_config(vae_config)
        for config, kind in zip(text_configs, (CLIPTextModel, CLIPTextModelWithProjection), strict=False):
            with bad_input("the configuration of a text encoder cannot be used", whole):
                # nothing else of a model's files reaches transformers: some settings name code
                sizes = {name: int(config[name]) for name in _SIZES if name in config}
                text_encoders += _count(kind(CLIPTextConfig(**sizes, bos_token_id=None, eos_token_id=None)))
    return _count(vae), text_encoders


def record_bytes(unet_config: dict, latent_size: int, tokens: int) -> tuple[int, int]:
    """Return the bytes that the cache stores per image and per caption, both in fp16."""
    text = tokens * unet_config["cross_attention_dim"] + pooled_width(unet_config)
    return 2 * unet_config["in_channels"] * latent_size**2, 2 * text


def unet_size(unet_config: dict, config: TrainConfig, latent_size: int) -> UNetSize:
    """Count the size of one image of `latent_size` x `latent_size` latents in a UNet of this configuration."""
    return _unet_size(_as_key(unet_config, config, latent_size))


def unet_flops(unet_config: dict, config: TrainConfig, latent_size: int) -> UNetFlops:
    """Count the FLOPs of one image of `latent_size` x `latent_size` latents in a UNet of this configuration."""
    return _unet_flops(_as_key(unet_config, config, latent_size))


@lru_cache
def _unet_flops(key: str) -> UNetFlops:
    unet, inputs = _on_meta(key)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, _flash_attention():
        prediction = unet(**inputs).sample
        forward = counter.get_total_flops()
        prediction.backward(torch.ones_like(prediction))
    return UNetFlops(float(forward), float(counter.get_total_flops() - forward))


def _as_key(unet_config: dict, config: TrainConfig, latent_size: int) -> str:
    """All that a count depends on."""
    flags = ("mixed_precision", "tuning", "rank", "lora_targets", "gradient_checkpointing", "max_token_length")
    return json.dumps([unet_config, {name: getattr(config, name) for name in flags}, latent_size], default=str)


@lru_cache
def _unet_size(key: str) -> UNetSize:
    unet, inputs = _on_meta(key)
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    made = _Storages()
    with torch.device("meta"), _flash_attention(), made:
        prediction = unet(**inputs).sample
    saved = made.alive(without=weights)
    del prediction  # until here it kept what its backward pass needs
    adapted = adapted_shapes(unet)
    adapters = sum(p.numel() for name, p in unet.named_parameters() if ".lora_" in name)
    return UNetSize(
        _count(unet) - adapters,
        sum(p.numel() for p in unet.parameters() if p.requires_grad),
        saved,
        tuple(min(out, math.prod(rest)) for out, *rest in adapted),
    )


def _on_meta(key: str) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Return the UNet that a run trains, without values, and its inputs for one image."""
    unet_config, flags, latent_size = json.loads(key)
    dtype = COMPUTE_DTYPES[flags["mixed_precision"]]
    with torch.device("meta"):
        with bad_input("the configuration of the UNet cannot be used", "name a whole diffusers pipeline"):
            unet = UNet2DConditionModel.from_config(unet_config)
        if flags["tuning"] == "lora":
            add_lora(unet, flags["rank"], flags["rank"], flags["lora_targets"])
        unet.to(dtype)
        inputs = of_one_image(unet_config, latent_size, flags["max_token_length"] + 2, dtype)
    recompute_activations(unet, flags["gradient_checkpointing"])
    return unet, inputs


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
