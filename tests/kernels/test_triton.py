"""The Triton kernels' bits: those of the native backend, and the same again; without a GPU, by the interpreter.

Triton reads TRITON_INTERPRET when it is first imported. So where the backend cannot be used, one test runs the tests
of it in this folder in a process that has the variable.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_fast.kernels import dpo_loss, noise_pair, pair_errors, reference
from dpo_fast.kernels.dispatch import usable_backends
from tests.kernels.cases import BF16, CASES, F16, F32, Case, loss_inputs, noise_inputs

USABLE = not usable_backends()["triton"]
NATIVE = not usable_backends()["native"]
HERE = Path(__file__).parent

if USABLE:
    import triton
    import triton.language as tl

    from dpo_fast.kernels.triton import dpo_loss as triton_dpo_loss
    from dpo_fast.kernels.triton import noise_pair as triton_noise_pair
    from dpo_fast.kernels.triton import pair_errors as triton_pair_errors
    from dpo_fast.kernels.triton.arithmetic import box_muller, exponential, philox, rounded, softplus
    from dpo_fast.kernels.triton.common import INTERPRET

    DEVICE = "cpu" if INTERPRET else "cuda"

    @triton.jit
    def philox_kernel(counter, key, words, N: tl.constexpr):
        i = tl.arange(0, N)
        c0 = tl.load(counter + i).to(tl.uint32)
        c1 = tl.load(counter + N + i).to(tl.uint32)
        c2 = tl.load(counter + 2 * N + i).to(tl.uint32)
        c3 = tl.load(counter + 3 * N + i).to(tl.uint32)
        k0, k1 = tl.load(key + i).to(tl.uint32), tl.load(key + N + i).to(tl.uint32)
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
        tl.store(words + i, w0.to(tl.int64))
        tl.store(words + N + i, w1.to(tl.int64))
        tl.store(words + 2 * N + i, w2.to(tl.int64))
        tl.store(words + 3 * N + i, w3.to(tl.int64))

    @triton.jit
    def box_muller_kernel(words, normals, N: tl.constexpr):
        i = tl.arange(0, N)
        z0, z1 = box_muller(tl.load(words + i).to(tl.uint32), tl.load(words + N + i).to(tl.uint32))
        tl.store(normals + i, z0)
        tl.store(normals + N + i, z1)

    @triton.jit
    def exponential_kernel(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, exponential(tl.load(x + i)))

    @triton.jit
    def softplus_kernel(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, softplus(tl.load(x + i)))

    @triton.jit
    def rounded_kernel(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, rounded(tl.load(x + i), y.dtype.element_ty))


if NATIVE:
    from dpo_fast.kernels import native

here = pytest.mark.skipif(not USABLE, reason="by the interpreter, in a process of its own")
beside_native = pytest.mark.skipif(not (USABLE and NATIVE), reason="needs Triton and the extension")
on_a_gpu = pytest.mark.skipif(not USABLE or DEVICE != "cuda", reason="needs a CUDA device")


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(1 << 32, shape)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(USABLE, reason="the backend can be used here: its tests run as they are")
def test_the_kernels_pass_their_tests_in_the_interpreter(pytestconfig):
    """All but the distribution of a million normals, which are compared with the reference's one by one instead."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DPO_FAST_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    command += ["--seed", str(pytestconfig.option.seed)]
    command += ["-k", "triton and not test_the_noise_is_standard_normal and not triton_compile and not dispatch"]
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@here
def test_triton_philox_gives_the_reference_words():
    """Bit for bit, for random counters and keys and the published ones of all ones."""
    counter, key = random_words(4, 256), random_words(2, 256)
    counter[:, 0] = key[:, 0] = 0xFFFFFFFF
    counter, key = counter.to(DEVICE), key.to(DEVICE)
    words = torch.empty_like(counter)
    philox_kernel[(1,)](counter, key, words, N=256)
    expected = [reference.philox(tuple(counter[:, i]), tuple(key[:, i].tolist())) for i in range(256)]
    assert torch.equal(words & 0xFFFFFFFF, torch.tensor(expected, device=DEVICE).T)
    assert [
        f"{word & 0xFFFFFFFF:08x}" for word in words[:, 0].tolist()
    ] == "408f276d 41c83b0e a20bc7c6 6d5451fd".split()


