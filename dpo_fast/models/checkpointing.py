"""Gradient checkpointing: recomputing activations in the backward pass instead of storing them."""

import functools

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::bmm"))
# Operators whose outputs "selective" keeps because they are expensive; all others are memory-bound and cheap to
# recompute. Listed by name, since a library registers its operators only when it is imported, if it is installed.
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
# A matrix product over an inner dimension as short as a LoRA's rank is cheaper to recompute than to keep.
_SHORT = 64


def recompute_activations(unet: UNet2DConditionModel, mode: str) -> None:
    """Choose how much `unet` recomputes: "none", "full" or "selective". It has no randomness, so results do not change.

    "full": each resnet and transformer block keeps only its inputs, which costs one more forward pass. "selective": the
    blocks also keep the outputs of matrix products, convolutions and attention, and recompute norms, activations and
    sums; compiled blocks are left alone, since torch.compile makes the same kind of choice.
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
    """Return an operator's namespace::name, without its overload."""
    schema = getattr(op, "_schema", None)  # higher-order operators have none
    return op.name() if schema is None else schema.name
