"""pair_errors (dpo_fast/kernels/pair_errors.py) in two launches forward and one backward.

Forward: a program sums one tile of both images of a pair, reading a shared target once, into a workspace
[sums, 2B, tiles]; a second launch adds up an image's tiles. The order of both sums depends on the image size
alone, so reruns, and the same pair in another batch, give bit-identical results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.triton.arithmetic import one_over, rounded
from dpo_fast.kernels.triton.common import launching_for

TILE = 2048  # elements of an image per program: 16 per thread, so that even 16-bit loads are 128 bits wide
ROWS, COLUMNS = 16, 32  # images (or pairs) and tiles that the second launch processes at a time


@triton.jit
def load_float(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tile_sums_kernel(
    policy,  # [2B, elements]
    ref,  # [2B, elements], or None: neither ref_error nor error_delta is summed
    target,  # [B or 2B, elements]
    sums,  # float32 [3 or 1, 2B, tiles]: policy_error, ref_error, error_delta
    pairs,
    elements,
    tiles,
    SHARED_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    start = tile.to(tl.int64) * TILE
    index = tl.arange(0, TILE)
    inside = index < elements - start
    t = load_float(target + pair.to(tl.int64) * elements + start + index, inside)
    for half in tl.static_range(2):
        image = (pair + half * pairs).to(tl.int64)
        row = image * elements + start
        out = sums + image * tiles + tile
        if half == 1 and not SHARED_TARGET:
            t = load_float(target + row + index, inside)
        p = load_float(policy + row + index, inside)
        policy_residual = p - t
        tl.store(out, tl.sum(policy_residual * policy_residual))
        if ref is not None:
            r = load_float(ref + row + index, inside)
            ref_residual = r - t
            plane = 2 * tl.cast(pairs, tl.int64) * tiles
            tl.store(out + plane, tl.sum(ref_residual * ref_residual))
            # (p-t)^2 - (r-t)^2 = (p-r)(p+r-2t), without the cancellation
            tl.store(out + 2 * plane, tl.sum((p - r) * (policy_residual + ref_residual)))


@triton.jit
def image_errors(
    sums,  # [3 or 1, images, tiles]
    ref_error,  # float32 [images], or None
    image,  # [ROWS]
    inside,
    images,
    elements,
    tiles,
    ONLINE: tl.constexpr,  # whether sums includes ref_error and error_delta
    COLUMNS: tl.constexpr,
):
    """policy_error, ref_error and error_delta of some images, float32 [ROWS]: summed in float64, rounded once."""
    e = tl.zeros([image.shape[0], COLUMNS], tl.float64)
    r = tl.zeros([image.shape[0], COLUMNS], tl.float64)
    d = tl.zeros([image.shape[0], COLUMNS], tl.float64)
    plane = tl.cast(images, tl.int64) * tiles
    first = 0
    while first < tiles:  # not range(), which Triton 3.6 cannot interpret with NumPy 2.4
        column = first + tl.arange(0, COLUMNS)[None, :]
        addresses = sums + image.to(tl.int64)[:, None] * tiles + column
        valid = inside[:, None] & (column < tiles)
        e += tl.load(addresses, mask=valid, other=0.0)
        if ONLINE:
            r += tl.load(addresses + plane, mask=valid, other=0.0)
            d += tl.load(addresses + 2 * plane, mask=valid, other=0.0)
        first += COLUMNS
    mean = one_over(elements)
    policy_error = (tl.sum(e, 1) * mean).to(tl.float32)
    if ONLINE:
        return policy_error, (tl.sum(r, 1) * mean).to(tl.float32), (tl.sum(d, 1) * mean).to(tl.float32)
    elif ref_error is None:
        return policy_error, tl.zeros_like(policy_error), policy_error
    else:
        cached = tl.load(ref_error + image, mask=inside, other=0.0)
        return policy_error, cached, policy_error - cached


@triton.jit
def image_errors_kernel(
    sums,
    cached_error,  # float32 [2B], or None
    policy_error,  # float32 [2B], as are the next two
    ref_error,
    error_delta,
    images,
    elements,
    tiles,
    ONLINE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = image < images
    e, r, d = image_errors(sums, cached_error, image, inside, images, elements, tiles, ONLINE, COLUMNS)
    tl.store(policy_error + image, e, mask=inside)
    tl.store(ref_error + image, r, mask=inside)
    tl.store(error_delta + image, d, mask=inside)


@triton.jit
def store_gradients(
    coefficient_w,  # float32, of the chosen image
    coefficient_l,
    policy,  # [2B, elements]
    target,  # [B or 2B, elements]
    grad,  # [2B, elements]
    pair,
    start,
    pairs,
    elements,
    SHARED_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store grad = coefficient * (policy - target) for one tile of both images of a pair."""
    index = tl.arange(0, TILE)
    inside = index < elements - start
    t = load_float(target + pair.to(tl.int64) * elements + start + index, inside)
    for half in tl.static_range(2):
        row = (pair + half * pairs).to(tl.int64) * elements + start
        if half == 1 and not SHARED_TARGET:
            t = load_float(target + row + index, inside)
        residual = load_float(policy + row + index, inside) - t
        value = (coefficient_w if half == 0 else coefficient_l) * residual
        tl.store(grad + row + index, rounded(value, grad.dtype.element_ty), mask=inside)