@here
def test_triton_normals_are_near_float64_up_to_the_ends_of_the_uniform():
    words = random_words(2, 1 << 16)
    # both ends of u0 and its neighbourhood of 1, where ln cancels; the quadrants' corners of u1
    edges = [0, 255, 256, 0xFFFFFFFF, 0xFFFFFEFF, 0xFFFFF000, 0xFF000000, 0x7FFFFFFF, 0xB504F300]
    corners = [0xFFFFFFFF, 0, 0x1FFFFF00, 0x20000000, 0x3FFFFF00, 0x5FFFFF00, 0x7FFFFF00, 0x9FFFFF00, 0xBFFFFF00]
    grid = torch.cartesian_prod(torch.tensor(edges), torch.tensor(corners)).T
    words[:, : grid.shape[1]] = grid
    words = words.to(DEVICE)
    normals = torch.empty(words.shape, device=DEVICE)
    box_muller_kernel[(1,)](words, normals, N=1 << 16)
    u0, u1 = map(reference.uniform, words)
    radius, angle = (-2 * u0.log()).sqrt(), 2 * math.pi * u1
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()])
    assert (normals.double() - exact).abs().max() < 1e-6  # 2 ulp of the largest, 5.77
    # the radius of u0 near 1 is small, and right to its own last bits
    assert ((normals.double() - exact).abs() <= 1e-6 * radius).all()


@here
def test_triton_softplus_keeps_its_relative_accuracy():
    x = torch.cat([torch.linspace(-80, 80, 1001), torch.tensor([-1e4, -746.0, -700.0, -37.0, -36.0, 0.0, 700.0, 1e4])])
    x = torch.nn.functional.pad(x.double(), (0, 1024 - x.numel())).to(DEVICE)
    y = torch.empty_like(x)
    softplus_kernel[(1,)](x, y, N=1024)
    exact = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    torch.testing.assert_close(y, exact, rtol=2.0**-49, atol=1e-300)  # 8 units in the last place


@beside_native
def test_triton_exponential_has_the_bits_of_native():
    """For random bits, which are of every exponent, and as many numbers whose results are neither 0 nor infinity."""
    x = torch.cat([random_words(1 << 15).to(torch.int32).view(F32), torch.empty(1 << 15).uniform_(-104.5, 89.5)])
    x[:8] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 88.722839, -103.972084, -87.33655])
    y, expected = torch.empty(1 << 16, device=DEVICE), torch.empty(1 << 16)
    exponential_kernel[(1,)](x.to(DEVICE), y, N=1 << 16)
    native._native.exponentials(x.data_ptr(), expected.data_ptr(), 1 << 16)
    assert same_bits(y, expected)


# ---- the bits of the native backend on a CPU -------------------------------------------------------------------


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Zeros with their signs; nans whatever they hold. `expected` lies on the CPU."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.stride() == expected.stride()
    actual, bits = actual.cpu(), torch.int16 if actual.element_size() == 2 else torch.int32
    number = ~expected.isnan()
    return torch.equal(~actual.isnan(), number) and torch.equal(actual[number].view(bits), expected[number].view(bits))


def on_device(inputs: object) -> list:
    """The fields of a case's inputs where Triton computes."""
    return [x.detach().to(DEVICE) if isinstance(x, torch.Tensor) else x for x in vars(inputs).values()]


@beside_native
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_noise_has_the_bits_of_native(case, prediction_type, seed):
    inputs = noise_inputs(case, seed, device="cpu")
    for dtype in (F16, BF16, F32):
        actual = triton_noise_pair.noise_pair_fwd(*on_device(inputs), prediction_type, dtype)
        expected = native.noise_pair_fwd(*vars(inputs).values(), prediction_type, dtype)
        assert all(map(same_bits, actual, expected))


@beside_native
@pytest.mark.parametrize("noise_seed", [0, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 5])
def test_triton_takes_seeds_of_any_size(noise_seed, seed):
    """As an op hands them on, signed; Triton gives a kernel 32 bits where they suffice, with their sign."""
    inputs = noise_inputs(Case("seeds"), seed, device="cpu")
    inputs.seed = noise_seed
    actual = noise_pair(*on_device(inputs), prediction_type="epsilon", dtype=F32, backend="triton")
    assert same_bits(actual.target, native.noise_pair_fwd(*vars(inputs).values(), "epsilon", F32)[1])


