"""Every op in plain PyTorch: the specification of the other backends, and the fallback where none is available.

`<op>` is the readable, differentiable specification. `<op>_fwd` and `<op>_bwd` are what the custom ops call; they take
checked, dense tensors and return fresh ones. Arithmetic is float32 whatever the inputs' dtypes, and float64 where the
prediction is float64, so that gradients can be checked against finite differences.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.kernels.constants import PHILOX_KEY_STEPS, PHILOX_PRODUCTS

NOISE_STREAM = 0  # the other streams are the loader's: dpo_fast/draws.py
DRAW_BITS = 28  # the last counter word is stream << 28 | draw

Words = tuple[Tensor, Tensor, Tensor, Tensor]  # int64 tensors in [0, 2^32) that broadcast

_MASK = 0xFFFFFFFF


# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return four 32-bit words for each counter; the key is two 32-bit integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the 64-bit products wrap to negative int64: the mask turns the arithmetic shift into a logical one
        product0, product1 = c0 * PHILOX_PRODUCTS[0], c2 * PHILOX_PRODUCTS[1]
        c0, c2 = (product1 >> 32) & _MASK ^ c1 ^ k0, (product0 >> 32) & _MASK ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _MASK, (k1 + PHILOX_KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def draw_words(seed: int, pair_id: Tensor, draw: Tensor, stream: int, block: Tensor) -> Words:
    """The four words of one block of a pair's draw in a stream; pair_id, draw and block are int64 and broadcast."""
    counter = (block, pair_id & _MASK, (pair_id >> 32) & _MASK, draw | (stream << DRAW_BITS))
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))


def uniform(word: Tensor) -> Tensor:
    """Map words to uniforms: float64 in (0, 1], multiples of 2^-24 and so exact in float32 too."""
    return ((word >> 8) + 1).double() * 2.0**-24


