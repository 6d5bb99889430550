"""dpo_loss (dpo_fast/kernels/dpo_loss.py) in two launches forward and one backward.

Forward: the first launch sums tiles as in pair_errors, then one program adds up each image's tiles and averages the
pairs' losses. It works in float64, which costs nothing there: the mean of B equal losses is exactly that loss.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.triton.arithmetic import one_over, sigmoid, softplus
from dpo_fast.kernels.triton.common import launching_for
from dpo_fast.kernels.triton.pair_errors import COLUMNS, ROWS, TILE, image_errors, store_gradients, tile_sums


@triton.jit
def dpo_loss_kernel(
    sums,  # float32 [3 or 1, 2B, tiles]
    cached_error,  # float32 [2B], or None
    label,  # float32 [B], or None
    weight,  # float32 [B], or None
    loss,  # float32 []
    margin,  # float32 [B]
    policy_error,  # float32 [2B]
    ref_error,  # float32 [2B]
    half_beta,
    pairs,
    elements,
    tiles,
    ONLINE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    total = tl.zeros([ROWS], tl.float64)
    first = 0
    while first < pairs:
        pair = first + tl.arange(0, ROWS)
        inside = pair < pairs
        other = pair + pairs
        e_w, r_w, d_w = image_errors(sums, cached_error, pair, inside, 2 * pairs, elements, tiles, ONLINE, COLUMNS)
        e_l, r_l, d_l = image_errors(sums, cached_error, other, inside, 2 * pairs, elements, tiles, ONLINE, COLUMNS)
        tl.store(policy_error + pair, e_w, mask=inside)
        tl.store(policy_error + other, e_l, mask=inside)
        tl.store(ref_error + pair, r_w, mask=inside)
        tl.store(ref_error + other, r_l, mask=inside)
        m = half_beta * (d_l - d_w)
        tl.store(margin + pair, m, mask=inside)

        m = m.to(tl.float64)
        pair_loss = softplus(-m)
        if label is not None:
            y = tl.load(label + pair, mask=inside, other=1.0).to(tl.float64)
            pair_loss = y * pair_loss + (1 - y) * softplus(m)
        # rounded to 24 bits: up to 2^29 equal values then add up in float64 without rounding
        pair_loss = pair_loss.to(tl.float32).to(tl.float64)
        if weight is not None:
            pair_loss *= tl.load(weight + pair, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, pair_loss, 0.0)
        first += ROWS
    tl.store(loss, (tl.sum(total) * one_over(pairs)).to(tl.float32))


@triton.jit
def dpo_loss_bwd_kernel(
    grad_loss,  # float32 []
    policy,  # [2B, elements]
    target,  # [B or 2B, elements]
    margin,  # float32 [B]
    label,  # float32 [B], or None
    weight,  # float32 [B], or None
    grad,  # [2B, elements]
    scale,  # beta / 2 / B
    slope,  # 2 / elements
    pairs,
    elements,
    tiles,
    SHARED_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    start = (tl.program_id(0) % tiles).to(tl.int64) * TILE
    pair = tl.program_id(0) // tiles
    m = tl.load(margin + pair)
    descent = sigmoid(-m)  # not 1 - sigmoid(m), which is 0 from margin 17 on
    if label is not None:
        y = tl.load(label + pair)
        descent = y * descent - (1 - y) * sigmoid(m)
    if weight is not None:
        descent *= tl.load(weight + pair)
    w = tl.load(grad_loss) * scale * descent * slope
    # not -w, which Triton before 3.8 computes as 0 - w: a zero would lose its sign
    store_gradients(w, -1.0 * w, policy, target, grad, pair, start, pairs, elements, SHARED_TARGET, TILE)


def dpo_loss_fwd(
    policy_pred: Tensor, ref: Tensor, target: Tensor, beta: float, label: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `kernels.dpo_loss` on checked arguments.

    policy_pred, ref and target are as in `pair_errors_fwd`, with ref not None; label and weight float32 [B] or None
    (all 1).
    Returns loss [], margin [B], policy_error and ref_error [2B], all float32.
    """
    images = policy_pred.shape[0]
    with launching_for(policy_pred, ref, target):
        sums, online = tile_sums(policy_pred, ref, target)
        loss, margin, policy_error, ref_error = (
            torch.empty(shape, dtype=torch.float32, device=policy_pred.device)
            for shape in ((), images // 2, images, images)
        )
        dpo_loss_kernel[(1,)](
            sums,
            None if online else ref,
            label,
            weight,
            loss,
            margin,
            policy_error,
            ref_error,
            beta / 2,
            images // 2,
            policy_pred[0].numel(),
            sums.shape[2],
            ONLINE=online,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return loss, margin, policy_error, ref_error


def dpo_loss_bwd(
    grad_loss: Tensor,
    policy_pred: Tensor,
    target: Tensor,
    margin: Tensor,
    beta: float,
    label: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Return the gradient with respect to policy_pred, [2B,C,H,W] in its dtype.

    grad_loss is float32 [], margin float32 [B] from the forward, label and weight float32 [B] or None (all 1).
    """
    images, elements = policy_pred.shape[0], policy_pred[0].numel()
    tiles = triton.cdiv(elements, TILE)
    grad = torch.empty_like(policy_pred)
    with launching_for(policy_pred, grad_loss, target, margin):
        dpo_loss_bwd_kernel[(images // 2 * tiles,)](
            grad_loss,
            policy_pred,
            target,
            margin,
            label,
            weight,
            grad,
            beta / images,
            2 / elements,
            images // 2,
            elements,
            tiles,
            SHARED_TARGET=target.shape[0] != images,
            TILE=TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return grad
