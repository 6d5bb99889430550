"""The errors of policy and reference on each image, and their difference.

    error       = mean over C, H, W of (prediction - target)^2
    error_delta = policy_error - ref_error = mean of (p - r) (p + r - 2 target)

The second form of error_delta is accurate where p is close to r, where the difference of the two means is mostly
rounding error; it is exactly 0 where p = r. Objectives other than DPO are functions of these (dpo_fast/objectives.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.kernels import dispatch
from dpo_fast.kernels.reference import memory_format


class PairErrors(NamedTuple):
    policy_error: Tensor  # [2B], differentiable in policy_pred
    ref_error: Tensor  # [2B], 0 without a reference; carries no gradient
    error_delta: Tensor  # [2B], differentiable in policy_pred


def pair_errors(
    policy_pred: Tensor,  # [2B, C, H, W] any float dtype, chosen first
    ref: Tensor | None,  # predictions [2B, C, H, W] any float dtype, or errors [2B] float32, or None
    target: Tensor,  # [B, C, H, W] shared by both images of a pair, or [2B, C, H, W]; any float dtype
    *,
    backend: str = "auto",
) -> PairErrors:
    """Compute errors in float32, whatever the inputs' dtypes and memory formats (float64 where policy_pred is float64).

    Raises ValueError for shapes, dtypes or devices that do not match, and for a ref or target that requires a gradient:
    the gradient goes to policy_pred alone.
    """
    return PairErrors(*_pair_errors(*dense_predictions(policy_pred, ref, target), backend))


def dense_predictions(policy_pred: Tensor, ref: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the inputs and return them dense in policy_pred's memory order: to a kernel an image is a row of elements.

    Raises ValueError as `pair_errors` does.
    """
    shape, device = policy_pred.shape, policy_pred.device
    if len(shape) != 4 or shape[0] % 2 or 0 in shape or not policy_pred.is_floating_point():
        raise ValueError(
            f"policy_pred must be floating point [2B, C, H, W], chosen first; got {policy_pred.dtype} {list(shape)}"
        )
    # not `in (shape[0], shape[0] // 2)`, which is false for one pair when compiled with dynamic shapes
    if target.shape[1:] != shape[1:] or (target.shape[0] != shape[0] and 2 * target.shape[0] != shape[0]):
        raise ValueError(
            f"target must be [B, C, H, W] or [2B, C, H, W] for policy_pred {list(shape)}; got {list(target.shape)}"
        )
    if ref is not None and ref.shape not in (shape, shape[:1]):
        raise ValueError(
            f"ref must be predictions {list(shape)}, like policy_pred, or errors [{shape[0]}]; got {list(ref.shape)}"
        )
    if ref is not None and ref.dim() == 1 and ref.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"ref errors must be float32: half precision cannot hold their difference; got {ref.dtype}")
    for name, value in (("ref", ref), ("target", target)):
        if value is not None:
            check_constant(name, value, device)

    layout = memory_format(policy_pred)
    if ref is not None:
        ref = ref.contiguous(memory_format=layout) if ref.dim() == 4 else ref.contiguous()
    return policy_pred.contiguous(memory_format=layout), ref, target.contiguous(memory_format=layout)


def check_constant(name: str, value: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `value` is floating point, on `device` and does not require a gradient."""
    if not value.is_floating_point() or value.device != device:
        raise ValueError(f"{name} must be floating point on {device}; got {value.dtype} on {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient but gets none; compute it under torch.no_grad() or detach it")


def check_per_pair(name: str, value: Tensor, pairs: int, device: torch.device) -> None:
    """Raise ValueError unless a label or weight is float32 [pairs], on `device` and does not require a gradient."""
    check_constant(name, value, device)
    if value.shape != (pairs,) or value.dtype != torch.float32:
        raise ValueError(f"{name} must be float32 [{pairs}]; got {value.dtype} {list(value.shape)}")


@torch.library.custom_op("dpo_fast::pair_errors", mutates_args=())
def _pair_errors(
    policy_pred: Tensor, ref: Tensor | None, target: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = dispatch.module_for("pair_errors", backend, policy_pred, ref, target)
    return kernels.pair_errors_fwd(policy_pred, ref, target)


@_pair_errors.register_fake
def _(policy_pred, ref, target, backend):
    dtype = torch.promote_types(policy_pred.dtype, torch.float32)
    return tuple(policy_pred.new_empty(policy_pred.shape[0], dtype=dtype) for _ in range(3))


@torch.library.custom_op("dpo_fast::pair_errors_bwd", mutates_args=())
def _pair_errors_bwd(grad_error: Tensor, policy_pred: Tensor, target: Tensor, backend: str) -> Tensor:
    kernels = dispatch.module_for("pair_errors", backend, policy_pred, target)
    return kernels.pair_errors_bwd(grad_error, policy_pred, target)


@_pair_errors_bwd.register_fake
def _(grad_error, policy_pred, target, backend):
    return torch.empty_like(policy_pred)


def _setup_context(ctx, inputs, output):
    policy_pred, _, target, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])  # ref_error
    ctx.save_for_backward(policy_pred, target)


def _backward(ctx, grad_policy_error, grad_ref_error, grad_error_delta):
    # both outputs have the same derivative in policy_pred, so one pass serves the sum of their gradients
    grad = _pair_errors_bwd(grad_policy_error + grad_error_delta, *ctx.saved_tensors, ctx.backend)
    return grad, None, None, None


_pair_errors.register_autograd(_backward, setup_context=_setup_context)