@beside_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_gradients_have_the_bits_of_native(case, seed):
    """Of the errors, and of the loss at margins from small to nan; without and with labels and weights."""
    inputs = loss_inputs(case, seed, device="cpu")
    p, _, target, beta, _, _ = (x.detach() if isinstance(x, torch.Tensor) else x for x in vars(inputs).values())
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(2 * case.pairs, generator=generator)
    device = (x.to(DEVICE) for x in (given, p, target))
    assert same_bits(triton_pair_errors.pair_errors_bwd(*device), native.pair_errors_bwd(given, p, target))
    # from 104 on one side's sigmoid is 0: its gradients are zeros with signs
    spread = torch.tensor([1e-3, 1.0, 10.0, 100.0, 100.0, 1000.0, math.inf, math.nan])
    label, weight = torch.rand(2, case.pairs, generator=generator)
    for y, w in ((None, None), (label, None), (None, weight), (label, weight)):
        which = torch.randint(len(spread), (case.pairs,), generator=generator)
        margin = spread[which] * torch.randn(case.pairs, generator=generator)
        arguments = (torch.tensor(8.0), p, target, margin, beta, y, w)
        expected = native.dpo_loss_bwd(*arguments)
        device = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
        assert same_bits(triton_dpo_loss.dpo_loss_bwd(*device), expected), margin


@beside_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_margins_have_the_bits_of_native_where_sums_are_exact(case, seed):
    """Predictions of few bits, whose sums round in no order; so errors and margins are all that is computed from them.

    The loss of the same margins then differs by what two libraries' exp and log do: one unit in its last place.
    """
    generator = torch.Generator().manual_seed(seed)

    def dyadic(like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like).copy_(torch.randint(-16, 17, like.shape, generator=generator) / 16)

    inputs = loss_inputs(case, seed, device="cpu")
    p, ref, target, case_beta, label, weight = vars(inputs).values()
    p, target = dyadic(p.detach()), dyadic(target)
    ref = ref if ref.dim() == 1 else dyadic(ref)
    for others in (ref, None):
        actual = triton_pair_errors.pair_errors_fwd(*(None if x is None else x.to(DEVICE) for x in (p, others, target)))
        assert all(map(same_bits, actual, native.pair_errors_fwd(p, others, target)))
    for beta in (case_beta, 1.0):
        arguments = (p, ref, target, beta, label, weight)
        expected = native.dpo_loss_fwd(*arguments)
        device = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
        actual = triton_dpo_loss.dpo_loss_fwd(*device)
        assert all(map(same_bits, actual[1:], expected[1:]))
        assert (expected[0].nextafter(actual[0].cpu()) == actual[0].cpu()).all()  # it or its neighbour


@here
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_triton_rounds_to_nearest_even(dtype):
    x = random_words(4096).to(torch.int32).view(F32)  # every exponent, infinities and nans too
    one = 1 + torch.tensor([0, 1, 2, 3, 4]) * torch.finfo(dtype).eps / 2  # ties
    x[:8] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38, 65519.0, 65520.0])
    x[8:13], x[13:18] = one, -one
    x[18] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)
    y = torch.empty(4096, dtype=dtype, device=DEVICE)
    rounded_kernel[(1,)](x.to(DEVICE), y, N=4096)
    torch.testing.assert_close(y.cpu(), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def every_output(case: Case, seed: int) -> list[torch.Tensor]:
    """What the ops give for a case, gradients too."""
    inputs, noise = loss_inputs(case, seed, device=DEVICE), noise_inputs(case, seed, device=DEVICE)
    p, label, weight = inputs.policy_pred, inputs.label, inputs.weight
    loss = dpo_loss(p, inputs.ref, inputs.target, inputs.beta, label=label, weight=weight, backend="triton")
    errors = pair_errors(p, inputs.ref, inputs.target, backend="triton")
    noised = noise_pair(**vars(noise), prediction_type="v_prediction", dtype=case.policy, backend="triton")
    grads = [torch.autograd.grad(x, p)[0] for x in (loss.loss, errors.error_delta.sum())]
    return [*loss, *errors, *noised, *grads]


@here
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("prime_width", "labels_weights_bf16")], ids=str)
def test_triton_gives_the_same_bits_again(case, seed):
    assert all(map(torch.equal, every_output(case, seed), every_output(case, seed)))


