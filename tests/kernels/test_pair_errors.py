"""pair_errors: errors and gradients against float64, and what the second form of error_delta is for."""

import pytest
import torch

from dpo_fast.kernels import pair_errors, reference
from dpo_fast.kernels.pair_errors import dense_predictions
from tests.kernels.cases import BF16, CASES, F16, Case, assert_near_truth, difference_terms, loss_inputs

F32_EPS = torch.finfo(torch.float32).eps


def naive(policy_pred, ref, target, dtype):
    """The definition, in `dtype`: two means and their difference."""
    if target.shape[0] != policy_pred.shape[0]:
        target = torch.cat([target, target])
    policy_error = (policy_pred.to(dtype) - target.to(dtype)).square().mean((1, 2, 3))
    if ref is None:
        ref_error = torch.zeros_like(policy_error)
    else:
        ref_error = ref.to(dtype) if ref.dim() == 1 else (ref.to(dtype) - target.to(dtype)).square().mean((1, 2, 3))
    return policy_error, ref_error, policy_error - ref_error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_and_gradients_are_near_float64(case, backend, seed):
    inputs = loss_inputs(case, seed)
    p, ref, target = inputs.policy_pred, inputs.ref, inputs.target
    errors = pair_errors(p, ref, target, backend=backend)
    truth = naive(p.double(), ref, target, torch.float64)
    baseline = naive(p, ref, target, torch.float32)
    for actual, near, exact in zip(errors, baseline, truth, strict=True):
        assert_near_truth(actual, near, exact, magnitude=truth[0] + truth[1])
    assert errors.policy_error.dtype == torch.float32 and not errors.ref_error.requires_grad

    upstream = torch.randn(2, p.shape[0], device="cpu").to(p.device)
    outputs = (errors.policy_error, errors.error_delta)
    (grad,) = torch.autograd.grad(outputs, p, tuple(upstream))
    (near,) = torch.autograd.grad((baseline[0], baseline[2]), p, tuple(upstream))
    p64 = p.detach().double().requires_grad_()
    exact_outputs = naive(p64, ref, target, torch.float64)
    (exact,) = torch.autograd.grad((exact_outputs[0], exact_outputs[2]), p64, tuple(upstream.double()))
    assert grad.dtype == p.dtype and grad.stride() == p.stride()
    assert_near_truth(grad, near, exact, magnitude=exact.abs())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_error_delta_is_accurate_where_policy_and_reference_are_close(dtype, backend, seed):
    """A policy a rounding away from its reference: subtracting two float32 means would lose most of the difference."""
    case = Case("close", pairs=4, shape=(4, 64, 64), policy=dtype, ref=dtype)
    inputs = loss_inputs(case, seed)
    policy = inputs.ref.clone()
    policy.view(-1)[::97] *= 1 + torch.finfo(dtype).eps
    *_, delta = pair_errors(policy, inputs.ref, inputs.target, backend=backend)
    exact = naive(policy.double(), inputs.ref, inputs.target, torch.float64)[2]
    subtracted = naive(policy, inputs.ref, inputs.target, torch.float32)[2]
    error = (delta.double() - exact).abs()
    assert (error <= 4 * F32_EPS * difference_terms(policy, inputs.ref, inputs.target)).all()
    assert error.max() < 0.05 * (subtracted.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_equal_predictions_have_no_difference(dtype, backend, seed):
    inputs = loss_inputs(Case("equal", pairs=3, policy=dtype, shape=(4, 9, 11)), seed)
    policy_error, ref_error, delta = pair_errors(
        inputs.policy_pred, inputs.policy_pred.detach().clone(), inputs.target, backend=backend
    )
    assert torch.equal(policy_error, ref_error) and torch.equal(delta, torch.zeros(6))


def test_without_a_reference(backend, seed):
    inputs = loss_inputs(Case("none", pairs=3), seed)
    policy_error, ref_error, delta = pair_errors(inputs.policy_pred, None, inputs.target, backend=backend)
    assert torch.equal(ref_error, torch.zeros(6)) and torch.equal(delta, policy_error)
    (grad,) = torch.autograd.grad(delta.sum(), inputs.policy_pred)
    full_target = inputs.target.repeat(2, 1, 1, 1)
    torch.testing.assert_close(grad, 2 / 256 * (inputs.policy_pred.detach() - full_target))


def test_a_shared_target_equals_a_repeated_one(backend, seed):
    inputs = loss_inputs(Case("shared", pairs=3), seed)
    shared = pair_errors(inputs.policy_pred, inputs.ref, inputs.target, backend=backend)
    repeated = pair_errors(inputs.policy_pred, inputs.ref, inputs.target.repeat(2, 1, 1, 1), backend=backend)
    assert all(map(torch.equal, shared, repeated))


def test_layouts_may_differ_between_inputs(backend, seed):
    inputs = loss_inputs(Case("layout", pairs=2, shape=(4, 6, 5)), seed)
    plain = pair_errors(inputs.policy_pred, inputs.ref, inputs.target, backend=backend)
    mixed = pair_errors(
        inputs.policy_pred.detach()[..., None].expand(-1, -1, -1, -1, 2)[..., 0],
        inputs.ref.contiguous(memory_format=torch.channels_last),
        torch.zeros(2, 4, 6, 10)[..., ::2].copy_(inputs.target),
        backend=backend,
    )
    assert all(map(torch.equal, plain, mixed))


def test_kernels_are_given_dense_images_in_the_order_of_the_prediction(seed):
    inputs = loss_inputs(Case("dense", pairs=2, shape=(4, 6, 5)), seed)
    last = inputs.policy_pred.detach().contiguous(memory_format=torch.channels_last)
    for policy, layout in ((last, torch.channels_last), (inputs.policy_pred.mT, torch.contiguous_format)):
        ref, target = (x.view_as(x).reshape(-1, *policy.shape[1:]) for x in (inputs.ref, inputs.target))
        for x in dense_predictions(policy, ref, target):
            assert x.is_contiguous(memory_format=layout)
    ref = torch.zeros(8)[::2]
    assert dense_predictions(last, ref, inputs.target)[1].is_contiguous()


def test_the_gradient_coefficient_does_not_overflow_half_precision(backend, seed):
    """A loss scale of 2^20 is beyond float16; the gradient that it scales is not."""
    inputs = loss_inputs(Case("scaled", pairs=2, policy=F16), seed)
    errors = pair_errors(inputs.policy_pred, inputs.ref, inputs.target, backend=backend).policy_error
    (grad,) = torch.autograd.grad(errors, inputs.policy_pred, torch.full((4,), 2.0**20))
    residual = inputs.policy_pred.detach().double() - inputs.target.double().repeat(2, 1, 1, 1)
    torch.testing.assert_close(grad.double(), 2.0**20 * 2 / 256 * residual, rtol=1e-3, atol=1e-3)


def test_gradcheck_of_specification_and_op(seed):
    """Finite differences in float64 for both forms of ref and both targets; the op's explicit backward with them."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    predictions = torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64)
    for ref in (predictions, torch.rand(4, generator=generator, dtype=torch.float64), None):
        for targets in (2, 4):
            target = torch.randn(targets, 3, 2, 5, generator=generator, dtype=torch.float64)
            for function in (reference.pair_errors, pair_errors):
                assert torch.autograd.gradcheck(
                    lambda p, ref=ref, target=target, function=function: tuple(function(p, ref, target))[::2], p
                )


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("odd", "one_number", "bf16", "channels_last")], ids=str
)
@pytest.mark.parametrize("form", ["predictions", "errors", "none"])
def test_opcheck(case, form, seed):
    inputs = loss_inputs(case, seed)
    ref = {"predictions": inputs.ref, "errors": torch.rand(2 * case.pairs), "none": None}[form]
    torch.library.opcheck(torch.ops.dpo_fast.pair_errors.default, (inputs.policy_pred, ref, inputs.target, "reference"))
    torch.library.opcheck(
        torch.ops.dpo_fast.pair_errors_bwd.default,
        (torch.rand(2 * case.pairs), inputs.policy_pred.detach(), inputs.target, "reference"),
    )


def test_compiles_in_one_graph(seed):
    inputs = loss_inputs(Case("compile", pairs=3, policy=BF16, ref=BF16, channels_last=True), seed)

    def loss(p, ref, target):
        policy_error, _, delta = pair_errors(p, ref, target)
        return policy_error.sum() + delta.square().sum()

    arguments = (inputs.policy_pred, inputs.ref, inputs.target)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = loss(*arguments), compiled(*arguments)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(value, inputs.policy_pred)[0] for value in (actual, expected)]
    assert torch.equal(*grads) and grads[0].stride() == grads[1].stride()


def test_inputs_are_left_alone(seed):
    inputs = loss_inputs(Case("inputs", pairs=2, ref=None), seed)
    given = [x.detach().clone() for x in (inputs.policy_pred, inputs.ref, inputs.target)]
    errors = pair_errors(inputs.policy_pred, inputs.ref, inputs.target)
    (errors.policy_error.sum() + errors.error_delta.sum()).backward()
    errors.ref_error.zero_()  # its own memory, not ref's
    assert all(map(torch.equal, (inputs.policy_pred, inputs.ref, inputs.target), given))


P = torch.zeros(4, 4, 8, 8)


@pytest.mark.parametrize(
    "policy, ref, target, message",
    [
        (P[:3], P[:3], P[:1], r"policy_pred must be floating point \[2B, C, H, W\].*\[3, 4, 8, 8\]"),
        (P[0], None, P[0], "policy_pred must be"),
        (P.long(), None, P, "policy_pred must be floating point .* got torch.int64"),
        (P, P, P[:1], r"target must be .* for policy_pred \[4, 4, 8, 8\]; got \[1, 4, 8, 8\]"),
        (P, P, P[..., :4], "target must be"),
        (P, P[:2], P, r"ref must be predictions \[4, 4, 8, 8\].*errors \[4\]; got \[2, 4, 8, 8\]"),
        (P, P[0, 0, 0, :2], P, "ref must be predictions"),
        (P, torch.zeros(4).half(), P, "ref errors must be float32.*got torch.float16"),
        (P, P.clone().requires_grad_(), P, "ref requires a gradient but gets none.*detach"),
        (P, P, P.clone().requires_grad_(), "target requires a gradient"),
        (P, P.int(), P, "ref must be floating point on cpu; got torch.int32"),
        (P, P, P.to("meta"), "target must be floating point on cpu; got torch.float32 on meta"),
    ],
)
def test_bad_arguments_are_named(policy, ref, target, message):
    with pytest.raises(ValueError, match=message):
        pair_errors(policy, ref, target)
