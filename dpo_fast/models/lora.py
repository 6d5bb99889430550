"""Low-rank adapters on the UNet: adding, switching off for the reference, saving."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.files import regular_file
from dpo_fast.models.family import Family
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.memory_order import memory_format

DEFAULT_TARGETS = TrainConfig.lora_targets  # the attention projections
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
# Names for several targets: of the transformers, of every linear layer, and of every convolution but the first and the
# last too, which are the layers that kohya's scripts adapt.
_FEED_FORWARD = (*DEFAULT_TARGETS, "ff.net.0.proj", "ff.net.2")
_LINEAR = (*_FEED_FORWARD, "proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2")
GROUPS = {
    "attention": DEFAULT_TARGETS,
    "attention+ff": _FEED_FORWARD,
    "all-linear": _LINEAR,
    "conv": (*_LINEAR, "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
ADAPTER = "default"
_PATTERNS = ("rank_pattern", "alpha_pattern")  # empty, but diffusers 0.39 fails without them
_METADATA = ("r", "lora_alpha", "target_modules", *_PATTERNS)  # a file's adapter metadata, under peft's names


@torch.no_grad()
def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,  # suffixes of module names, or names of GROUPS
    *,
    seed: int = 0,
) -> None:
    """Replace every weight W that `targets` names with W + (alpha / rank) B A; only A and B then require gradients.

    A ~ N(0, 1/rank^2) from `seed`, the same on every device; B = 0. Both are fp32 whatever the UNet's dtype, so that
    master weights copied from them are exact. Raises BadInput for a target that names no module or that peft cannot
    adapt.
    """
    names = [name for name, _ in unet.named_modules()]
    targets = targets_of(unet, targets)
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise BadInput(f"LoRA target {target!r} names no module of the UNet: use e.g. to_q, conv1, proj_in")
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with bad_input(f"LoRA targets {', '.join(targets)} cannot be used", "name linear layers and convolutions"):
        unet.add_adapter(config, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in _lora_layers(unet):
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()
        a = layer.lora_A[ADAPTER].weight
        a.copy_(torch.randn(a.shape, generator=generator) / rank)
    unet.to(memory_format=memory_format(unet))  # including the convolutions' adapters


def targets_of(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """Replace the names of groups by the members that this UNet has."""
    names = [f".{name}" for name, _ in unet.named_modules()]
    found = []
    for target in targets:
        members = GROUPS.get(target, (target,))
        found += [one for one in members if len(members) == 1 or any(name.endswith(f".{one}") for name in names)]
    return list(dict.fromkeys(found))


class AdapterSwitch:
    """Switches the adapters of `unet` off and on again, and nothing else.

    diffusers' disable_adapters() also flips requires_grad, which breaks FSDP2. An adapter that is off does not run at
    all: at scale 0 it would add an exact zero, at the cost of two matrix products per layer.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.layers = _lora_layers(unet)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Make the UNet compute as it did before `add_lora` within the block.

        Run the reference before the policy's forward pass, not between its forward and backward: a checkpointed block
        reruns its forward in the backward pass.
        """
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, off: bool) -> None:
        for layer in self.layers:
            layer._disable_adapters = off  # what peft's own switch sets, beside requires_grad


def save_lora(family: Family, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write `state` (parameter name in the UNet -> fp32 tensor) for `pipeline.load_lora_weights(folder)`.

    B is written as (alpha / rank) B, so that B A is the complete update even for a reader that ignores the metadata and
    takes alpha to be the rank; the file's adapter metadata agrees. The product is rounded to fp32 once, and is exact if
    alpha / rank is a power of two.
    """
    config = family.unet.peft_config[ADAPTER]
    scale = config.lora_alpha / config.r
    layers = {
        name.replace(f".{ADAPTER}.", "."): (tensor * scale if ".lora_B." in name else tensor).contiguous()
        for name, tensor in state.items()
    }
    family.pipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.r,
            "target_modules": sorted(config.target_modules),
            **{pattern: {} for pattern in _PATTERNS},
        },
        weight_name=WEIGHT_NAME,
    )
    sort_metadata(Path(folder, WEIGHT_NAME))


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file in place: it is written in random order, but equal LoRAs should be equal
    files.
    """
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the same text in another order; the rest is padding
            opened.seek(8)
            opened.write(text.ljust(size))


def check_adapter(file: Path) -> None:
    """Raise BadInput for a LoRA file whose adapter metadata `save_lora` would not have written.

    peft builds its configuration from the metadata: some settings name modules that it imports, a string for
    target_modules is a regular expression, and memory is allocated for whatever rank is named.
    """
    with bad_input(f"{file} cannot be loaded", "name the folder of a run"):
        with safe_open(regular_file(Path(file)), framework="pt") as opened:
            said = json.loads((opened.metadata() or {}).get("lora_adapter_metadata") or "{}")
            ranks = {opened.get_slice(name).get_shape()[0] for name in opened.keys() if ".lora_A." in name}
        if not isinstance(said, dict):
            raise ValueError("its lora_adapter_metadata is no object")
    if others := sorted(said.keys() - {f"unet.{name}" for name in _METADATA}):
        raise BadInput(
            f"{file} has settings that no run writes ({', '.join(others[:3])}), with which peft may load code: merge it"
            " with --init_lora, or name the folder of a run"
        )
    written = {"unet.r": min(ranks, default=0), "unet.lora_alpha": min(ranks, default=0)}
    written |= {f"unet.{pattern}": {} for pattern in _PATTERNS}
    other = next((name for name, value in written.items() if said.get(name, value) != value), None)
    if other is None and not isinstance(said.get("unet.target_modules", []), list):
        other = "unet.target_modules"
    if other is not None or len(ranks) > 1:
        raise BadInput(
            f"{file} has tensors of rank {', '.join(map(str, sorted(ranks)))} and says"
            f" {f'{other} {said[other]!r:.80}' if other else 'one rank'}, which no run writes: name the folder of a run"
        )


def check_loaded(unet: nn.Module, file: Path) -> None:
    """Raise BadInput if `unet`, into which diffusers loaded a `save_lora` file, is missing some of its layers."""
    with safe_open(file, framework="pt") as opened:
        layers = {name.removeprefix("unet.").split(".lora_")[0] for name in opened.keys()}
    missing = sorted(layers - {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)})
    if missing:
        raise BadInput(
            f"{file} is of another UNet: {len(missing)} of its {len(layers)} layers are not in this one"
            f" ({', '.join(missing[:3])}); name the folder of a run on this base"
        )


def adapted_shapes(unet: nn.Module) -> list[torch.Size]:
    """Return the shape of every weight that has an adapter: [out, in], or [out, in, h, w] of a convolution."""
    return [layer.get_base_layer().weight.shape for layer in _lora_layers(unet)]


def _lora_layers(unet: nn.Module) -> list[LoraLayer]:
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]