@here
def test_triton_gives_a_pair_the_same_bits_in_any_batch(seed):
    inputs = loss_inputs(Case("batch", pairs=19, shape=(4, 25, 23), policy=BF16, ref=BF16), seed, device=DEVICE)
    p, ref, target = inputs.policy_pred, inputs.ref, inputs.target
    together = dpo_loss(p, ref, target, 5000.0, backend="triton")
    for i in (0, 7, 18):
        alone = dpo_loss(p[i::19], ref[i::19], target[i : i + 1], 5000.0, backend="triton")
        assert torch.equal(together.margin[i : i + 1], alone.margin)
        assert torch.equal(together.policy_error[i::19], alone.policy_error)
        assert torch.equal(together.ref_error[i::19], alone.ref_error)


@here
def test_triton_adds_the_tiles_of_a_large_image(seed):
    """More tiles than the second launch takes at a time, the last of them odd."""
    inputs = loss_inputs(Case("large", pairs=1, shape=(4, 131, 131)), seed, device=DEVICE)
    p, ref, target = inputs.policy_pred.detach(), inputs.ref, inputs.target
    errors = pair_errors(p, ref, target, backend="triton")
    exact = reference.pair_errors(p.double(), ref.double(), target.double())
    for actual, expected in zip(errors, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-8)


@here
@pytest.mark.parametrize("half", [F16, BF16])
def test_triton_keeps_subnormal_gradients(half, seed):
    inputs = loss_inputs(Case("small", pairs=2, policy=half, ref=half, beta=1e-2), seed, device=DEVICE)
    grads = [
        torch.autograd.grad(dpo_loss(**vars(inputs), backend=name).loss, inputs.policy_pred)[0]
        for name in ("reference", "triton")
    ]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(grads[1].double(), grads[0].double(), rtol=torch.finfo(half).eps, atol=6e-8)


@here
def test_triton_refuses_float64_and_what_is_not_on_its_device():
    p = torch.zeros(2, 1, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="'triton' does not compute in float64; choose reference"):
        pair_errors(p.double(), None, p, backend="triton")
    ones, ids = torch.ones(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    options = dict(prediction_type="epsilon", backend="triton")
    with pytest.raises(ValueError, match="does not compute in float64"):
        noise_pair(p, ones, ones, 0, ids, ids, dtype=torch.float64, **options)
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
            pair_errors(p.cpu(), None, p.cpu(), backend="triton")


@pytest.mark.gpu
@pytest.mark.slow
@on_a_gpu
def test_triton_indexes_more_than_two_to_the_31_elements():
    """About 25 GB. The last numbers are looked at: 32-bit indices would have wrapped before them."""
    shape = (4, 16384, 16400)
    with torch.device("cuda"):
        p = torch.full((2, *shape), 0.5, dtype=F16).requires_grad_()
        target = torch.zeros(1, *shape, dtype=F16)
        assert p.numel() > 1 << 31
        errors = pair_errors(p, None, target, backend="triton").policy_error
        assert errors.tolist() == [0.25, 0.25]
        (grad,) = torch.autograd.grad(errors, p, torch.tensor([1.0, 2.0]) * p[0].numel())
        assert torch.equal(grad[1, -1, -1, -64:], torch.full((64,), 2.0, dtype=F16))
        assert torch.equal(grad[0, -1, -1, -64:], torch.full((64,), 1.0, dtype=F16))
        del p, grad, target
        latents, one, pair, draw = (
            torch.zeros(2, *shape, dtype=F16),
            torch.ones(1),
            torch.tensor([7]),
            torch.tensor([1]),
        )
        noisy, _ = noise_pair(latents, one, one, 3, pair, draw, prediction_type="epsilon", dtype=F16, backend="triton")
        block = torch.tensor([shape[1] * shape[2] - 1])
        *_, u2, u3 = map(reference.uniform, reference.draw_words(3, pair, draw, 0, block))
        expected = (-2 * u2.log()).sqrt() * (2 * math.pi * u3).sin()
        torch.testing.assert_close(noisy[1, -1, -1, -1:].double(), expected, rtol=1e-3, atol=1e-3)
