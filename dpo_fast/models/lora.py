"""Low-rank adapters on the UNet: adding, switching off for the reference, merging, saving."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.files import regular_files
from dpo_fast.models.family import Family
from dpo_fast.models.faults import bad_input
from dpo_fast.quiet import no_loading_bars

DEFAULT_TARGETS = TrainConfig.lora_targets  # the attention projections
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"


@torch.no_grad()
def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,  # ends of module names
    *,
    seed: int = 0,
) -> None:
    """Put W + (alpha / rank) B A in the place of every W that `targets` names; only A and B then require gradients.

    A ~ N(0, 1/rank^2) from `seed`, the same on every device; B = 0. Both are fp32 whatever the UNet's dtype, so that
    masters copied from them are exact. Raises BadInput for a target that names no module.
    """
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise BadInput(f"LoRA target {target!r} names no module of the UNet: use e.g. to_q, conv1, proj_in")
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with bad_input(f"LoRA targets {', '.join(targets)} cannot be used", "name linear layers and convolutions"):
        unet.add_adapter(config, adapter_name=_ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in _lora_layers(unet):
        layer.lora_A[_ADAPTER].float()
        layer.lora_B[_ADAPTER].float()
        a = layer.lora_A[_ADAPTER].weight
        a.copy_(torch.randn(a.shape, generator=generator) / rank)
    unet.to(memory_format=torch.channels_last)  # adapters of convolutions too


class AdapterSwitch:
    """Switches the adapters of `unet` off and on again, and nothing else.

    diffusers' disable_adapters() also flips requires_grad, which breaks FSDP2. An adapter that is off is not run: what
    it would add at scale 0 is an exact zero, and costs two products for every layer that has one.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.layers = _lora_layers(unet)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the UNet is the one before `add_lora`.

        Run the reference before the policy's forward, not between forward and backward: a checkpointed block runs its
        forward again in the backward pass.
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

    Rank and alpha are written as the file's adapter metadata: without it a reader takes alpha for the rank.
    """
    config = family.unet.peft_config[_ADAPTER]
    family.pipeline.save_lora_weights(
        folder,
        unet_lora_layers={name.replace(f".{_ADAPTER}.", "."): tensor.contiguous() for name, tensor in state.items()},
        unet_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
        },
        weight_name=WEIGHT_NAME,
    )


def merge_lora(
    pipeline: DiffusionPipeline, path: str | Path, *, cache_dir: str | None = None, token: str | None = None
) -> None:
    """Add the LoRA at `path` (a .safetensors file, a folder with one, or a hub id) to the weights of the pipeline.

    The sum is made in fp32 and rounded to each component's dtype once; no adapter stays behind. A LoRA that also has
    text-encoder weights is merged there too. Raises BadInput for a file that is not a LoRA of this UNet.
    """
    names = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    modules = {name: getattr(pipeline, name) for name in names}
    dtypes = {name: module.dtype for name, module in modules.items()}
    path = str(path)
    weight_name = _lora_file(path)
    where = {"cache_dir": cache_dir, "token": token, "use_safetensors": True}
    for module in modules.values():
        module.float()
    try:
        with bad_input(f"{path} cannot be merged", f"name a LoRA of a {type(pipeline).__name__}"), no_loading_bars():
            pipeline.load_lora_weights(path, weight_name=weight_name, adapter_name="init", **where)
            loaded = pipeline.get_list_adapters()
            if "unet" not in loaded:
                raise BadInput(f"{path} has no LoRA of a UNet: name a LoRA of a {type(pipeline).__name__}")
            pipeline.fuse_lora(components=[name for name in names if name in loaded])
    finally:
        pipeline.unload_lora_weights()
        for name, module in modules.items():
            module.to(dtypes[name]).requires_grad_(False)


def _lora_file(path: str) -> str | None:
    """The file to load from `path`; None leaves the choice to the hub."""
    local = Path(path)
    if local.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise BadInput(f"{path} is a pickle, which could run code: convert it to .safetensors")
    if local.suffix == ".safetensors" and not local.is_file():
        raise BadInput(f"{path} is no file: check the path")
    if local.is_file():
        return local.name
    if not local.is_dir():
        return None
    regular_files(local)
    files = sorted(file.name for file in local.glob("*.safetensors"))
    if WEIGHT_NAME in files:
        return WEIGHT_NAME
    if len(files) != 1:
        raise BadInput(f"{path} holds {len(files)} .safetensors files ({', '.join(files)}): name the LoRA file itself")
    return files[0]


def _lora_layers(unet: nn.Module) -> list[LoraLayer]:
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]