@triton.jit
def pair_errors_bwd_kernel(
    grad_error,  # float32 [2B]
    policy,
    target,
    grad,
    slope,  # 2 / elements
    pairs,
    elements,
    tiles,
    SHARED_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    start = (tl.program_id(0) % tiles).to(tl.int64) * TILE
    pair = tl.program_id(0) // tiles
    w = tl.load(grad_error + pair) * slope
    l = tl.load(grad_error + pair + pairs) * slope  # noqa: E741
    store_gradients(w, l, policy, target, grad, pair, start, pairs, elements, SHARED_TARGET, TILE)


def tile_sums(policy_pred: Tensor, ref: Tensor | None, target: Tensor) -> tuple[Tensor, bool]:
    """Run the first launch and return its sums, and whether ref holds predictions.

    The sums are float32 [3, 2B, tiles] if it does, else [1, 2B, tiles].
    """
    images, elements = policy_pred.shape[0], policy_pred[0].numel()
    tiles = triton.cdiv(elements, TILE)
    online = ref is not None and ref.dim() == 4
    sums = torch.empty(3 if online else 1, images, tiles, dtype=torch.float32, device=policy_pred.device)
    tile_sums_kernel[(images // 2 * tiles,)](
        policy_pred,
        ref if online else None,
        target,
        sums,
        images // 2,
        elements,
        tiles,
        SHARED_TARGET=target.shape[0] != images,
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return sums, online


def pair_errors_fwd(policy_pred: Tensor, ref: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `kernels.pair_errors` on checked arguments.

    policy_pred [2B,C,H,W]; ref: predictions [2B,C,H,W], errors float32 [2B] or None; target [B,C,H,W] or [2B,C,H,W];
    dtypes may differ. Returns policy_error, ref_error and error_delta, float32 [2B] each.
    """
    images = policy_pred.shape[0]
    with launching_for(policy_pred, ref, target):
        sums, online = tile_sums(policy_pred, ref, target)
        errors = tuple(torch.empty(images, dtype=torch.float32, device=policy_pred.device) for _ in range(3))
        image_errors_kernel[(triton.cdiv(images, ROWS),)](
            sums,
            None if online else ref,
            *errors,
            images,
            policy_pred[0].numel(),
            sums.shape[2],
            ONLINE=online,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return errors


def pair_errors_bwd(grad_error: Tensor, policy_pred: Tensor, target: Tensor) -> Tensor:
    """Return the gradient with respect to policy_pred, [2B,C,H,W] in its dtype.

    grad_error [2B] is the sum of the gradients of policy_error and error_delta.
    """
    images, elements = policy_pred.shape[0], policy_pred[0].numel()
    tiles = triton.cdiv(elements, TILE)
    grad = torch.empty_like(policy_pred)
    with launching_for(policy_pred, grad_error, target):
        pair_errors_bwd_kernel[(images // 2 * tiles,)](
            grad_error.contiguous(),
            policy_pred,
            target,
            grad,
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
