"""What is promised of the native backend beyond the tests of all backends: bits, threads, pointers, forks, refusals."""

import math
import multiprocessing
import subprocess
import sys

import pytest
import torch

from dpo_fast.kernels import dispatch, reference
from tests.kernels.cases import BF16, CASES, F16, F32, Case, loss_inputs, noise_inputs

REASON = dispatch.usable_backends()["native"]
if REASON:
    pytest.skip(f"native cannot be used here: {REASON}", allow_module_level=True)

from dpo_fast.kernels import native  # noqa: E402

# large enough for several threads and, in pair_errors, several chunks an image
LARGE = Case("large", pairs=5, shape=(4, 65, 67), policy=BF16, ref=F32, target=F16, labels=True, weights=True)
LARGE_LAST = Case("large_last", pairs=3, shape=(4, 96, 80), policy=F16, ref=F16, channels_last=True)
MAX = 0xFFFFFFFF


@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(case: Case, seed: int) -> list[torch.Tensor]:
    """All outputs of all ops on one case."""
    noise, inputs = noise_inputs(case, seed), loss_inputs(case, seed)
    p, ref, target, beta, label, weight = vars(inputs).values()
    p = p.detach()
    outputs = [
        *native.noise_pair_fwd(*vars(noise).values(), "epsilon", F32),
        *native.noise_pair_fwd(*vars(noise).values(), "v_prediction", case.policy),
        *native.pair_errors_fwd(p, ref, target),
        *native.pair_errors_fwd(p, None, target),
        *native.dpo_loss_fwd(p, ref, target, beta, label, weight),
        native.pair_errors_bwd(torch.linspace(-1, 1, 2 * case.pairs), p, target),
    ]
    margin = torch.linspace(-9, 9, case.pairs)
    return [*outputs, native.dpo_loss_bwd(torch.tensor(8.0), p, target, margin, beta, label, weight)]


# ---- the header that CPU and GPU share -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MAX] * 4, [MAX] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert list(native._native.philox(*counter, *key)) == words


def test_philox_equals_the_specification_on_random_counters(seed):
    generator = torch.Generator().manual_seed(seed)
    for counter in torch.randint(MAX + 1, (200, 6), generator=generator):
        expected = reference.philox(tuple(counter[:4]), tuple(counter[4:].tolist()))
        assert list(native._native.philox(*counter.tolist())) == [word.item() for word in expected]


