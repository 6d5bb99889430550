"""Everything random about a pair, as pure functions of (seed, pair id, draw), drawn on the CPU in the loader.

Philox4x32-10 with the seed as key and the counter (block, pair id low, pair id high, stream << 28 | draw). `pair id` is
the row's index in the source before filtering; `draw` counts the pair's earlier visits and must be below 2^28 (else
ValueError). The same pair and draw give the same values for any batch size, accumulation, rank count or resume point.
The noise itself is drawn by the kernel `noise_pair`, from the stream `noise` of the same generator.
"""

from enum import IntEnum

import torch
from torch import Tensor

from dpo_fast.kernels.reference import DRAW_BITS, NOISE_STREAM, draw_words
from dpo_fast.kernels.reference import uniform as uniform_of_word


class STREAMS(IntEnum):
    """Independent random streams of one pair. Recorded runs depend on these numbers: never change or reuse one."""

    noise = NOISE_STREAM
    timestep = 1
    dropout = 2
    flip = 3
    crop = 4
    order = 5


def uniform(seed: int, pair_id: Tensor, draw: Tensor, stream: int) -> Tensor:
    """Draw uniforms, float64 [B] in (0, 1], exact multiples of 2^-24; pair_id and draw int64 [B]."""
    return uniform_of_word(_words(seed, pair_id, draw, stream)[0])


def timesteps(seed: int, pair_id: Tensor, draw: Tensor, allowed: Tensor, *, grid: bool) -> Tensor:
    """Draw one of `allowed` (int64 [n], ascending, n < 2^24) for each pair: int64 [B]; pair_id and draw int64 [B].

    A pair starts at its own uniform u and moves with `draw` by the base-2 van der Corput sequence, so that its first K
    timesteps fall one into each K-th of the range, for K = 2, 4, 8, ... On a grid of few timesteps (SDXL-Turbo) it
    steps through the grid instead: any n successive draws visit each timestep once.
    """
    _check_draw(draw)
    u = uniform(seed, pair_id, torch.zeros_like(draw), STREAMS.timestep)
    n = allowed.numel()
    if grid:
        return allowed[((u * n).long() + draw) % n]
    return allowed[((u + _van_der_corput(draw)).frac() * n).long()]  # exact: at most 52 bits


def dropout(seed: int, pair_id: Tensor, draw: Tensor, probability: float) -> Tensor:
    """Draw whether to drop each pair's caption: bool [B], true with the given probability (exact at 0 and 1)."""
    return uniform(seed, pair_id, draw, STREAMS.dropout) <= probability


def flip(seed: int, pair_id: Tensor, draw: Tensor) -> Tensor:
    """Draw whether to mirror both images of each pair: bool [B], true with probability 1/2."""
    return uniform(seed, pair_id, draw, STREAMS.flip) <= 0.5


def crop(seed: int, pair_id: Tensor, draw: Tensor) -> Tensor:
    """Draw where in its free range the crop of both images lies, (down, across): float64 [B, 2] in (0, 1]."""
    down, across, _, _ = _words(seed, pair_id, draw, STREAMS.crop)
    return torch.stack([uniform_of_word(down), uniform_of_word(across)], dim=1)


def epoch_order(seed: int, epoch: int, pair_id: Tensor) -> Tensor:
    """Return the order of an epoch: a permutation of range(n), int64 [n], for pair_id int64 [n].

    Pairs are sorted by a 64-bit random key of their own, so removing a pair does not change the order of the others.
    """
    high, low, _, _ = _words(seed, pair_id, torch.full_like(pair_id, epoch), STREAMS.order)
    key = high << 32 | low
    # with the top bit flipped, signed order is the unsigned order of the key
    return (key ^ torch.iinfo(torch.int64).min).argsort(stable=True)


def _words(seed: int, pair_id: Tensor, draw: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_draw(draw)
    return draw_words(seed, pair_id, draw, stream, torch.zeros_like(pair_id))


def _check_draw(draw: Tensor) -> None:
    if bool(((draw < 0) | (draw >= 1 << DRAW_BITS)).any()):
        raise ValueError(f"draw must lie in [0, 2^{DRAW_BITS}); got {draw.min().item()} to {draw.max().item()}")


def _van_der_corput(n: Tensor) -> Tensor:
    """Mirror the bits of n at the binary point: 0, 1/2, 1/4, 3/4, 1/8, ... float64, exact."""
    mirrored = torch.zeros_like(n)
    for bit in range(DRAW_BITS):
        mirrored |= (n >> bit & 1) << (DRAW_BITS - 1 - bit)
    return mirrored.double() * 2.0**-DRAW_BITS
