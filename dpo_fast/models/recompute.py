"""Gradient checkpointing: computing activations again in the backward pass instead of keeping them."""

import functools

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)
# What is dear to compute and therefore kept by "selective"; everything else is bound by memory and cheap to repeat.
_KEPT = (
    *_PRODUCTS,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)
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
    short = op in _PRODUCTS and args[-1].shape[-2] <= _SHORT
    return CheckpointPolicy.MUST_SAVE if op in _KEPT and not short else CheckpointPolicy.PREFER_RECOMPUTE
