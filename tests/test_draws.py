"""draws: pure functions of (seed, pair id, draw), with the distributions the trainer relies on."""

import math

import pytest
import torch

from dpo_fast import draws
from dpo_fast.kernels.reference import draw_words, philox
from tests.helpers.seeds import SIGMAS

PAIRS = torch.arange(4096)
ZERO = torch.zeros_like(PAIRS)


def test_the_streams_keep_their_numbers():
    """A run is resumed and compared by them."""
    assert {stream.name: int(stream) for stream in draws.STREAMS} == {
        "noise": 0,
        "timestep": 1,
        "dropout": 2,
        "flip": 3,
        "crop": 4,
        "order": 5,
    }


def test_every_draw_reads_its_own_counter():
    seed, pair, draw = 0x1122334455667788, 0x99AABBCCDD, 0x1234567
    pair_id, visit = torch.tensor([pair]), torch.tensor([draw])
    key = (seed & 0xFFFFFFFF, seed >> 32)

    def words(stream, draw=draw):
        counter = (0, pair & 0xFFFFFFFF, pair >> 32, stream << 28 | draw)
        return [word.item() for word in philox(tuple(map(torch.tensor, counter)), key)]

    def unit(word):
        return ((word >> 8) + 1) / (1 << 24)

    for stream in draws.STREAMS:
        assert draws.uniform(seed, pair_id, visit, stream).item() == unit(words(stream)[0])
    assert draws.crop(seed, pair_id, visit).tolist() == [[unit(words(4)[0]), unit(words(4)[1])]]
    assert draws.flip(seed, pair_id, visit).item() == (unit(words(3)[0]) <= 0.5)
    assert draws.dropout(seed, pair_id, visit, 0.7).item() == (unit(words(2)[0]) <= 0.7)
    turned = (unit(words(1, draw=0)[0]) + int(f"{draw:028b}"[::-1], 2) / (1 << 28)) % 1
    allowed = torch.arange(1000)
    assert draws.timesteps(seed, pair_id, visit, allowed, grid=False).item() == math.floor(1000 * turned)


def test_uniforms_are_exact_and_uniform(seed):
    u = draws.uniform(seed, PAIRS, ZERO, draws.STREAMS.crop)
    assert u.dtype == torch.float64 and torch.equal(u * 2**24, (u * 2**24).round())
    assert 0 < u.min() and u.max() <= 1
    counts = torch.histc(u.float(), 16, 0, 1)
    chi_square = ((counts - 256) ** 2 / 256).sum()
    assert chi_square < 80  # 15 degrees of freedom: 1 in 10^10


def test_streams_draws_pairs_and_seeds_are_independent(seed):
    base = draws.uniform(seed, PAIRS, ZERO, draws.STREAMS.dropout) - 0.5
    others = [
        draws.uniform(seed, PAIRS, ZERO, draws.STREAMS.flip),
        draws.uniform(seed, PAIRS, ZERO + 1, draws.STREAMS.dropout),
        draws.uniform(seed, PAIRS + 1, ZERO, draws.STREAMS.dropout),
        draws.uniform(seed, PAIRS + (1 << 32), ZERO, draws.STREAMS.dropout),
        draws.uniform(seed + 1, PAIRS, ZERO, draws.STREAMS.dropout),
        draws.uniform(seed + (1 << 32), PAIRS, ZERO, draws.STREAMS.dropout),
    ]
    for other in others:
        assert abs((12 * base * (other - 0.5)).mean()) < SIGMAS / math.sqrt(len(PAIRS))


def test_a_pair_has_its_draws_in_any_batch(seed):
    pair_id, visit = torch.tensor([7, 1 << 33, 0, 7]), torch.tensor([0, 5, 2, 1])
    allowed = torch.arange(1000)
    functions = [
        lambda p, d: draws.timesteps(seed, p, d, allowed, grid=False),
        lambda p, d: draws.timesteps(seed, p, d, torch.tensor([249, 499, 749]), grid=True),
        lambda p, d: draws.dropout(seed, p, d, 0.5),
        lambda p, d: draws.flip(seed, p, d),
        lambda p, d: draws.crop(seed, p, d),
    ]
    for function in functions:
        alone = [function(pair_id[i : i + 1], visit[i : i + 1]) for i in range(4)]
        assert torch.equal(function(pair_id, visit), torch.cat(alone))


