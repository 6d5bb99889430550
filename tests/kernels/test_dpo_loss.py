"""dpo_loss: loss, reports and gradient against an independent float64 computation, and what is exact at the start."""

import math

import pytest
import torch

from dpo_fast.kernels import dpo_loss, noise_pair, reference
from tests.kernels.cases import BF16, CASES, F16, Case, assert_near_truth, difference_terms, loss_inputs


def naive(policy_pred, ref, target, beta, label, weight, dtype):
    """The formula in design order, one pair at a time: loss, margin [B], policy_error [2B], ref_error [2B]."""
    pairs = policy_pred.shape[0] // 2
    policy, goal = policy_pred.to(dtype), target.to(dtype)
    errors, ref_errors, margins, losses = [], [], [], []
    for image in range(2 * pairs):
        t = goal[image % goal.shape[0]]
        errors.append(((policy[image] - t) ** 2).mean())
        ref_errors.append(ref[image].to(dtype) if ref.dim() == 1 else ((ref[image].to(dtype) - t) ** 2).mean())
    for i in range(pairs):
        margin = -(beta / 2) * ((errors[i] - ref_errors[i]) - (errors[pairs + i] - ref_errors[pairs + i]))
        y = torch.tensor(1.0) if label is None else label[i]
        w = torch.tensor(1.0) if weight is None else weight[i]
        sigmoid = torch.nn.functional.logsigmoid
        losses.append(-w.to(dtype) * (y.to(dtype) * sigmoid(margin) + (1 - y.to(dtype)) * sigmoid(-margin)))
        margins.append(margin)
    return torch.stack(losses).mean(), torch.stack(margins), torch.stack(errors), torch.stack(ref_errors)


@pytest.mark.drawn(30)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_reports_and_gradient_are_near_float64(case, backend, seed):
    inputs = loss_inputs(case, seed)
    arguments = tuple(vars(inputs).values())
    p, beta = inputs.policy_pred, inputs.beta
    result = dpo_loss(p, inputs.ref, inputs.target, beta, label=inputs.label, weight=inputs.weight, backend=backend)
    p64 = p.detach().double().requires_grad_()
    truth = naive(p64, *arguments[1:], torch.float64)
    near = naive(*arguments, torch.float32)

    error_sum = truth[2] + truth[3]
    margin_terms = (beta / 2) * (error_sum[: case.pairs] + error_sum[case.pairs :])
    # |d loss / d margin| <= 1, so the loss inherits at most the margin's terms
    loss_terms = truth[0].abs() + margin_terms.mean()
    magnitudes = (loss_terms, margin_terms, error_sum, error_sum)
    for actual, baseline, exact, magnitude in zip(result, near, truth, magnitudes, strict=True):
        assert_near_truth(actual, baseline, exact.detach(), magnitude.detach())

    assert [x.requires_grad for x in result] == [True, False, False, False]
    scale = torch.tensor(8.0)  # a loss scale, as under fp16
    (grad,) = torch.autograd.grad(result.loss, p, scale)
    (baseline,) = torch.autograd.grad(near[0], p, scale)
    (exact,) = torch.autograd.grad(truth[0], p64, scale.double())
    assert grad.dtype == p.dtype and grad.stride() == p.stride()
    # the gradient holds a sigmoid of the margin, which is known to the margin's own rounding
    terms = exact.abs() * (1 + margin_terms.max())
    assert_near_truth(grad, baseline, exact, magnitude=terms.detach())


