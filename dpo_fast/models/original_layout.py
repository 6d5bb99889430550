"""Names and shapes of a pipeline's weights in the layout of the original Stable Diffusion and SDXL code.

ComfyUI, A1111, Forge and kohya's scripts read and write single files in this layout (`model.diffusion_model.`,
`first_stage_model.`, `cond_stage_model.` or `conditioner.embedders.`). Layers are enumerated from a model's
configuration, so an unusual number of blocks or layers is named correctly too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dpo_fast.errors import BadInput

State = dict[str, torch.Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Return diffusers' name -> the original name for the UNet's layers and groups of layers, the longest of which
    that begins a module's name counts (see `original_name`). `config`: a UNet2DConditionModel's.

    Raises BadInput for blocks that the original code does not have.
    """
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def resnet(name: str, original: str) -> None:
        places.update({f"{name}.{part}": f"{original}.{other}" for part, other in _RESNET.items()})

    down, up = config["down_block_types"], config["up_block_types"]
    if other := {*down, *up} - {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}:
        raise BadInput(
            f"the UNet's blocks {', '.join(sorted(other))} have no place in a single file: leave that export out"
        )
    layers = config["layers_per_block"]
    layers = [layers] * len(down) if isinstance(layers, int) else list(layers)
    number = 1
    for block, kind in enumerate(down):
        for layer in range(layers[block]):
            resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0")
            if kind.startswith("CrossAttn"):
                places[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < len(down) - 1:
            places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    resnet("mid_block.resnets.0", "middle_block.0")
    places["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for block, (kind, count) in enumerate(zip(up, reversed(layers), strict=True)):
        attends = kind.startswith("CrossAttn")
        for layer in range(count + 1):
            resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0")
            if attends:
                places[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if layer == count and block < len(up) - 1:
                places[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + attends}.conv"
            number += 1
    return places


def original_name(name: str, places: Mapping[str, str]) -> str:
    """Return the original name of a layer or tensor. Raises BadInput if it has none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (place := places.get(".".join(parts[:length]))) is not None:
            return ".".join([place, *parts[length:]])
    raise BadInput(f"{name} has no place in the layout of the original code: leave that export out")


def unet_state(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> State:
    """Rename the weights of a UNet; the tensors are the same."""
    places = unet_places(config)
    return {UNET + original_name(name, places): tensor for name, tensor in state.items()}


def vae_state(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> State:
    """Rename the weights of an AutoencoderKL; its attention becomes 1 x 1 convolutions, as in the original code."""
    places, levels = dict(_vae_places(config)), {}
    for name, tensor in state.items():
        if name.startswith(("quant_conv.", "post_quant_conv.")):
            levels[VAE + name] = tensor
            continue
        new = original_name(name, places)
        convolution = ".mid.attn_1." in new and tensor.ndim == 2
        levels[VAE + new] = tensor[:, :, None, None] if convolution else tensor
    return levels


def _vae_places(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    levels = len(config["block_out_channels"])
    for half in ("encoder", "decoder"):
        for part, other in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{part}", f"{half}.{other}"
        for resnet in range(2):
            yield from _vae_resnet(f"{half}.mid_block.resnets.{resnet}", f"{half}.mid.block_{resnet + 1}")
        attention, original = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        for part, other in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            yield f"{attention}.{part}", f"{original}.{other}"
        for level in range(levels):
            block = f"{half}.{'down' if half == 'encoder' else 'up'}_blocks.{level}"
            original = f"encoder.down.{level}" if half == "encoder" else f"decoder.up.{levels - 1 - level}"
            for layer in range(config["layers_per_block"] + (half == "decoder")):
                yield from _vae_resnet(f"{block}.resnets.{layer}", f"{original}.block.{layer}")
            yield f"{block}.downsamplers.0.conv", f"{original}.downsample.conv"
            yield f"{block}.upsamplers.0.conv", f"{original}.upsample.conv"


def _vae_resnet(name: str, original: str) -> Iterator[tuple[str, str]]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{name}.{part}", f"{original}.{part}"
    yield f"{name}.conv_shortcut", f"{original}.nin_shortcut"


def clip_state(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """Rename the weights of OpenAI's CLIP text encoder; `prefix`: up to and with its dot.

    transformers 5.6 dropped the prefix `text_model.` from a CLIPTextModel's tensors; files have it.
    """
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def open_clip_state(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """Rename the weights of a text encoder to OpenCLIP's: q, k and v are one matrix, the projection is transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    original: State = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            original["text_projection"] = tensor.T
        elif name.startswith("embeddings."):
            part = name.removeprefix("embeddings.")
            if part != "position_ids":
                original["positional_embedding" if part.startswith("position") else part] = tensor
        elif name.startswith("final_layer_norm."):
            original[name.replace("final_layer_norm", "ln_final")] = tensor
        else:
            layer, part = name.removeprefix("encoder.layers.").split(".", 1)
            block = f"transformer.resblocks.{layer}"
            module, kind = part.rsplit(".", 1)
            if module == "self_attn.q_proj":
                three = [state[name.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")]
                original[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                original[f"{block}.{_OPEN_CLIP[module]}.{kind}"] = tensor
    return {prefix + name: tensor for name, tensor in original.items()}