@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize("start", [0, 32])
def test_successive_timesteps_are_stratified(k, start, seed):
    """A pair's draws start .. start + k - 1 fall one in each k-th of the range, counted from the pair's own offset."""
    allowed = torch.arange(1 << 20)
    drawn = torch.stack(
        [draws.timesteps(seed, PAIRS, ZERO + start + visit, allowed, grid=False) for visit in range(k)], dim=1
    )
    spacing = drawn.sort(dim=1).values.diff(dim=1)
    assert torch.equal(spacing, torch.full_like(spacing, allowed.numel() // k))


def test_timesteps_are_uniform_over_pairs_and_stay_in_what_is_allowed(seed):
    allowed, pairs = torch.arange(0, 999, 3), torch.arange(1 << 16)
    for visit in (0, 1, 11):  # each by itself: the visits of one pair are no independent draws
        drawn = draws.timesteps(seed, pairs, torch.full_like(pairs, visit), allowed, grid=False)
        assert drawn.dtype == torch.int64 and torch.isin(drawn, allowed).all()
        expected = drawn.numel() / allowed.numel()
        counts = torch.bincount(drawn, minlength=999)[::3]
        assert ((counts - expected) ** 2 / expected).sum() < 525  # 332 degrees of freedom: 1 in 10^10


def test_timesteps_at_the_ends_of_the_uniform(monkeypatch):
    allowed = torch.tensor([10, 20, 30, 40])

    def at(u, visit, grid):
        monkeypatch.setattr(draws, "uniform", lambda seed, pair_id, draw, stream: torch.tensor([u]).double())
        return draws.timesteps(0, torch.tensor([0]), torch.tensor([visit]), allowed, grid=grid).item()

    assert at(2**-24, 0, False) == 10 and at(1 - 2**-24, 0, False) == 40 and at(1.0, 0, False) == 10
    assert at(1.0, 1, False) == 30  # frac(1 + 1/2)
    assert at(1 - 2**-24, (1 << 28) - 1, False) == 40
    assert at(2**-24, 0, True) == 10 and at(1 - 2**-24, 0, True) == 40 and at(1.0, 0, True) == 10
    assert at(0.5, 3, True) == 20


@pytest.mark.parametrize("n", [3, 4])
def test_on_a_grid_successive_draws_visit_every_timestep_once(n, seed):
    allowed = torch.tensor([249, 499, 749, 999])[:n]
    drawn = torch.stack([draws.timesteps(seed, PAIRS, ZERO + visit, allowed, grid=True) for visit in range(n)], dim=1)
    assert torch.equal(drawn.sort(dim=1).values, allowed.expand(len(PAIRS), n))
    first = torch.bincount(torch.searchsorted(allowed, drawn[:, 0].contiguous()), minlength=n)
    assert (first - len(PAIRS) / n).abs().max() < SIGMAS * math.sqrt(len(PAIRS) / n)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_dropout_has_its_probability(probability, seed):
    dropped = draws.dropout(seed, PAIRS, ZERO, probability)
    assert dropped.dtype == torch.bool
    spread = math.sqrt(probability * (1 - probability) / len(PAIRS))
    assert abs(dropped.double().mean() - probability) <= SIGMAS * spread


def test_dropout_and_flip_at_the_ends_of_the_uniform(monkeypatch):
    ends = torch.tensor([2**-24, 0.5, 0.5 + 2**-24, 1.0], dtype=torch.float64)
    monkeypatch.setattr(draws, "uniform", lambda seed, pair_id, draw, stream: ends)
    assert draws.dropout(0, PAIRS[:4], ZERO[:4], 0.0).tolist() == [False] * 4
    assert draws.dropout(0, PAIRS[:4], ZERO[:4], 1.0).tolist() == [True] * 4
    assert draws.flip(0, PAIRS[:4], ZERO[:4]).tolist() == [True, True, False, False]  # half of the 2^24 values


def test_dropout_at_the_ends_of_the_uniform(monkeypatch):
    for u, probability, expected in ((1.0, 1.0, True), (2**-24, 0.0, False), (0.5, 0.5, True)):
        monkeypatch.setattr(draws, "uniform", lambda *_, u=u: torch.tensor([u]).double())
        assert draws.dropout(0, ZERO[:1], ZERO[:1], probability).item() is expected


def test_flip_is_a_fair_coin(seed):
    assert abs(draws.flip(seed, PAIRS, ZERO).double().mean() - 0.5) < SIGMAS * 0.5 / math.sqrt(len(PAIRS))


def test_crop_gives_two_independent_coordinates(seed):
    corner = draws.crop(seed, PAIRS, ZERO)
    assert corner.shape == (4096, 2) and corner.dtype == torch.float64
    assert abs(12 * ((corner[:, 0] - 0.5) * (corner[:, 1] - 0.5)).mean()) < SIGMAS / math.sqrt(len(PAIRS))


def test_epoch_order_is_a_permutation_of_its_own_for_every_epoch_and_seed(seed):
    orders = [draws.epoch_order(*of, PAIRS) for of in ((seed, 0), (seed, 1), (seed + 1, 0))]
    for order in orders:
        assert torch.equal(order.sort().values, PAIRS)
        correlation = torch.corrcoef(torch.stack([order, PAIRS]).double())[0, 1]
        assert abs(correlation) < SIGMAS / math.sqrt(len(PAIRS))
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_epoch_order_sorts_the_unsigned_key(seed):
    words = draw_words(seed, PAIRS[:200], torch.full((200,), 3), draws.STREAMS.order, ZERO[:200])
    keys = [high << 32 | low for high, low in zip(words[0].tolist(), words[1].tolist(), strict=True)]
    assert any(key >= 1 << 63 for key in keys)
    assert draws.epoch_order(seed, 3, PAIRS[:200]).tolist() == sorted(range(200), key=keys.__getitem__)


def test_epoch_order_compares_both_words_and_then_the_place(monkeypatch):
    high, low = torch.tensor([5, 1 << 31, 5, 0, 5]), torch.tensor([9, 0, 3, (1 << 32) - 1, 3])
    monkeypatch.setattr(draws, "_words", lambda seed, pair_id, draw, stream: (high, low, low, low))
    assert draws.epoch_order(0, 0, PAIRS[:5]).tolist() == [3, 2, 4, 0, 1]


def test_epoch_order_keeps_the_order_of_the_pairs_that_remain(seed):
    pair_id = PAIRS * 7
    kept = PAIRS % 3 != 0
    full = pair_id[draws.epoch_order(seed, 2, pair_id)]
    part = pair_id[kept][draws.epoch_order(seed, 2, pair_id[kept])]
    assert torch.equal(full[torch.isin(full, part)], part)


@pytest.mark.parametrize("draw", [-1, 1 << 28])
def test_a_draw_out_of_range_would_read_another_stream_and_raises(draw):
    pair_id, visit = torch.tensor([0]), torch.tensor([draw])
    for call in (
        lambda: draws.uniform(0, pair_id, visit, draws.STREAMS.flip),
        lambda: draws.timesteps(0, pair_id, visit, torch.arange(10), grid=False),
        lambda: draws.epoch_order(0, draw, pair_id),
    ):
        with pytest.raises(ValueError, match=r"draw must lie in \[0, 2\^28\)"):
            call()


def test_the_numbers_of_a_run_are_forever():
    """A golden row: a change here makes every recorded run unrepeatable."""
    pair_id, visit = torch.tensor([0, 1, 12345, 1 << 40]), torch.tensor([0, 1, 2, 3])
    assert draws.timesteps(42, pair_id, visit, torch.arange(1000), grid=False).tolist() == [274, 807, 554, 65]
    assert draws.epoch_order(42, 1, torch.arange(10)).tolist() == [4, 3, 9, 5, 6, 7, 8, 0, 2, 1]