def exponentials(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    native._native.exponentials(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def test_the_exponential_is_within_one_ulp_of_float64(seed):
    """Every sign and exponent with 4096 mantissas each, the ends of what is finite, normal and positive, and a nan."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.arange(1 << 9, dtype=torch.int32)[:, None] << 23
    x = (upper | torch.randint(1 << 23, (1 << 9, 4096), generator=generator, dtype=torch.int32)).view(F32).flatten()
    # most exponents have results of 0, 1 and infinity: as many again from all that lies between
    x = torch.cat([x, torch.empty(1 << 21).uniform_(-104.5, 89.5, generator=generator)])
    ends = torch.tensor([88.722839, -87.33655, -103.278929, -103.972084, 89.0, -104.0, 0.0])
    x = torch.cat([x, ends, *(ends.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])])
    actual, exact = exponentials(x).double(), x.double().exp()
    assert torch.equal(actual.isnan(), x.isnan())
    ulp = torch.exp2(exact.clamp(2.0**-126, 2.0**127).log2().floor() - 23)
    # infinity counts as 2^128, which would be the next number
    error = (actual.clamp(max=2.0**128) - exact.clamp(max=2.0**128)).abs()
    assert (error <= ulp)[~x.isnan()].all()
    beyond = torch.tensor([88.73, 89.0, 100.0, math.inf, -103.98, -104.0, -1000.0, -math.inf, 0.0, -0.0])
    assert exponentials(beyond).tolist() == [math.inf] * 4 + [0.0] * 4 + [1.0] * 2


def test_normals_are_within_1e_6_of_float64(seed):
    """A million blocks, so that both ends of the logarithm and all octants of the angle come up."""
    pairs, shape = 16, (4, 256, 256)
    ids, ones = torch.arange(pairs), torch.ones(pairs)
    latents = torch.zeros(2 * pairs, *shape)
    actual = native.noise_pair_fwd(latents, ones, ones, seed, ids, ids, "epsilon", F32)[1]
    block = torch.arange(shape[1] * shape[2])
    u = [reference.uniform(w) for w in reference.draw_words(seed, ids[:, None], ids[:, None], 0, block)]
    for first, second, channel in ((u[0], u[1], 0), (u[2], u[3], 2)):
        radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
        for wave, c in ((angle.cos(), channel), (angle.sin(), channel + 1)):
            error = (actual[:, c].flatten(1).double() - radius * wave).abs().max()
            assert error < 1e-6


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_rounding_is_to_nearest_even_at_every_halfway_point(dtype):
    """All numbers of a half precision, the midpoints between neighbours and the float32 beside them, as PyTorch."""
    # noising with signal 1 and sigma 0 is a conversion
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].float().sort().values.unique()
    middle = (finite[:-1].double() + finite[1:].double()).div(2).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf)]
    edge = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(dtype).max * (1 + 2**-12), 65519.9, 65520.0, 1e-8])
    values = torch.cat([finite, middle, *beside, edge, torch.tensor([-0.0])])
    values = torch.cat([values, values.new_zeros(-len(values) % 3)])
    one, zero, index = torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    # float16 that lies together is converted by the CPU's own instruction, strided by the header that a GPU shares
    for layout in (torch.contiguous_format, torch.channels_last):
        latents = values.view(1, 3, 1, -1).repeat(2, 1, 1, 1).contiguous(memory_format=layout)
        noisy, _ = native.noise_pair_fwd(latents, one, zero, 0, index, index, "epsilon", dtype)
        expected = latents.to(dtype)
        assert torch.equal(noisy.isnan(), expected.isnan())
        assert torch.equal(noisy.nan_to_num(7.0), expected.nan_to_num(7.0))
        back, _ = native.noise_pair_fwd(expected, one, zero, 0, index, index, "epsilon", F32)
        assert torch.equal(back.nan_to_num(7.0), expected.float().nan_to_num(7.0))


# ---- the same bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, LARGE, LARGE_LAST], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case, threads, monkeypatch, seed):
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    threads(1)
    expected = everything(case, seed)
    for number in (2, 3, 1):
        threads(number)
        for actual, one in zip(everything(case, seed), expected, strict=True):
            assert torch.equal(actual, one), number


def test_reruns_are_bit_equal(threads, seed):
    threads(2)
    first = everything(LARGE, seed)
    for _ in range(5):
        assert all(map(torch.equal, everything(LARGE, seed), first))


@pytest.mark.parametrize("case", [LARGE, LARGE_LAST, Case("odd", pairs=3, shape=(4, 7, 5))], ids=str)
def test_pointers_of_any_alignment_give_the_same_bits(case, seed):
    def moved(x):
        """x in memory that begins one number past a multiple of 64 bytes."""
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        return room[1:].as_strided(x.shape, x.stride(), 1).copy_(x)

    inputs, noise = loss_inputs(case, seed), noise_inputs(case, seed)
    p, ref, target = inputs.policy_pred.detach(), inputs.ref, inputs.target
    assert moved(p).data_ptr() % 16 and moved(p).stride() == p.stride()
    plain = native.pair_errors_fwd(p, ref, target)
    assert all(map(torch.equal, plain, native.pair_errors_fwd(moved(p), moved(ref), moved(target))))
    grad = torch.linspace(-1, 1, 2 * case.pairs)
    assert torch.equal(
        native.pair_errors_bwd(grad, p, target), native.pair_errors_bwd(moved(grad), moved(p), moved(target))
    )
    options = ("v_prediction", F16)
    plain = native.noise_pair_fwd(*vars(noise).values(), *options)
    arguments = [moved(x) if isinstance(x, torch.Tensor) else x for x in vars(noise).values()]
    assert all(map(torch.equal, plain, native.noise_pair_fwd(*arguments, *options)))


def test_thousands_of_pairs(seed):
    case = Case("many", pairs=3000, shape=(4, 3, 3), labels=True, weights=True)
    p, ref, target, *rest = vars(loss_inputs(case, seed)).values()
    actual = native.dpo_loss_fwd(p.detach(), ref, target, *rest)
    for x, y in zip(actual, reference.dpo_loss_fwd(p.detach(), ref, target, *rest), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    whole = native.noise_pair_fwd(*vars(noise := noise_inputs(case, seed)).values(), "epsilon", F32)[1]
    torch.testing.assert_close(whole, reference.noise_pair(*vars(noise).values(), "epsilon", F32)[1], rtol=0, atol=2e-6)


# ---- processes -------------------------------------------------------------------------------------------------


def _noise_in_child(pipe, inputs) -> None:
    pipe.send(native.noise_pair_fwd(*inputs, "epsilon", F32)[0].numpy().tobytes())  # nothing of PyTorch's own threads


def test_a_forked_child_computes_after_its_parent_used_threads(threads, seed):
    """OpenMP's threads do not survive a fork: entered in the child, it waits for them for ever."""
    threads(2)
    torch.use_deterministic_algorithms(False)  # which fills memory, in PyTorch's threads
    inputs = tuple(vars(noise_inputs(LARGE, seed)).values())
    expected = native.noise_pair_fwd(*inputs, "epsilon", F32)[0].numpy().tobytes()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_noise_in_child, args=(there, inputs))
    child.start()
    answer = here.recv() if here.poll(30) else None
    child.kill()
    child.join()
    assert answer == expected


def test_importing_the_extension_needs_no_torch_and_no_driver():
    code = "import sys, dpo_fast._native as n; print(n.cuda_fault(0)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\n" not in done.stdout.strip()


# ---- refusals --------------------------------------------------------------------------------------------------

P = torch.zeros(4, 4, 8, 8)
LAST = P.contiguous(memory_format=torch.channels_last)
SCALARS = torch.ones(2), torch.ones(2), 0, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: native.pair_errors_fwd(P.double(), None, P), "knows float32.*got torch.float64: use 'reference'"),
        (lambda: native.pair_errors_fwd(P, None, P.double()), "got torch.float64"),
        (lambda: native.pair_errors_fwd(P, torch.zeros(4).double(), P), r"needs torch.float32 \[4\] on cpu; got"),
        (lambda: native.pair_errors_fwd(P, None, LAST), "dense images in one memory order"),
        (lambda: native.pair_errors_fwd(P[..., ::2], None, P[..., ::2]), "dense images in one memory order"),
        (lambda: native.pair_errors_fwd(P.to("meta"), None, P), "computes on cpu and cuda; got tensors on meta"),
        (lambda: native.pair_errors_fwd(P, None, P.to("meta")), "needs all tensors on cpu; got one on meta"),
        (lambda: native.pair_errors_bwd(torch.ones(2), P, P), r"float32 \[4\] on cpu; got torch.float32 \[2\]"),
        (lambda: native.dpo_loss_fwd(P, P, P, 1.0, torch.ones(4), None), r"float32 \[2\]"),
        (lambda: native.noise_pair_fwd(P.double(), *SCALARS, "epsilon", F32), "got torch.float64"),
        (lambda: native.noise_pair_fwd(P, *SCALARS[:3], torch.zeros(2), SCALARS[4], "epsilon", F32), "torch.int64"),
    ],
)
def test_what_it_cannot_compute_with_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_one_line():
    reason = dispatch.usable_backends("cuda")["native"]
    assert reason and "\n" not in reason
