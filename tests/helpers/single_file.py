"""Checkpoints in the layout of the original Stable Diffusion and SDXL code, from a diffusers pipeline.

The inverse of diffusers' `from_single_file`, for the architectures of `tests.helpers.pipelines`.
"""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

_State = dict[str, torch.Tensor]

_UNET_TOP = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}


def write_single_file(
    pipeline: DiffusionPipeline, path: Path, marks: _State | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """Write all weights of an SD1.5 or SDXL pipeline to one .safetensors file, with `marks` besides; return `path`."""
    state = _prefixed("model.diffusion_model.", _unet(pipeline))
    state |= _prefixed("first_stage_model.", _vae(pipeline))
    clip = _prefixed("transformer.text_model.", _text_model(pipeline.text_encoder.state_dict()))
    if hasattr(pipeline, "text_encoder_2"):
        state |= _prefixed("conditioner.embedders.0.", clip)
        state |= _prefixed("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2.state_dict()))
    elif pipeline.unet.config.use_linear_projection:  # Stable Diffusion 2.x
        state |= _prefixed("cond_stage_model.model.", _open_clip(pipeline.text_encoder.state_dict()))
    else:
        state |= _prefixed("cond_stage_model.", clip)
    state |= marks or {}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def kohya_name(pipeline: DiffusionPipeline, layer: str) -> str:
    """What kohya's scripts call a layer of the UNet: SDXL's by the original's name, SD1.5's by that of diffusers."""
    if hasattr(pipeline, "text_encoder_2"):
        layer = _original_name(pipeline, f"{layer}.weight").removesuffix(".weight")
    return "lora_unet_" + layer.replace(".", "_")


def _prefixed(prefix: str, state: _State) -> _State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        name = name.replace(new, old)
    return name


def _unet(pipeline: DiffusionPipeline) -> _State:
    return {_original_name(pipeline, name): tensor for name, tensor in pipeline.unet.state_dict().items()}


def _original_name(pipeline: DiffusionPipeline, name: str) -> str:
    """What the original code calls a tensor of the UNet."""
    config = pipeline.unet.config
    stride = config.layers_per_block + 1
    if ".resnets." in name:
        name = _renamed(name, _UNET_RESNET)
    for new, old in _UNET_TOP.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    way, block, kind, layer, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
    block, layer = int(block), int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{stride * (block + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        position = 2 if "CrossAttn" in config.up_block_types[block] else 1
        return f"output_blocks.{stride * (block + 1) - 1}.{position}.{rest}"
    index = stride * block + layer + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}.{rest}"


def _vae(pipeline: DiffusionPipeline) -> _State:
    levels = len(pipeline.vae.config.block_out_channels)

    def original(name: str) -> str:
        name = _renamed(name, _VAE)
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)

    state = {original(name): tensor for name, tensor in pipeline.vae.state_dict().items()}
    for name, tensor in state.items():  # the original's attention is made of 1 x 1 convolutions
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            state[name] = tensor[:, :, None, None]
    return state


def _text_model(state: _State) -> _State:
    """Without the prefix that CLIPTextModel had before transformers 5.6."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _open_clip(state: _State) -> _State:
    state = _text_model(state)
    original = {}
    if "text_projection.weight" in state:  # not in Stable Diffusion 2.x as diffusers has it
        original["text_projection"] = state.pop("text_projection.weight").T
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:  # one matrix holds q, k and v
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            original[_renamed(name.replace("q_proj.", "in_proj_"), _OPEN_CLIP)] = torch.cat(parts)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            original[_renamed(name, _OPEN_CLIP)] = tensor
    return original
