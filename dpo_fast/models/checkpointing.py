"""Gradient checkpointing: computing activations again in the backward pass instead of keeping them."""

import functools

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::bmm"))
# What is dear to compute and therefore kept by "selective"; everything else is bound by memory and cheap to repeat.
# By name, since libraries register their operators when they are imported, if they are there at all.
_KEPT = _PRODUCTS | {
    "aten::convolution",
    # scaled_dot_product_attention, and the operators below it that xformers calls (CUTLASS, and flash in PyTorch)
    *(f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
    *("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_fused_attention_overrideable"),
    *(f"aten::_{kind}_attention_forward" for kind in ("flash", "efficient", "cudnn")),
    # xformers 0.0.35: its own wrappers, CK on AMD, what it compiles into one operator; CUTLASS of earlier versions
    *("xformers_flash::flash_fwd", "xformers_flash3::flash_fwd", "xformers::efficient_attention_forward_ck"),
    *("xformer::memory_efficient_attention_forward", "xformers::efficient_attention_forward_cutlass"),
    # flash-attn 2 and 3, and diffusers' wrapper of the latter
    *("flash_attn::_flash_attn_forward", "flash_attn_3::fwd", "_diffusers_flash_attn_3::_flash_attn_forward"),
}
# A product over an inner dimension as short as a LoRA's rank is cheaper to repeat than to keep.
_SHORT = 64


def recompute_activations(unet: UNet2DConditionModel, mode: str) -> None:
    """Choose what `unet` computes twice: "none", "full" or "selective". Nothing random is in it, so no result changes.

    "full": every resnet and transformer block keeps its inputs only: a forward pass more. "selective": the blocks also
    keep what matrix products, convolutions and attention give, and repeat norms, activations and sums; a compiled block
    is left as it is, since torch.compile chooses in the same way.
    """
    assert mode in ("none", "selective", "full"), mode
    if mode == "none":
        unet.disable_gradient_checkpointing()
    else:
        unet.enable_gradient_checkpointing(functools.partial(_run_again, selective=mode == "selective"))


def _run_again(block: nn.Module, *args, selective: bool) -> torch.Tensor:
    if selective and block._compiled_call_impl is not None:
        return block(*args)
    context = {"context_fn": _keeping} if selective else {}
    return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=False, **context)


def _keeping():
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    name = _name(op)
    short = name in _PRODUCTS and args[-1].shape[-2] <= _SHORT
    return CheckpointPolicy.MUST_SAVE if name in _KEPT and not short else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _name(op) -> str:
    """namespace::name of an operator, whichever of its overloads it is."""
    schema = getattr(op, "_schema", None)  # none: a higher-order operator
    return op.name() if schema is None else schema.name