def normal_noise(seed: int, pair_id: Tensor, draw: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return standard normals, float32 [B, channels, height, width], from Box-Muller in float64, rounded once.

    A block gives four channels of one pixel. Pixels are numbered in row order whatever the memory format, and each
    takes ceil(channels / 4) consecutive blocks; surplus normals of the last one are dropped. The other backends compute
    in float32 and agree within 1e-6.
    """
    pixels, groups = height * width, -(-channels // 4)
    block = torch.arange(pixels * groups, device=pair_id.device)
    u0, u1, u2, u3 = map(uniform, draw_words(seed, pair_id[:, None], draw[:, None], NOISE_STREAM, block))
    radius0, radius2 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    angle1, angle3 = 2 * math.pi * u1, 2 * math.pi * u3
    normals = (radius0 * angle1.cos(), radius0 * angle1.sin(), radius2 * angle3.cos(), radius2 * angle3.sin())
    by_pixel = torch.stack(normals, dim=-1).float().view(-1, pixels, groups * 4)[..., :channels]
    return by_pixel.transpose(1, 2).reshape(-1, channels, height, width)


# noise_pair


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout to use for x [N,C,H,W]: channels_last if x is that and not contiguous, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def noise_pair(
    latents: Tensor,  # [2B, C, H, W] any float dtype
    sqrt_alpha_bar: Tensor,  # [B] float32
    sqrt_one_minus_alpha_bar: Tensor,  # [B] float32
    seed: int,
    pair_id: Tensor,  # [B] int64
    draw: Tensor,  # [B] int64
    prediction_type: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return noisy latents [2B,C,H,W] in `dtype` and the float32 target, in the latents' memory format; no checks.

    x_t = sqrt(abar_t) x_0 + sqrt(1-abar_t) eps (arXiv 2006.11239 eq. 4). The target is eps [B,C,H,W] for "epsilon",
    else the velocity sqrt(abar_t) eps - sqrt(1-abar_t) x_0 [2B,C,H,W] (arXiv 2202.00512).
    """
    _, channels, height, width = latents.shape
    noise = normal_noise(seed, pair_id, draw, channels, height, width)
    x0 = latents.float().unflatten(0, (2, -1))
    signal, sigma = sqrt_alpha_bar.view(-1, 1, 1, 1), sqrt_one_minus_alpha_bar.view(-1, 1, 1, 1)
    noisy = (signal * x0 + sigma * noise).flatten(0, 1).to(dtype)
    target = noise if prediction_type == "epsilon" else (signal * noise - sigma * x0).flatten(0, 1)
    layout = memory_format(latents)
    return noisy.contiguous(memory_format=layout), target.contiguous(memory_format=layout)


noise_pair_fwd = noise_pair


# pair_errors


def pair_errors(policy_pred: Tensor, ref: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return policy_error, ref_error (0 without ref) and error_delta = policy_error - ref_error, each [2B].

    policy_pred [2B,C,H,W]; ref: predictions [2B,C,H,W], errors [2B] or None; target [B,C,H,W], shared by the images of
    a pair, or [2B,C,H,W]. An error is the mean over C, H, W of (prediction - target)^2. Nothing is checked.
    """
    p, t = _halves(policy_pred, target)
    policy_residual = p - t
    policy_error = _image_mean(policy_residual.square())
    if ref is None:
        return policy_error, torch.zeros_like(policy_error), policy_error
    ref = ref.to(p.dtype)
    if ref.dim() == 1:
        return policy_error, ref, policy_error - ref
    r = ref.unflatten(0, (2, -1))
    ref_residual = r - t
    # = policy_error - ref_error, without the cancellation: (p-t)^2 - (r-t)^2 = (p-r)(p+r-2t)
    error_delta = _image_mean((p - r) * (policy_residual + ref_residual))
    return policy_error, _image_mean(ref_residual.square()), error_delta


def pair_errors_fwd(policy_pred: Tensor, ref: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pair_errors` does, [2B] each, in tensors that share no memory with each other or the inputs."""
    policy_error, ref_error, error_delta = pair_errors(policy_pred, ref, target)
    if ref is None:  # a custom op's outputs may alias neither its inputs nor one another
        error_delta = error_delta.clone()
    elif ref.dim() == 1:
        ref_error = ref_error.clone()
    return policy_error, ref_error, error_delta


def pair_errors_bwd(grad_error: Tensor, policy_pred: Tensor, target: Tensor) -> Tensor:
    """Return the gradient with respect to policy_pred, [2B,C,H,W] in its dtype.

    grad_error [2B] is the sum of the gradients of policy_error and error_delta: both have the derivative
    2 (p - t) / (C H W).
    """
    p, t = _halves(policy_pred, target)
    coefficient = grad_error.to(p.dtype) * (2 / policy_pred[0].numel())
    return (coefficient.view(2, -1, 1, 1, 1) * (p - t)).flatten(0, 1).to(policy_pred.dtype)


def _halves(policy_pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return policy_pred as [2, B, C, H, W] and target as [1 or 2, B, C, H, W], in the dtype of the arithmetic."""
    dtype = torch.promote_types(policy_pred.dtype, torch.float32)
    p = policy_pred.to(dtype).unflatten(0, (2, -1))
    return p, target.to(dtype).unflatten(0, (-1, p.shape[1]))


def _image_mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3, 4)).flatten()


# dpo_loss


def pair_margin(error_delta: Tensor, beta: float) -> Tensor:
    """margin [B] = -(beta/2) (delta_w - delta_l); the order of the subtraction makes it +0.0 where both are equal."""
    delta_w, delta_l = error_delta.chunk(2)
    return (beta / 2) * (delta_l - delta_w)


def batch_mean(pair_loss: Tensor, weight: Tensor | None) -> Tensor:
    """Return (1/B) sum weight * pair_loss, summed in float64: the mean of B equal losses is exactly that loss."""
    total = pair_loss.double() if weight is None else pair_loss.double() * weight.double()
    return total.mean().to(pair_loss.dtype)


def dpo_loss(
    policy_pred: Tensor,
    ref: Tensor,
    target: Tensor,
    beta: float,
    label: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss [], margin [B], policy_error [2B] and ref_error [2B] (arXiv 2311.12908 eq. 14, its code's beta).

    loss = (1/B) sum of weight * -[y logsigmoid(margin) + (1-y) logsigmoid(-margin)], y = label. policy_pred, ref and
    target are as in `pair_errors`, with ref not None; label [B] in [0, 1] and weight [B], None: all 1. No checks.
    """
    policy_error, ref_error, error_delta = pair_errors(policy_pred, ref, target)
    margin = pair_margin(error_delta, beta)
    pair_loss = -F.logsigmoid(margin)
    if label is not None:
        label = label.to(margin.dtype)
        pair_loss = label * pair_loss - (1 - label) * F.logsigmoid(-margin)
    return batch_mean(pair_loss, weight), margin, policy_error, ref_error


def dpo_loss_fwd(
    policy_pred: Tensor, ref: Tensor, target: Tensor, beta: float, label: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `dpo_loss` does, in tensors that share no memory with each other or the inputs."""
    loss, margin, policy_error, ref_error = dpo_loss(policy_pred, ref, target, beta, label, weight)
    return loss, margin, policy_error, ref_error.clone() if ref.dim() == 1 else ref_error


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

    d loss / d e_w = (weight/B) (beta/2) [y sigmoid(-m) - (1-y) sigmoid(m)] = -d loss / d e_l
    """
    descent = torch.sigmoid(-margin)  # not 1 - sigmoid(margin), which is 0 from margin 17 on
    if label is not None:
        label = label.to(margin.dtype)
        descent = label * descent - (1 - label) * torch.sigmoid(margin)
    if weight is not None:
        descent = descent * weight.to(margin.dtype)
    grad_w = grad_loss * (beta / 2 / margin.numel()) * descent
    return pair_errors_bwd(torch.cat([grad_w, -grad_w]), policy_pred, target)
