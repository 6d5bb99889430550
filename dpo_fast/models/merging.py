"""Merge a LoRA file into a pipeline's weights: all of it or none.

A file holds pairs of low-rank matrices for layers of the UNet and of the text encoders, under the names of peft
(`unet.....to_q.lora_A.weight`), of older diffusers (`.lora.down.weight`, `.processor.to_q_lora.down.weight`,
`.lora_linear_layer.down.weight`) or of kohya's scripts (`lora_unet_..._to_q.lora_down.weight`, and `.alpha`). diffusers
translates them to layer names; the loaders of diffusers and peft silently drop tensors for layers they do not know.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn

from dpo_fast.errors import BadInput
from dpo_fast.files import parse_json, regular_file
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.lora import WEIGHT_NAME

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# What follows the layer's name in the names of A and B, for each format.
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")  # peft's DoRA
_ALPHA = ".alpha"
# Keys of alpha_pattern that are accepted: they are regular expressions from the file, and one with several repetitions
# could take practically forever.
_PATTERN = re.compile(r"(?:[\w.^$-]|\\[.d-])*(?:[*+]\??(?:[\w.^$-]|\\[.d-])*)?")
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Update:
    """A file's update of one layer: W + scale B A or, for DoRA, magnitude (W + scale B A) / |W + scale B A|."""

    a: torch.Tensor  # [r, in] or [r, in, h, w]
    b: torch.Tensor  # [out, r] or [out, r, 1, 1]
    scale: float
    magnitude: torch.Tensor | None = None  # `out` elements; norms are taken over the rows of W

    def fault(self, weight: torch.Tensor) -> str | None:
        """Return why the update cannot be applied to `weight`, or None if it can."""
        rank, rows, columns = len(self.a), len(weight), weight[0].numel()
        if self.a[0].numel() != columns or self.b.numel() != rows * rank or len(self.b) != rows:
            return f"A {[*self.a.shape]} and B {[*self.b.shape]} do not match its weight {[*weight.shape]}"
        if self.magnitude is not None and self.magnitude.numel() != rows:
            return f"the magnitude {[*self.magnitude.shape]} does not match its weight {[*weight.shape]}"
        tensors = [tensor for tensor in (self.a, self.b, self.magnitude) if tensor is not None]
        if not math.isfinite(self.scale) or not all(tensor.isfinite().all() for tensor in tensors):
            return "its values are not all finite"
        return None

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the updated weight, in fp32, for the fp32 `weight`."""
        a, b = (tensor.to(weight.device, torch.float32) for tensor in (self.a, self.b))
        if weight.ndim == 4 and weight.shape[2:] != (1, 1):
            kernel = a.view(len(a), *weight.shape[1:]).transpose(0, 1)
            delta = nn.functional.conv2d(kernel, b.view(*b.shape[:2], 1, 1)).transpose(0, 1)
        else:
            delta = (b.flatten(1) @ a.flatten(1)).view(weight.shape)
        new = weight + delta * self.scale
        if self.magnitude is not None:
            rows = [-1, *[1] * (weight.ndim - 1)]
            norm = torch.linalg.vector_norm(new.flatten(1), dim=1).view(rows)
            new = new * (self.magnitude.to(weight.device, torch.float32).view(rows) / norm)
        return new


@torch.no_grad()
def merge_lora(
    pipeline: DiffusionPipeline, path: str | Path, *, cache_dir: str | None = None, token: str | None = None
) -> None:
    """Add the LoRA at `path` (a .safetensors file, a folder with one, or a hub id) to the weights of the pipeline.

    The sum is computed in fp32 and rounded once to each component's dtype; no adapter remains. A LoRA's text-encoder
    weights are merged too. A layer without an alpha has one equal to its rank.

    Raises BadInput, and changes nothing, for a file that is not a LoRA of this UNet or that cannot be applied
    completely: layers that the model does not have, other shapes, non-finite values, or tensors of another kind (LoHa,
    LoKr, Tucker's middle matrix, kohya's DoRA scales, norms, biases).
    """
    path = str(path)
    with bad_input(f"{path} cannot be merged", f"name a LoRA of a {type(pipeline).__name__}"):
        file = _lora_file(path, cache_dir, token)
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = parse_json((opened.metadata() or {}).get("lora_adapter_metadata") or "{}")
        layers = {component: _layers(pipeline, component) for component in _COMPONENTS}
        updates, left = _updates(state, metadata, pipeline, layers)
    advice = f"name a LoRA of a {type(pipeline).__name__}"
    if not any("lora" in name for name in state):
        raise BadInput(f"{path} cannot be merged: none of its tensors is of a LoRA; {advice}")
    if left:
        shown = ", ".join(left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
        raise BadInput(
            f"{path} cannot be merged whole: {len(left)} of its {len(state)} tensors fit no layer of the model, or are"
            f" not of a plain LoRA ({shown}); {advice}"
        )
    if not any(component == "unet" for component, _ in updates):
        raise BadInput(f"{path} has no LoRA of a UNet: {advice}")
    for (component, name), update in updates.items():
        fault = update.fault(layers[component][name].weight)
        if fault:
            raise BadInput(f"{path} cannot be merged: layer {name} of the {component}: {fault}; {advice}")
    for (component, name), update in updates.items():
        weight = layers[component][name].weight
        weight.copy_(update.merged(weight.float()))


def _updates(
    state: Mapping[str, torch.Tensor], metadata: Mapping, pipeline: DiffusionPipeline, layers: Mapping[str, Mapping]
) -> tuple[dict[tuple[str, str], Update], list[str]]:
    """Return (component, layer) -> update, and the names of the tensors that belong to no update."""
    updates, used = {}, set()
    for name, (component, layer) in _places(state, pipeline).items():
        stem, end_b = next((name.removesuffix(a), b) for a, b in _PAIRS if name.endswith(a))
        if stem + end_b not in state or layer not in layers[component] or (component, layer) in updates:
            continue
        a, b = state[name], state[stem + end_b]
        magnitude = next((stem + end for end in _MAGNITUDES if stem + end in state), None)
        used |= {name, stem + end_b, *filter(None, (magnitude,))}
        if stem + _ALPHA in state:
            used.add(stem + _ALPHA)
            scale = state[stem + _ALPHA].item() / len(a)
        else:
            scale = _scale(metadata, component, layer, len(a))
        updates[component, layer] = Update(a, b, scale, None if magnitude is None else state[magnitude])
    return updates, [name for name in state if name not in used]


def _places(state: Mapping[str, torch.Tensor], pipeline: DiffusionPipeline) -> dict[str, tuple[str, str]]:
    """Map the name of each A to its component and layer, as diffusers translates it; untranslated names are left out.

    diffusers' functions rename tensors and drop some, so they are given one-element tensors that hold a running number,
    which shows which name became which.
    """
    names = [name for name in state if name.endswith(tuple(ends[0] for ends in _PAIRS))]
    kohya = [name for name in names if name.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"))]
    places = {}
    for group in (kohya, [name for name in names if name not in set(kohya)]):
        numbered = {name: torch.tensor([float(number)]) for number, name in enumerate(group)}
        for end_a, end_b in _PAIRS:
            numbered |= {
                name.removesuffix(end_a) + end_b: torch.tensor([-1.0]) for name in group if name.endswith(end_a)
            }
        if not group:
            continue
        renamed, *_ = pipeline.lora_state_dict(numbered, unet_config=pipeline.unet.config)
        for component in _COMPONENTS:
            part = {
                name.removeprefix(f"{component}."): tensor
                for name, tensor in renamed.items()
                if name.startswith(f"{component}.")
            }
            for name, tensor in _peft_names(part, component, getattr(pipeline, component, None)).items():
                if ".lora_A" in name and tensor.item() >= 0:
                    places[group[int(tensor.item())]] = component, name.split(".lora_A")[0]
    return places


def _peft_names(part: dict[str, torch.Tensor], component: str, module: nn.Module | None) -> dict[str, torch.Tensor]:
    """Return the tensors of one component under peft's names, `layer.lora_A.weight`."""
    if not part:
        return {}
    if component == "unet":
        return part if "lora_A" in next(iter(part)) else convert_unet_state_dict_to_peft(part)
    if not any(".lora_A" in name for name in part):
        for names in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
            part = convert_state_dict_to_peft(part, names)
    if not hasattr(module, "text_model"):  # since transformers 5.6
        part = {name.removeprefix("text_model."): tensor for name, tensor in part.items()}
    return part


