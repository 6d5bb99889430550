"""noise_pair: the bits of the generator, the distribution of the noise, and the arithmetic of noising."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from dpo_fast.kernels import noise_pair
from dpo_fast.kernels.reference import normal_noise, philox, uniform
from tests.helpers.seeds import SIGMAS
from tests.kernels.cases import BF16, CASES, F16, F32, Case, noise_inputs

MASK = 0xFFFFFFFF


def noise(pair_id: list[int], draw: list[int], shape=(4, 16, 16), seed=0, backend="reference"):
    """The noise alone: latents 0 and sigma 1."""
    pairs = len(pair_id)
    ones = torch.ones(pairs)
    return noise_pair(
        torch.zeros(2 * pairs, *shape),
        ones,
        ones,
        seed,
        torch.tensor(pair_id),
        torch.tensor(draw),
        prediction_type="epsilon",
        dtype=torch.float32,
        backend=backend,
    ).noisy[:pairs]


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, from the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert [word.item() for word in philox(tuple(map(torch.tensor, counter)), tuple(key))] == words
    assert philox_by_hand(counter, key) == words


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 9])
def test_the_counter_of_every_number_is_as_specified(backend, channels):
    """Block (pixel * groups + group), pair id in two words, stream 0 and draw in the last; the 64-bit seed as key."""
    seed, pair_id, draw, height, width = 0xFEDCBA9876543210, 0x123456789A, 0xABCDEF1, 3, 5
    actual = noise([pair_id], [draw], (channels, height, width), seed, backend)[0]
    groups = math.ceil(channels / 4)
    for channel in range(channels):
        for pixel in range(height * width):
            counter = [pixel * groups + channel // 4, pair_id & MASK, pair_id >> 32, draw]
            words = philox_by_hand(counter, [seed & MASK, seed >> 32])
            u = [((word >> 8) + 1) / (1 << 24) for word in words]
            first, second = u[:2] if channel % 4 < 2 else u[2:]
            wave = math.sin if channel % 2 else math.cos
            expected = math.sqrt(-2 * math.log(first)) * wave(2 * math.pi * second)
            assert actual[channel, pixel // width, pixel % width].item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


def test_the_reference_rounds_the_exact_normal_once():
    actual = normal_noise(1, torch.tensor([7]), torch.tensor([2]), 4, 8, 8)
    for pixel in range(64):
        u = [((word >> 8) + 1) / (1 << 24) for word in philox_by_hand([pixel, 7, 0, 2], [1, 0])]
        expected = [
            math.sqrt(-2 * math.log(u[2 * half])) * wave(2 * math.pi * u[2 * half + 1])
            for half in (0, 1)
            for wave in (math.cos, math.sin)
        ]
        assert torch.equal(actual[0, :, pixel // 8, pixel % 8], torch.tensor(expected, dtype=torch.float32))


def test_the_noise_is_standard_normal(backend, seed):
    x = noise(list(range(64)), [0] * 64, (4, 64, 64), seed, backend).double()
    n = x.numel()
    # standard errors of each moment of a standard normal
    assert abs(x.mean()) < SIGMAS / math.sqrt(n)
    assert abs(x.square().mean() - 1) < SIGMAS * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < SIGMAS * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < SIGMAS * math.sqrt(96 / n)
    for threshold in (1.0, 2.0, 3.0, 4.0):
        expected = n * math.erfc(threshold / math.sqrt(2))
        assert abs((x.abs() > threshold).sum() - expected) < SIGMAS * math.sqrt(expected)


def test_the_noise_is_finite_at_both_ends_of_the_uniform():
    ends = uniform(torch.tensor([0, 255, 256, MASK]))
    assert ends.tolist() == [2**-24, 2**-24, 2**-23, 1.0]
    assert torch.equal(ends.float().double(), ends)


def test_noises_of_different_counters_are_independent(backend, seed):
    """Between channels, neighbouring pixels, pairs, draws, seeds, and the high words of pair id and seed."""
    base = noise([5], [1], (4, 64, 64), seed, backend)[0].double()
    others = [
        noise([6], [1], (4, 64, 64), seed, backend)[0],
        noise([5], [2], (4, 64, 64), seed, backend)[0],
        noise([5], [1], (4, 64, 64), seed + 1, backend)[0],
        noise([5 + (1 << 32)], [1], (4, 64, 64), seed, backend)[0],
        noise([5], [1], (4, 64, 64), seed + (1 << 32), backend)[0],
        base.roll(1, 0),
        base.roll(1, 1),
        base.roll(1, 2),
    ]
    for other in others:
        for a, b in ((base, other.double()), (base.square() - 1, other.double().square() - 1)):
            correlation = (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
            assert abs(correlation) < SIGMAS / math.sqrt(base.numel())


def test_a_pair_has_its_noise_in_any_batch(backend, seed):
    together = noise([3, 1, 4, 1 << 35], [1, 5, 9, 2], seed=seed, backend=backend)
    for row, (pair, draw) in enumerate([(3, 1), (1, 5), (4, 9), (1 << 35, 2)]):
        assert torch.equal(together[row], noise([pair], [draw], seed=seed, backend=backend)[0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_noisy_latents_and_target(case, dtype, prediction_type, backend, seed):
    inputs = noise_inputs(case, seed)
    given = {name: value.clone() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    noisy, target = noise_pair(**vars(inputs), prediction_type=prediction_type, dtype=dtype, backend=backend)

    eps = normal_noise(inputs.seed, inputs.pair_id, inputs.draw, *case.shape).double().repeat(2, 1, 1, 1)
    signal = inputs.sqrt_alpha_bar.double().repeat(2).view(-1, 1, 1, 1)
    sigma = inputs.sqrt_one_minus_alpha_bar.double().repeat(2).view(-1, 1, 1, 1)
    x0 = inputs.latents.double()
    fp32 = dict(rtol=1e-6, atol=2e-6)
    assert noisy.dtype == dtype and target.dtype == F32
    rounding = dict(rtol=torch.finfo(dtype).eps, atol=2e-6)
    torch.testing.assert_close(noisy.double(), signal * x0 + sigma * eps, **rounding)
    expected = eps[: case.pairs] if prediction_type == "epsilon" else signal * eps - sigma * x0
    torch.testing.assert_close(target.double(), expected, **fp32)

    for output in (noisy, target):
        if case.channels_last:
            assert output.is_contiguous(memory_format=torch.channels_last)
        else:
            assert output.is_contiguous()
    for name, value in given.items():
        assert torch.equal(getattr(inputs, name), value), f"{name} was written to"


def test_both_images_of_a_pair_get_the_same_noise(backend, seed):
    inputs = noise_inputs(Case("pairs", pairs=3), seed)
    inputs.latents = inputs.latents[:3].repeat(2, 1, 1, 1)
    noisy, _ = noise_pair(**vars(inputs), prediction_type="epsilon", dtype=BF16, backend=backend)
    assert torch.equal(noisy[:3], noisy[3:])
    assert not torch.equal(noisy[0], noisy[1])


def test_memory_format_does_not_change_values(backend, seed):
    inputs = noise_inputs(Case("layout", pairs=2, shape=(4, 6, 10)), seed)
    options = dict(prediction_type="v_prediction", dtype=F16, backend=backend)
    plain = noise_pair(**vars(inputs), **options)
    inputs.latents = inputs.latents.contiguous(memory_format=torch.channels_last)
    last = noise_pair(**vars(inputs), **options)
    strided = torch.zeros(4, 4, 6, 20)[..., ::2].copy_(inputs.latents)
    inputs.latents = strided
    from_strided = noise_pair(**vars(inputs), **options)
    for other in (last, from_strided):
        assert torch.equal(plain.noisy, other.noisy) and torch.equal(plain.target, other.target)
    assert last.noisy.is_contiguous(memory_format=torch.channels_last) and from_strided.noisy.is_contiguous()


def test_the_reference_computes_float64_latents_in_float32_like_all_others(seed):
    inputs = noise_inputs(Case("double", pairs=2), seed)
    options = dict(prediction_type="v_prediction", dtype=torch.float64, backend="reference")
    expected = noise_pair(**vars(inputs), **options)
    inputs.latents = inputs.latents.double()
    actual = noise_pair(**vars(inputs), **options)
    assert torch.equal(actual.noisy, expected.noisy) and torch.equal(actual.target, expected.target)
    assert actual.noisy.dtype == torch.float64 and actual.target.dtype == F32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_reference_equals_the_ddpm_scheduler_bit_for_bit(prediction_type, seed):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    inputs = noise_inputs(Case("scheduler", pairs=4), seed)
    timesteps = torch.tensor([0, 1, 500, 999])
    inputs.sqrt_alpha_bar = scheduler.alphas_cumprod[timesteps].sqrt()
    inputs.sqrt_one_minus_alpha_bar = (1 - scheduler.alphas_cumprod[timesteps]).sqrt()
    noisy, target = noise_pair(**vars(inputs), prediction_type=prediction_type, dtype=F32, backend="reference")
    eps = normal_noise(inputs.seed, inputs.pair_id, inputs.draw, 4, 8, 8)
    both = timesteps.repeat(2)
    assert torch.equal(noisy, scheduler.add_noise(inputs.latents, eps.repeat(2, 1, 1, 1), both))
    velocity = scheduler.get_velocity(inputs.latents, eps.repeat(2, 1, 1, 1), both)
    assert torch.equal(target, eps if prediction_type == "epsilon" else velocity)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[14]], ids=str)
def test_opcheck(case, prediction_type, seed):
    arguments = (*vars(noise_inputs(case, seed)).values(), prediction_type, F16, "reference")
    torch.library.opcheck(torch.ops.dpo_fast.noise_pair.default, arguments)


def test_compiles_in_one_graph(seed):
    inputs = noise_inputs(Case("compile", pairs=3, channels_last=True), seed)
    options = dict(prediction_type="v_prediction", dtype=BF16)

    def twice(**arguments):
        noisy, target = noise_pair(**arguments, **options)
        return noisy * 2, target * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for inputs.seed in (3, (1 << 64) - 1):
        for actual, expected in zip(compiled(**vars(inputs)), twice(**vars(inputs)), strict=True):
            assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def test_a_backward_through_it_raises(seed):
    inputs = noise_inputs(CASES[0], seed)
    inputs.latents.requires_grad_()
    with pytest.raises(RuntimeError, match="noise_pair"):
        noise_pair(**vars(inputs), prediction_type="epsilon", dtype=F32).noisy.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(latents=torch.zeros(3, 4, 8, 8)), r"latents must be \[2B, C, H, W\].*\[3, 4, 8, 8\]"),
        (dict(latents=torch.zeros(4, 4, 8)), "latents must be"),
        (dict(latents=torch.zeros(0, 4, 8, 8)), "latents must be"),
        (dict(latents=torch.zeros(4, 4, 8, 8, dtype=torch.uint8)), "floating point; got torch.uint8"),
        (dict(dtype=torch.int32), "floating point; got torch.float32 and torch.int32"),
        (dict(sqrt_alpha_bar=torch.ones(4)), r"sqrt_alpha_bar must be torch.float32 \[2\]"),
        (dict(sqrt_one_minus_alpha_bar=torch.ones(2).half()), "sqrt_one_minus_alpha_bar must be torch.float32"),
        (dict(pair_id=torch.zeros(2, dtype=torch.int32)), "pair_id must be torch.int64"),
        (dict(draw=torch.zeros(2, dtype=torch.int64, device="meta")), "draw must be .* on cpu; got .* on meta"),
        (dict(prediction_type="sample"), "'sample' is not supported; choose epsilon or v_prediction"),
        (dict(seed=-1), r"seed \(-1\) must lie in \[0, 2\^64\)"),
        (dict(seed=1 << 64), "must lie in"),
    ],
)
def test_bad_arguments_are_named(change, message, seed):
    arguments = {**vars(noise_inputs(Case("good"), seed)), "prediction_type": "epsilon", "dtype": F32}
    noise_pair(**arguments)
    with pytest.raises(ValueError, match=message):
        noise_pair(**{**arguments, **change})
