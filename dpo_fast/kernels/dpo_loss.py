"""The Diffusion-DPO loss from predictions to a scalar in one op (arXiv 2311.12908 eq. 14, in its code's units).

    margin = -(beta/2) [(e_w - eref_w) - (e_l - eref_l)]            e: mean squared error of an image (pair_errors)
    loss   = (1/B) sum over pairs of weight * -[y logsigmoid(margin) + (1-y) logsigmoid(-margin)]

y is the probability that the chosen image is the better one. The backward needs no image-sized intermediates:

    d loss / d e_w = (weight/B) (beta/2) [y sigmoid(-margin) - (1-y) sigmoid(margin)] = -d loss / d e_l
    d e / d prediction = 2 (prediction - target) / (C H W)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.kernels import dispatch
from dpo_fast.kernels.pair_errors import check_per_pair, dense_predictions


class DPOLoss(NamedTuple):
    loss: Tensor  # [], the only output with a gradient; the others are for logging
    margin: Tensor  # [B]
    policy_error: Tensor  # [2B]
    ref_error: Tensor  # [2B]


def dpo_loss(
    policy_pred: Tensor,  # [2B, C, H, W] any float dtype, chosen first
    ref: Tensor,  # the reference's predictions [2B, C, H, W] any float dtype, or its errors [2B] float32
    target: Tensor,  # [B, C, H, W] shared by both images of a pair, or [2B, C, H, W]; any float dtype
    beta: float,  # for the margin above, with its 1/2 and mean errors, as in the paper's code (2000 to 5000)
    *,
    label: Tensor | None = None,  # [B] float32 in [0, 1], not checked; None: all 1
    weight: Tensor | None = None,  # [B] float32; None: all 1
    backend: str = "auto",
) -> DPOLoss:
    """Compute the loss and the values to log, in float32 whatever the predictions' dtypes (float64 if policy_pred is).

    If ref equals policy_pred, the margin is exactly 0.0 and the loss is log(2), rounded once. The mean is over all B
    pairs: a pair of weight 0 has no gradient but still counts. Raises ValueError for shapes, dtypes or devices that do
    not match, a missing ref, a beta that is not positive and finite, and a ref, target, label or weight that requires
    a gradient.
    """
    if ref is None:
        raise ValueError("dpo_loss needs ref: the reference's predictions [2B, C, H, W] or its errors [2B]")
    if not 0 < beta < math.inf:  # not isfinite(beta), which breaks the graph when a compiled step changes its beta
        raise ValueError(f"beta ({beta}) must be a positive number")
    policy_pred, ref, target = dense_predictions(policy_pred, ref, target)
    pairs = policy_pred.shape[0] // 2
    for name, value in (("label", label), ("weight", weight)):
        if value is not None:
            check_per_pair(name, value, pairs, policy_pred.device)
    label = None if label is None else label.contiguous()
    weight = None if weight is None else weight.contiguous()
    return DPOLoss(*_dpo_loss(policy_pred, ref, target, float(beta), label, weight, backend))


@torch.library.custom_op("dpo_fast::dpo_loss", mutates_args=())
def _dpo_loss(
    policy_pred: Tensor,
    ref: Tensor,
    target: Tensor,
    beta: float,
    label: Tensor | None,
    weight: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = dispatch.module_for("dpo_loss", backend, policy_pred, ref, target, label, weight)
    return kernels.dpo_loss_fwd(policy_pred, ref, target, beta, label, weight)


@_dpo_loss.register_fake
def _(policy_pred, ref, target, beta, label, weight, backend):
    images = policy_pred.shape[0]
    dtype = torch.promote_types(policy_pred.dtype, torch.float32)
    return tuple(policy_pred.new_empty(shape, dtype=dtype) for shape in ((), (images // 2,), (images,), (images,)))


@torch.library.custom_op("dpo_fast::dpo_loss_bwd", mutates_args=())
def _dpo_loss_bwd(
    grad_loss: Tensor,
    policy_pred: Tensor,
    target: Tensor,
    margin: Tensor,
    beta: float,
    label: Tensor | None,
    weight: Tensor | None,
    backend: str,
) -> Tensor:
    kernels = dispatch.module_for("dpo_loss", backend, policy_pred, target, label, weight)
    return kernels.dpo_loss_bwd(grad_loss, policy_pred, target, margin, beta, label, weight)


@_dpo_loss_bwd.register_fake
def _(grad_loss, policy_pred, target, margin, beta, label, weight, backend):
    return torch.empty_like(policy_pred)


def _setup_context(ctx, inputs, output):
    policy_pred, _, target, ctx.beta, label, weight, ctx.backend = inputs
    _, margin, policy_error, ref_error = output
    ctx.mark_non_differentiable(margin, policy_error, ref_error)
    ctx.save_for_backward(policy_pred, target, margin, label, weight)


def _backward(ctx, grad_loss, grad_margin, grad_policy_error, grad_ref_error):
    policy_pred, target, margin, label, weight = ctx.saved_tensors
    grad = _dpo_loss_bwd(grad_loss, policy_pred, target, margin, ctx.beta, label, weight, ctx.backend)
    return grad, None, None, None, None, None, None


_dpo_loss.register_autograd(_backward, setup_context=_setup_context)