def _scale(metadata: Mapping, component: str, layer: str, rank: int) -> float:
    """Return the scale of a layer without an alpha tensor: from the adapter's metadata, as peft reads it, else 1.

    It is alpha / rank or, for rsLoRA, alpha / sqrt(rank).
    """
    settings = {
        name.removeprefix(f"{component}."): value
        for name, value in metadata.items()
        if name.startswith(f"{component}.")
    }
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if not _PATTERN.fullmatch(pattern):
            raise BadInput(
                f"the alpha_pattern {pattern[:80]!r} of the LoRA's metadata is no layer's name with at most one"
                " repetition; write names there"
            )
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _layers(pipeline: DiffusionPipeline, component: str) -> dict[str, nn.Module]:
    """Return name -> module for the component's linear layers and convolutions."""
    module = getattr(pipeline, component, None)
    parts = [] if module is None else module.named_modules()
    return {name: part for name, part in parts if isinstance(part, (nn.Linear, nn.Conv2d))}


def _lora_file(path: str, cache_dir: str | None, token: str | None) -> Path:
    """Return the file that `path` names, fetched if it is a hub id."""
    if (local := local_lora_file(path)) is not None:
        return local
    hub = {"cache_dir": cache_dir, "token": token}
    try:
        return Path(hf_hub_download(path, WEIGHT_NAME, **hub))
    except LocalEntryNotFoundError:  # offline; a subclass of EntryNotFoundError
        raise
    except EntryNotFoundError:
        files = sorted(name for name in HfApi(token=token).list_repo_files(path) if name.endswith(".safetensors"))
        return Path(hf_hub_download(path, _only(path, files), **hub))


def local_lora_file(path: str) -> Path | None:
    """Return the LoRA file that `path` names on this machine; None for a hub id. Raises BadInput if there is none."""
    local = Path(path)
    if local.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise BadInput(f"{path} is a pickle, which could run code: convert it to .safetensors")
    if local.is_file():
        return local
    if local.suffix == ".safetensors":
        raise BadInput(f"{path} is no file: check the path")
    if local.is_dir():
        files = sorted(file.name for file in local.glob("*.safetensors"))
        return regular_file(local / _only(path, files))
    return None


def _only(path: str, files: list[str]) -> str:
    """Return the LoRA file among `files`. Raises BadInput if it is not clear which one it is."""
    if WEIGHT_NAME in files:
        return WEIGHT_NAME
    if len(files) != 1:
        raise BadInput(f"{path} holds {len(files)} .safetensors files ({', '.join(files)}): name the LoRA file itself")
    return files[0]