@pytest.mark.parametrize("pairs", [1, 3, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_at_the_start_the_margin_is_zero_and_the_loss_log_two(dtype, pairs, backend, seed):
    inputs = loss_inputs(Case("start", pairs=pairs, policy=dtype, shape=(4, 9, 11)), seed)
    ref = inputs.policy_pred.detach().clone()
    result = dpo_loss(inputs.policy_pred, ref, inputs.target, 5000.0, backend=backend)
    assert torch.equal(result.margin.view(torch.int32), torch.zeros(pairs, dtype=torch.int32))  # +0.0, bit for bit
    assert result.loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
    assert torch.equal(result.policy_error, result.ref_error)
    # gradient = +-(1/2)(1/B)(beta/2) 2 (p - t) / (C H W): down for the chosen error, up for the rejected
    (grad,) = torch.autograd.grad(result.loss, inputs.policy_pred)
    residual = inputs.policy_pred.detach().double() - inputs.target.double().repeat(2, 1, 1, 1)
    sign = torch.tensor([1.0] * pairs + [-1.0] * pairs).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(grad.double(), sign * residual * (5000 / 2 / pairs / (4 * 9 * 11)), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_the_margin_is_accurate_where_policy_and_reference_are_close(dtype, backend, seed):
    """A few roundings away from the reference: the difference of two float32 means would be mostly rounding itself."""
    inputs = loss_inputs(Case("close", pairs=4, policy=dtype, ref=dtype, shape=(4, 64, 64)), seed)
    policy, beta = inputs.ref.clone(), 5000.0
    policy.view(-1)[::97] *= 1 + torch.finfo(dtype).eps
    result = dpo_loss(policy, inputs.ref, inputs.target, beta, backend=backend)
    exact = naive(policy, inputs.ref, inputs.target, beta, None, None, torch.float64)[1]
    subtracted = naive(policy, inputs.ref, inputs.target, beta, None, None, torch.float32)[1]
    error = (result.margin.double() - exact).abs()
    terms = beta / 2 * sum(difference_terms(policy, inputs.ref, inputs.target).chunk(2))
    assert (error <= 4 * torch.finfo(torch.float32).eps * terms).all()
    assert error.max() < 0.05 * (subtracted.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_gradient_in_half_precision_is_rounded_once(dtype, backend, seed):
    """Residual, coefficient and their product are float32, so the error is half an ulp and little more."""
    inputs = loss_inputs(Case("rounding", pairs=3, policy=dtype, ref=dtype, shape=(4, 9, 7), labels=True), seed)
    p, label = inputs.policy_pred, inputs.label
    loss = dpo_loss(p, inputs.ref, inputs.target, 100.0, label=label, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, p)
    p64 = p.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(naive(p64, inputs.ref, inputs.target, 100.0, label, None, torch.float64)[0], p64)
    info = torch.finfo(dtype)
    half_ulp = info.eps / 2 * exact.abs().clamp(min=info.smallest_normal)  # at most: an ulp is eps times a power of two
    # the two terms of a soft label nearly cancel: float32 rounds each of them, and they are at most this large
    residual = (p64.detach().unflatten(0, (-1, len(inputs.target))) - inputs.target.double()).flatten(0, 1)
    terms = 100.0 / (3 * residual[0].numel()) * residual.abs()
    assert ((grad.double() - exact).abs() <= half_ulp + 4 * torch.finfo(torch.float32).eps * terms).all()


def test_labels(backend, seed):
    """Label 0 exchanges the images; 1 is no label; at 1/2 and margin 0 there is no gradient."""
    inputs = loss_inputs(Case("labels", pairs=3), seed)
    p, ref, target = inputs.policy_pred, inputs.ref, inputs.target

    def loss_and_grad(label, p=p, ref=ref):
        loss = dpo_loss(p, ref, target, 5000.0, label=label, backend=backend).loss
        return loss, torch.autograd.grad(loss, p)[0]

    plain, ones, zeros = (loss_and_grad(label) for label in (None, torch.ones(3), torch.zeros(3)))
    assert torch.equal(plain[0], ones[0]) and torch.equal(plain[1], ones[1])
    exchanged = loss_and_grad(None, p.detach().roll(3, 0).requires_grad_(), ref.roll(3, 0))
    assert torch.equal(zeros[0], exchanged[0]) and torch.equal(zeros[1], exchanged[1].roll(3, 0))
    _, tie = loss_and_grad(torch.full((3,), 0.5), ref=p.detach().clone())
    assert torch.equal(tie, torch.zeros_like(tie))


def test_weights(backend, seed):
    """The mean is over all pairs, and a pair of weight 0 gets no gradient."""
    inputs = loss_inputs(Case("weights", pairs=2), seed)
    p, ref, target = inputs.policy_pred, inputs.ref, inputs.target
    weighted = dpo_loss(p, ref, target, 5000.0, weight=torch.tensor([3.0, 0.0]), backend=backend)
    (grad,) = torch.autograd.grad(weighted.loss, p)
    first = dpo_loss(p[::2], ref[::2], target[:1], 5000.0, backend=backend)
    torch.testing.assert_close(weighted.loss, 1.5 * first.loss)
    assert grad[::2].flatten(1).any(1).all() and torch.equal(grad[1::2], torch.zeros_like(grad[1::2]))


@pytest.mark.parametrize("margin", [-1e4, -100.0, -30.0, 17.0, 30.0, 80.0, 1e4])
def test_large_margins_stay_finite_and_keep_their_gradient(margin, backend):
    """Past margin 17, 1 - sigmoid is 0 in float32 but sigmoid(-margin) is not; far out the loss is max(-margin, 0)."""
    p = torch.zeros(2, 1, 1, 1, requires_grad=True)
    ref_errors = torch.tensor([0.0, -2 * margin])  # beta 1, target 1: both errors 1
    result = dpo_loss(p, ref_errors, torch.ones(1, 1, 1, 1), 1.0, backend=backend)
    rounded = result.margin.double()
    torch.testing.assert_close(rounded, torch.tensor([margin]).double(), rtol=1e-6, atol=1e-6)
    expected_loss = torch.nn.functional.softplus(-rounded, threshold=1e9).clamp(min=(-rounded).clamp(min=0))[0]
    torch.testing.assert_close(result.loss.double(), expected_loss.nan_to_num(posinf=-margin), rtol=1e-5, atol=1e-37)
    (grad,) = torch.autograd.grad(result.loss, p)
    expected = -torch.sigmoid(-rounded[0])  # dl/de_w = (1/2) sigmoid(-m), de/dp = -2
    assert grad[0].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-37)
    assert grad[1].item() == -grad[0].item()


def test_gradcheck_of_specification_and_op(seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(6, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    predictions = torch.randn(6, 2, 3, 2, generator=generator, dtype=torch.float64)
    label, weight = torch.rand(2, 3, generator=generator)
    for ref in (predictions, torch.rand(6, generator=generator, dtype=torch.float64)):
        for targets, y, w in ((3, None, None), (6, label, None), (3, None, weight), (6, label, weight)):
            target = torch.randn(targets, 2, 3, 2, generator=generator, dtype=torch.float64)
            arguments = dict(ref=ref, target=target, beta=3.0, label=y, weight=w)
            for function in (reference.dpo_loss, dpo_loss):
                assert torch.autograd.gradcheck(
                    lambda p, function=function, arguments=arguments: function(p, **arguments)[0], p
                )


def test_only_the_loss_carries_a_gradient(seed):
    inputs = loss_inputs(Case("reports"), seed)
    result = dpo_loss(inputs.policy_pred, inputs.ref, inputs.target, 5000.0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        result.margin.sum().backward()


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("odd", "one_number", "bf16", "ref_errors", "channels_last", "labels_weights_bf16")],
    ids=str,
)
def test_opcheck(case, seed):
    inputs = loss_inputs(case, seed)
    torch.library.opcheck(torch.ops.dpo_fast.dpo_loss.default, (*vars(inputs).values(), "reference"))
    p, target, beta = inputs.policy_pred.detach(), inputs.target, inputs.beta
    backward = (torch.tensor(1.0), p, target, torch.randn(case.pairs), beta, inputs.label, inputs.weight, "reference")
    torch.library.opcheck(torch.ops.dpo_fast.dpo_loss_bwd.default, backward)


def test_inputs_are_left_alone(seed):
    inputs = loss_inputs(Case("inputs", pairs=3, ref=None, labels=True, weights=True), seed)
    tensors = [x for x in vars(inputs).values() if isinstance(x, torch.Tensor)]
    given = [x.detach().clone() for x in tensors]
    result = dpo_loss(**vars(inputs))
    result.loss.backward()
    result.ref_error.zero_()  # its own memory, not ref's
    assert all(map(torch.equal, tensors, given))


@pytest.mark.exhaustive
def test_a_whole_step_compiles_in_one_graph(seed):
    """Noise, a model, the loss and its backward by the default compiler: the same bits as eager from the same model."""
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    latents = latents.contiguous(memory_format=torch.channels_last)
    half, ids = torch.full((3,), 0.5**0.5), torch.arange(3)
    # exact in bf16: the compiler leaves out roundings between its fused operations
    scale = torch.tensor([0.5, 0.75, 1.25, 1.5]).view(1, 4, 1, 1).requires_grad_()
    every = scale.detach().expand_as(latents).clone().requires_grad_()  # one for each number: the terms of a gradient

    def step(scale, seed):
        noisy, target = noise_pair(latents, half, half, seed, ids, ids, prediction_type="v_prediction", dtype=BF16)
        policy = noisy * scale.to(BF16)
        return dpo_loss(policy, noisy, target, 2000.0, weight=half)

    compiled = torch.compile(step, fullgraph=True)
    for noise_seed in (1, (1 << 64) - 1):
        actual, expected = compiled(scale, noise_seed), step(scale, noise_seed)
        assert all(map(torch.equal, actual, expected))
        grads = [torch.autograd.grad(result.loss, scale)[0] for result in (actual, expected)]
        (terms,) = torch.autograd.grad(step(every, noise_seed).loss, every)
        rounding = torch.finfo(BF16).eps * terms.abs().sum((0, 2, 3), keepdim=True)  # each term rounded to bf16, or not
        assert ((grads[0] - grads[1]).abs() <= rounding).all()


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_other_betas_batches_and_layouts(dynamic, seed):
    torch.compiler.reset()

    def loss_and_grad(step, inputs):
        result = step(inputs.policy_pred, inputs.ref, inputs.target, inputs.beta)
        return *result, torch.autograd.grad(result.loss, inputs.policy_pred)[0]

    def step(p, ref, target, beta):
        return dpo_loss(p * 1, ref, target, beta)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in (
        Case("first", pairs=2),
        Case("other_beta_and_batch", pairs=3, beta=2000.0),
        Case("channels_last", pairs=3, shape=(4, 6, 5), channels_last=True, beta=500.0),
        Case("one_pair", pairs=1, shape=(5, 3, 2)),
    ):
        inputs = loss_inputs(case, seed)
        assert all(map(torch.equal, loss_and_grad(compiled, inputs), loss_and_grad(step, inputs)))


P = torch.zeros(4, 4, 8, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ref=None), "dpo_loss needs ref"),
        (dict(beta=0.0), r"beta \(0.0\) must be a positive number"),
        (dict(beta=-1.0), "beta"),
        (dict(beta=math.nan), r"beta \(nan\)"),
        (dict(beta=math.inf), r"beta \(inf\)"),
        (dict(label=torch.ones(4)), r"label must be float32 \[2\]; got torch.float32 \[4\]"),
        (dict(label=torch.ones(2).half()), r"label must be float32 \[2\]; got torch.float16"),
        (dict(weight=torch.ones(2, dtype=torch.int64)), "weight must be floating point"),
        (dict(weight=torch.ones(2, requires_grad=True)), "weight requires a gradient"),
        (dict(target=P[:3]), "target must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(policy_pred=P, ref=P, target=P, beta=5000.0)
    dpo_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        dpo_loss(**{**arguments, **change})
