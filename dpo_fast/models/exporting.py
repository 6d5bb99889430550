"""Write a result in the formats that ComfyUI, A1111, Forge and kohya's scripts load.

A LoRA: kohya's keys (`lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha`). Its layers are named as
kohya's scripts name them: SDXL's by the original code, Stable Diffusion's by diffusers. A whole model: one file in the
original code's layout (`dpo_fast.models.original_layout`). Both carry the marks and metadata that readers look at.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dpo_fast.errors import BadInput
from dpo_fast.models.family import Family
from dpo_fast.models.lora import ADAPTER, sort_metadata
from dpo_fast.models.marks import V_PRED, ZTSNR
from dpo_fast.models.merging import Update
from dpo_fast.models.original_layout import (
    UNET,
    clip_state,
    open_clip_state,
    original_name,
    unet_places,
    unet_state,
    vae_state,
)

KOHYA, SINGLE_FILE = "kohya_lora_weights.safetensors", "single_file.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_kohya(
    family: Family,
    path: Path,
    state: Mapping[str, torch.Tensor],  # parameter name in the UNet -> tensor, as for `save_lora`
    about: Mapping[str, str],  # metadata of the file
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA with kohya's keys. A, B and alpha are those of the training; a reader scales by alpha / rank.

    Raises BadInput for weights that are not finite in `dtype`.
    """
    config = family.unet.peft_config[ADAPTER]
    places = unet_places(family.unet.config) if family.needs_time_ids else None
    tensors = {}
    for name, tensor in state.items():
        layer, which = name.replace(f".{ADAPTER}.", ".").rsplit(".lora_", 1)  # "A.weight" or "B.weight"
        layer = original_name(layer, places) if places else layer
        stem = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{stem}.lora_{'down' if which.startswith('A') else 'up'}.weight"] = _cast(tensor, dtype, name)
        tensors[f"{stem}.alpha"] = torch.tensor(float(config.lora_alpha))
    save_file(tensors, path, {**about, "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)})
    sort_metadata(path)


def write_single_file(
    family: Family,
    path: Path,
    state: Mapping[str, torch.Tensor],  # the UNet's weights
    about: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
    base: Path | None = None,  # a single file with all other weights; what it lacks, or None: the pipeline's own
) -> None:
    """Write the pipeline with these UNet weights as one file. Floating-point tensors are cast to `dtype`.

    Raises BadInput for a UNet whose blocks the original code does not have, and for weights that are not finite in
    `dtype`.
    """
    tensors = unet_state(state, family.unet.config)
    tensors |= _others(family) | ({} if base is None else _read_others(base))
    tensors = {name: _cast(tensor, dtype, name) for name, tensor in tensors.items()}
    if family.schedule.prediction_type == "v_prediction":
        tensors[V_PRED] = torch.empty(0)
        if family.schedule.rescaled:
            tensors[ZTSNR] = torch.empty(0)
    save_file(tensors, path, dict(about))
    sort_metadata(path)


def merged_state(family: Family, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the UNet's weights under the base's names, with the LoRA `state` (as for `save_lora`) merged in fp32."""
    config = family.unet.peft_config[ADAPTER]
    scale, merged = config.lora_alpha / config.r, {}
    for name, tensor in family.unet.state_dict().items():
        if ".lora_" in name:
            continue
        layer, adapted = name.replace(".base_layer.", "."), name.removesuffix(".base_layer.weight")
        merged[layer] = tensor
        if name.endswith(".base_layer.weight"):
            a, b = (state[f"{adapted}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
            merged[layer] = Update(a, b, scale).merged(tensor.float())
    return merged


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, by which Civitai and A1111 know a checkpoint."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _others(family: Family) -> dict[str, torch.Tensor]:
    """Return all weights but the UNet's, in the original layout."""
    pipeline = family.pipeline
    tensors = vae_state(pipeline.vae.state_dict(), pipeline.vae.config)
    if len(family.text_encoders) > 1:
        tensors |= clip_state(pipeline.text_encoder.state_dict(), "conditioner.embedders.0.transformer.")
        tensors |= open_clip_state(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    elif pipeline.text_encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP
        tensors |= clip_state(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer.")
    else:  # OpenCLIP, in Stable Diffusion 2.x
        tensors |= open_clip_state(pipeline.text_encoder.state_dict(), "cond_stage_model.model.")
    return tensors


def _read_others(base: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a single file but the UNet's and its running average (EMA), which is of the old weights.

    Left out too are tensors outside any component: the noise schedule of old files, which readers compute, and marks.
    """
    with safe_open(base, framework="pt") as file:
        names = [name for name in file.keys() if "." in name and not name.startswith((UNET, "model_ema."))]
        return {name: file.get_tensor(name) for name in names}


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a contiguous copy on the CPU in `dtype`, if it is of a floating-point type. Raises BadInput if a finite
    value is infinite in it."""
    new = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
    if new.is_floating_point() and not new.isfinite().all() and tensor.isfinite().all():
        raise BadInput(f"{name} has values beyond {str(dtype).removeprefix('torch.')}: say --export_dtype fp32 or bf16")
    return new.clone() if new.data_ptr() == tensor.data_ptr() else new
