"""noise_pair (dpo_fast/kernels/noise_pair.py) in one launch.

A program draws a row of one pair's Philox blocks and adds their noise to both images. For contiguous latents the blocks
belong to neighbouring pixels and one group of four channels, and the four normals of a block go to four planes. For
channels_last the blocks are consecutive, which is also their order in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.reference import memory_format
from dpo_fast.kernels.triton.arithmetic import box_muller, philox, rounded
from dpo_fast.kernels.triton.common import launching_for

BLOCKS = 256  # Philox blocks per program of one warp: 8 neighbours per thread, 128 bits of a 16-bit dtype


@triton.jit
def normals(block, pair_id, draw, seed):
    """The four normals of each block (int64) of a pair's draw, as in reference.normal_noise (stream 0)."""
    pair_id = pair_id.to(tl.uint64)
    seed = seed.to(tl.uint64)
    w0, w1, w2, w3 = philox(
        block.to(tl.uint32),
        pair_id.to(tl.uint32),
        (pair_id >> 32).to(tl.uint32),
        draw.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def store_noised(
    z, latents, noisy, target, signal, sigma, pair, start, index, inside, pairs, numbers, VELOCITY: tl.constexpr
):
    """Store both noisy images of a pair and the target at start + index; z is the noise at these positions."""
    if not VELOCITY:
        tl.store(target + pair.to(tl.int64) * numbers + start + index, z, mask=inside)
    for half in tl.static_range(2):
        place = (pair + half * pairs).to(tl.int64) * numbers + start
        x0 = tl.load(latents + place + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(noisy + place + index, rounded(signal * x0 + sigma * z, noisy.dtype.element_ty), mask=inside)
        if VELOCITY:
            tl.store(target + place + index, signal * z - sigma * x0, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def noise_planes_kernel(
    latents,  # [2B, channels, pixels]
    sqrt_alpha_bar,  # [B]
    sqrt_one_minus_alpha_bar,  # [B]
    seed,
    pair_id,  # [B]
    draw,  # [B]
    noisy,  # as latents
    target,  # [B or 2B, channels, pixels]
    pairs,
    channels,
    pixels,
    groups,  # ceil(channels / 4)
    rows,  # ceil(pixels / BLOCKS)
    VELOCITY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    pair = tl.program_id(0) // (rows * groups)
    group = tl.program_id(0) // rows % groups
    first = (tl.program_id(0) % rows).to(tl.int64) * BLOCKS
    pixel = tl.arange(0, BLOCKS)
    z0, z1, z2, z3 = normals((first + pixel) * groups + group, tl.load(pair_id + pair), tl.load(draw + pair), seed)
    signal, sigma = tl.load(sqrt_alpha_bar + pair), tl.load(sqrt_one_minus_alpha_bar + pair)
    for place in tl.static_range(4):
        z = z0 if place == 0 else z1 if place == 1 else z2 if place == 2 else z3
        channel = group * 4 + place
        inside = pixel < tl.where(channel < channels, pixels - first, 0)
        start = channel.to(tl.int64) * pixels + first
        numbers = tl.cast(channels, tl.int64) * pixels
        store_noised(z, latents, noisy, target, signal, sigma, pair, start, pixel, inside, pairs, numbers, VELOCITY)


@triton.jit(do_not_specialize=["seed"])
def noise_pixels_kernel(
    latents,  # [2B, pixels, channels]
    sqrt_alpha_bar,  # [B]
    sqrt_one_minus_alpha_bar,  # [B]
    seed,
    pair_id,  # [B]
    draw,  # [B]
    noisy,  # as latents
    target,  # [B or 2B, pixels, channels]
    pairs,
    channels,
    pixels,
    groups,  # ceil(channels / 4)
    rows,  # ceil(pixels * groups / BLOCKS)
    FULL: tl.constexpr,  # channels is a multiple of 4: block k covers elements 4k to 4k + 3 of an image
    VELOCITY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    pair = tl.program_id(0) // rows
    first = (tl.program_id(0) % rows).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    z0, z1, z2, z3 = normals(block, tl.load(pair_id + pair), tl.load(draw + pair), seed)
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))  # z0, z1, z2, z3 of one block, then of the next
    signal, sigma = tl.load(sqrt_alpha_bar + pair), tl.load(sqrt_one_minus_alpha_bar + pair)
    numbers = tl.cast(channels, tl.int64) * pixels
    number = tl.arange(0, 4 * BLOCKS)
    if FULL:
        start = 4 * first
        index = number
        inside = index < numbers - start
    else:
        start = 0 * first
        block_of = first + number // 4
        channel = block_of % groups * 4 + number % 4
        index = block_of // groups * channels + channel
        inside = (channel < channels) & (index < numbers)
    store_noised(z, latents, noisy, target, signal, sigma, pair, start, index, inside, pairs, numbers, VELOCITY)


def noise_pair_fwd(
    latents: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    seed: int,
    pair_id: Tensor,
    draw: Tensor,
    prediction_type: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.noise_pair` on checked arguments.

    latents [2B,C,H,W] of any float dtype; sqrt_alpha_bar and sqrt_one_minus_alpha_bar float32 [B]; pair_id and draw
    int64 [B]. Returns the noisy latents [2B,C,H,W] in `dtype` and the target in float32: the noise [B,C,H,W] for
    prediction_type epsilon, the velocity [2B,C,H,W] for v_prediction.
    """
    if dtype == torch.float64:
        raise ValueError("backend 'triton' does not compute in float64; choose reference")
    images, channels, height, width = latents.shape
    pairs, pixels, groups = images // 2, height * width, triton.cdiv(channels, 4)
    velocity = prediction_type == "v_prediction"
    layout = memory_format(latents)
    noisy = torch.empty_like(latents, dtype=dtype, memory_format=layout)
    target = torch.empty_like(latents if velocity else latents[:pairs], dtype=torch.float32, memory_format=layout)
    arguments = (latents, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, seed, pair_id, draw, noisy, target)
    sizes = (pairs, channels, pixels, groups)
    options = dict(VELOCITY=velocity, BLOCKS=BLOCKS, num_warps=1, enable_fp_fusion=False)
    with launching_for(latents):
        if layout == torch.channels_last:
            rows = triton.cdiv(pixels * groups, BLOCKS)
            noise_pixels_kernel[(pairs * rows,)](*arguments, *sizes, rows, FULL=channels % 4 == 0, **options)
        else:
            rows = triton.cdiv(pixels, BLOCKS)
            noise_planes_kernel[(pairs * groups * rows,)](*arguments, *sizes, rows, **options)
    return noisy, target
