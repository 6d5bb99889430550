"""objectives: every row against numbers worked out by hand, float64 formulas, and what all rows have in common."""

import math
from dataclasses import dataclass
from typing import get_args, get_type_hints

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo_fast.config import TrainConfig, resolve
from dpo_fast.errors import BadInput
from dpo_fast.kernels import pair_errors
from dpo_fast.objectives import (
    FROM_PYTHON,
    OBJECTIVES,
    KLTerm,
    Objective,
    Pairs,
    Settings,
    SmoothedLabels,
    _x_over_expm1,
    evaluate,
    find_objective,
    registered,
    try_out,
)
from dpo_fast.presets import DEFAULT_BETA

KL = torch.tensor(0.25)
WITH_REFERENCE = [name for name, row in OBJECTIVES.items() if row.needs_reference]


def settings(name, beta, kl=KL):
    """The settings of an objective."""
    return {"kto": lambda: KLTerm(beta, kl), "cdpo": lambda: SmoothedLabels(beta)}.get(name, lambda: Settings(beta))()


def batch(pairs=3, dtype=torch.float32):
    target = torch.randn(pairs, 4, 3, 5)
    ref = target.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * pairs, 4, 3, 5)
    policy = ref + 0.02 * torch.randn(2 * pairs, 4, 3, 5)
    return policy.to(dtype).requires_grad_(), ref.to(dtype), target.to(dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def phi(e):
    return 0.5 * e / math.expm1(0.5 * e) if e else 1.0


# loss of a pair whose chosen image is better, in Python floats
BY_HAND = {
    "dpo": lambda e_w, e_l, r_w, r_l: -math.log(sigmoid(r_w - r_l)),
    "cdpo": lambda e_w, e_l, r_w, r_l: -math.log(sigmoid(r_w - r_l)),
    "ipo": lambda e_w, e_l, r_w, r_l: (r_w - r_l - 0.5) ** 2,
    "hinge": lambda e_w, e_l, r_w, r_l: max(0.0, 1 - (r_w - r_l)),
    "kto": lambda e_w, e_l, r_w, r_l: ((1 - sigmoid(r_w - 0.25)) + (1 - sigmoid(0.25 - r_l))) / 2,
    "mapo": lambda e_w, e_l, r_w, r_l: e_w - 0.1 * math.log(sigmoid(1000 * (phi(e_w) - phi(e_l)))),
    "sft": lambda e_w, e_l, r_w, r_l: e_w,
}


def test_the_table_has_the_rows_and_betas_it_should():
    assert DEFAULT_BETA == {
        "dpo": 5000.0,
        "ipo": 5000.0,
        "hinge": 5000.0,
        "cdpo": 5000.0,
        "kto": 5000.0,
        "mapo": 0.1,
        "sft": 5000.0,
    }
    assert {name for name, row in OBJECTIVES.items() if not row.needs_reference} == {"mapo", "sft"}
    assert {name for name, row in OBJECTIVES.items() if not row.has_margin} == {"mapo", "sft"}
    assert {name for name, row in OBJECTIVES.items() if row.fused} == {"dpo", "cdpo"}
    assert set(BY_HAND) == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_command_line_has_the_default_beta_of_the_table(name):
    config, _ = resolve(TrainConfig(pretrained_model_name_or_path="m", dataset_name="d", objective=name))
    assert config.beta_dpo == DEFAULT_BETA[name]


def test_the_command_line_offers_exactly_the_rows_of_the_table():
    assert list(OBJECTIVES) == list(DEFAULT_BETA)
    names, own = get_args(get_type_hints(TrainConfig)["objective"])
    assert get_args(names) == tuple(OBJECTIVES) and own is str
    with pytest.raises(BadInput, match="--objective dpop is not one of dpo, ipo"):
        resolve(TrainConfig(pretrained_model_name_or_path="m", dataset_name="d", objective="dpop"))


OWN = """
def penalised(pairs, settings):
    return (1 - pairs.margin).clamp(min=0) + 0.1 * pairs.error_w

def winners(pairs, settings):
    return pairs.error_w

winners.needs_reference = False
no_function = 3

def of_the_batch(pairs, settings):
    return pairs.error_w.mean()
"""


def test_a_loss_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    policy, ref, target = batch()
    own = evaluate(find_objective("own_losses:penalised"), policy, ref, target, Settings(40.0))
    hinge = evaluate(OBJECTIVES["hinge"], policy, ref, target, Settings(40.0))
    torch.testing.assert_close(own.loss, hinge.loss + 0.1 * own.policy_error[:3].mean())
    assert torch.equal(own.margin, hinge.margin) and own.loss.requires_grad
    winners = find_objective("own_losses:winners")
    assert evaluate(winners, policy, None, target, Settings(40.0)).margin is None
    with pytest.raises(ValueError, match=r"gives a loss of shape \[\], not \[3\]"):
        evaluate(find_objective("own_losses:of_the_batch"), policy, ref, target, Settings(40.0))
    for name, message in (
        ("own_losses:missing", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        (".relative:f", "cannot be imported"),
        ("own_broken:f", "cannot be imported"),
        ("own_losses:no_function", "is not a function"),
        ("dpop", "is not one of dpo, ipo"),
        (":", "is not one of dpo, ipo"),
    ):
        with pytest.raises(BadInput, match=f"--objective {name} {message}"):
            find_objective(name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dpo", math.log1p(math.exp(-0.5))),
        ("ipo", 0.0),
        ("hinge", 0.5),
        ("kto", (sigmoid(-0.15) + sigmoid(-0.35)) / 2),
        ("sft", 0.2),
    ],
)
def test_one_pair_worked_out_by_hand(name, expected):
    """Rewards 0.4 and -0.1, so margin 0.5; kl 0.25."""
    numbers = (torch.tensor([x], dtype=torch.float64) for x in (0.2, 0.3, 0.5, 0.4, -0.1))
    loss = OBJECTIVES[name].function(Pairs(*numbers), settings(name, 1.0, torch.tensor(0.25).double()))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


# Losses of other trainers of g = eref - e, the reference's error less the policy's of each image, at their own beta.


def diffusion_kto(g_w, g_l, beta, kl):
    """arXiv 2404.04465, the code's sigmoid utility with both weights 1: the mean over images, their KL term in g."""
    return (1 - torch.sigmoid(beta * (torch.cat([g_w, -g_l]) - torch.cat([kl.expand(3), -kl.expand(3)])))).mean()


def without_the_half(g_w, g_l, beta, kl):
    """diffusers' SD1.5 script, invoke-training, OneTrainer."""
    return -logsigmoid(beta * (g_w - g_l)).mean()


def with_the_half(g_w, g_l, beta, kl):
    """The paper's authors, diffusers' SDXL script."""
    return -logsigmoid(beta / 2 * (g_w - g_l)).mean()


@pytest.mark.parametrize(
    ("name", "theirs", "unit"),
    [("kto", diffusion_kto, 2), ("dpo", without_the_half, 2), ("dpo", with_the_half, 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_at_the_beta_of_the_readmes_table_losses_are_those_of_other_trainers(name, theirs, unit):
    """The loss and its gradient, `unit` times their beta being ours."""
    policy, ref, target = batch(dtype=torch.float64)
    their_beta, their_kl = 17.0, torch.tensor(0.004, dtype=torch.float64)
    e, e_ref = ((x - target.repeat(2, 1, 1, 1)).square().mean((1, 2, 3)) for x in (policy, ref))
    expected = theirs(*(e_ref - e).chunk(2), their_beta, their_kl)
    beta = unit * their_beta
    kl = beta / 2 * their_kl  # ours is a mean implicit reward
    loss = evaluate(OBJECTIVES[name], policy, ref, target, settings(name, beta, kl)).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    wanted, found = (torch.autograd.grad(of, policy)[0] for of in (expected, loss))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())
    other = torch.autograd.grad(
        evaluate(OBJECTIVES[name], policy, ref, target, settings(name, 3 * beta, kl)).loss, policy
    )[0]
    assert not torch.allclose(other, wanted, rtol=1e-3, atol=0)  # of another beta it is not the gradient


@pytest.mark.parametrize("with_label", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_equal_the_formula(name, with_label, with_weight):
    """y f(pair) + (1 - y) f(exchanged pair), weighted and averaged over pairs; the gradient by finite differences."""
    row, beta = OBJECTIVES[name], 40.0 if OBJECTIVES[name].needs_reference else 0.1
    policy, ref, target = batch(dtype=torch.float64)
    label = torch.tensor([1.0, 0.25, 0.0]) if with_label else None
    weight = torch.tensor([0.5, 2.0, 0.0]) if with_weight else None
    y, w = (x.tolist() if x is not None else [1.0] * 3 for x in (label, weight))

    def by_hand(policy):
        both = target.repeat(2, 1, 1, 1)
        e, e_ref = ((x - both).square().mean((1, 2, 3)).tolist() for x in (policy, ref))
        r = [-(beta / 2) * (a - b) for a, b in zip(e, e_ref, strict=True)]
        total = 0.0
        for i, j in ((0, 3), (1, 4), (2, 5)):
            chosen, exchanged = BY_HAND[name](e[i], e[j], r[i], r[j]), BY_HAND[name](e[j], e[i], r[j], r[i])
            total += w[i] * (y[i] * chosen + (1 - y[i]) * exchanged)
        return total / 3

    terms = evaluate(
        row, policy, ref if row.needs_reference else None, target, settings(name, beta), label=label, weight=weight
    )
    assert terms.loss.item() == pytest.approx(by_hand(policy.detach()), rel=1e-9)
    (grad,) = torch.autograd.grad(terms.loss, policy)
    direction = torch.randn(policy.shape, dtype=torch.float64)
    step = 1e-6
    moved = (by_hand(policy.detach() + s * step * direction) for s in (1, -1))
    slope = (next(moved) - next(moved)) / (2 * step)
    assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_reports(name, dtype):
    row = OBJECTIVES[name]
    policy, ref, target = batch(dtype=dtype)
    terms = evaluate(row, policy, ref if row.needs_reference else None, target, settings(name, 40.0))
    assert terms.loss.requires_grad and terms.loss.shape == ()
    reports = [x for x in terms[1:] if x is not None]
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in reports)
    errors = pair_errors(policy.detach(), ref, target)
    assert torch.equal(terms.policy_error, errors.policy_error)
    if not row.needs_reference:
        assert terms.margin is terms.ref_error is terms.implicit_reward is None
        return
    assert torch.equal(terms.ref_error, errors.ref_error)
    torch.testing.assert_close(terms.implicit_reward, -20 * errors.error_delta, rtol=1e-4, atol=1e-5)
    reward_w, reward_l = terms.implicit_reward.chunk(2)
    torch.testing.assert_close(terms.margin, reward_w - reward_l, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_at_the_start_margins_are_zero_and_every_gradient_is_of_order_beta(name):
    row, beta = OBJECTIVES[name], 5000.0
    policy, _, target = batch(pairs=5, dtype=torch.bfloat16)
    kl = torch.tensor(0.0)
    terms = evaluate(row, policy, policy.detach().clone(), target, settings(name, beta, kl))
    assert torch.equal(terms.margin, torch.zeros(5)) and torch.equal(terms.implicit_reward, torch.zeros(10))
    expected = {"dpo": math.log(2), "cdpo": math.log(2), "ipo": 0.25, "hinge": 1.0, "kto": 0.5}[name]
    assert terms.loss.item() == torch.tensor(expected, dtype=torch.float32).item()
    policy32 = policy.detach().float().requires_grad_()
    loss = evaluate(row, policy32, policy32.detach().clone(), target, settings(name, beta, kl)).loss
    (grad,) = torch.autograd.grad(loss, policy32)
    # d loss / d e_w for one pair, by dividing out d e / d prediction and the mean over pairs
    residual = policy32.detach() - target.float().repeat(2, 1, 1, 1)
    per_error = (grad * residual).sum((1, 2, 3)) * 5 / (2 * residual.square().mean((1, 2, 3)))
    share = {"dpo": 1 / 2, "cdpo": 1 / 2, "ipo": 1.0, "hinge": 1.0, "kto": 1 / 8}[name]
    torch.testing.assert_close(per_error[:5], torch.full((5,), share * beta / 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(per_error[5:], torch.full((5,), -share * beta / 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_label_zero_exchanges_the_images_and_label_one_is_no_label(name):
    row = OBJECTIVES[name]
    _, ref, target = batch()
    ref[3:] = ref[:3]  # or sft's loss could be the same by chance
    policy = ref.clone()
    policy[:3] = target + 0.9 * (ref[:3] - target)  # better on the chosen images: margins of about 0.3

    def loss(policy, ref, label):
        reference = ref if row.needs_reference else None
        return evaluate(row, policy, reference, target, settings(name, 40.0), label=label).loss

    exchanged = loss(policy.roll(3, 0), ref.roll(3, 0), None)
    torch.testing.assert_close(loss(policy, ref, torch.zeros(3)), exchanged, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss(policy, ref, torch.ones(3)), loss(policy, ref, None), rtol=1e-6, atol=0)
    assert abs(loss(policy, ref, None) - exchanged) > 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_pair_of_weight_zero_gets_no_gradient(name):
    row = OBJECTIVES[name]
    policy, ref, target = batch()
    weight = torch.tensor([1.0, 0.0, 1.0])
    reference = ref if row.needs_reference else None
    loss = evaluate(row, policy, reference, target, settings(name, 40.0), weight=weight).loss
    (grad,) = torch.autograd.grad(loss, policy)
    assert grad[1].abs().max() == 0 and grad[4].abs().max() == 0 and grad[0].abs().max() > 0


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_reference_errors_give_the_loss_of_reference_predictions(name):
    policy, ref, target = batch()
    errors = pair_errors(ref, None, target).policy_error
    losses = [evaluate(OBJECTIVES[name], policy, r, target, settings(name, 40.0)).loss for r in (ref, errors)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_cdpo_smooths_hard_and_soft_labels():
    policy, ref, target = batch()
    row, s = OBJECTIVES["cdpo"], 0.1
    plain = evaluate(row, policy, ref, target, SmoothedLabels(40.0))
    smoothed = evaluate(row, policy, ref, target, SmoothedLabels(40.0, s))
    expected = -(0.9 * logsigmoid(plain.margin) + 0.1 * logsigmoid(-plain.margin)).mean()
    torch.testing.assert_close(smoothed.loss, expected)
    y = torch.tensor([1.0, 0.5, 0.2])
    soft = evaluate(row, policy, ref, target, SmoothedLabels(40.0, s), label=y)
    target_label = torch.tensor([0.9, 0.5, 0.26])
    expected = -(target_label * logsigmoid(plain.margin) + (1 - target_label) * logsigmoid(-plain.margin)).mean()
    torch.testing.assert_close(soft.loss, expected)
    assert torch.equal(soft.margin, plain.margin)


def test_hinge_and_ipo_stop_pulling_where_they_should():
    """hinge has no gradient past margin 1; ipo turns back past 1/2."""
    margin = torch.tensor([0.4, 0.6, 1.5], requires_grad=True)
    pairs = Pairs(margin, margin, margin, margin, margin)
    for name, signs in (("hinge", [-1, -1, 0]), ("ipo", [-1, 1, 1])):
        (grad,) = torch.autograd.grad(OBJECTIVES[name].function(pairs, Settings(1.0)).sum(), margin)
        assert grad.sign().tolist() == signs


def test_mapo_lowers_the_chosen_error_and_raises_the_rejected():
    e = torch.tensor([0.2, 0.2], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(OBJECTIVES["mapo"].function(Pairs(e[:1], e[1:]), Settings(0.1)).sum(), e)
    slope = -0.5 * (0.5 - 0.1 / 6 + 0.001 / 180)  # phi' = s (x/expm1(x))' at x = 0.1, by its series
    assert grad[0].item() == pytest.approx(1 - 0.1 * 0.5 * 1000 * slope, rel=1e-4)
    assert grad[1].item() == pytest.approx(0.1 * 0.5 * 1000 * slope, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_over_expm1_is_accurate_with_its_slope_everywhere(dtype):
    values = [0.0, 1e-30, 1e-8, 1e-4, 0.01, 0.0999, 0.1, 0.1001, 0.5, 2.0, 20.0, 80.0, 200.0, 1e4]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = _x_over_expm1(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    for at, actual, actual_slope in zip(x.tolist(), y.tolist(), slope.tolist(), strict=True):
        if at < 1e-3:
            expected, expected_slope = 1 - at / 2, -0.5 + at / 6
        elif at > 100:
            expected, expected_slope = 0.0, 0.0
        else:
            expected = at / math.expm1(at)
            expected_slope = (math.expm1(at) - at * math.exp(at)) / math.expm1(at) ** 2
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-30)
        assert actual_slope == pytest.approx(expected_slope, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("name", ["dpo", "kto", "mapo"])
def test_compiles_in_one_graph(name):
    row = OBJECTIVES[name]
    policy, ref, target = batch(dtype=torch.bfloat16)
    label = torch.rand(3)

    def loss(policy):
        reference = ref if row.needs_reference else None
        return evaluate(row, policy, reference, target, settings(name, 40.0), label=label)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(policy), loss(policy)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-6, atol=1e-6) if row.needs_reference else None
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(terms.loss, policy)[0] for terms in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("dpo", dict(ref=None), "the objective dpo needs ref"),
        ("kto", dict(ref=None), "the objective kto needs ref"),
        ("sft", {}, "the objective sft takes no reference"),
        ("mapo", {}, "the objective mapo takes no reference"),
        ("dpo", dict(settings=SmoothedLabels(40.0, 0.1)), "the objective dpo takes Settings, not SmoothedLabels"),
        ("kto", dict(settings=Settings(40.0)), "the objective kto takes KLTerm, not Settings"),
        ("ipo", dict(label=torch.ones(2)), r"label must be float32 \[3\]; got torch.float32 \[2\]"),
        ("sft", dict(ref=None, weight=torch.ones(3, 1)), "weight must be float32"),
    ],
)
def test_bad_arguments_are_named(name, change, message):
    policy, ref, target = batch()
    with pytest.raises(ValueError, match=message):
        evaluate(
            OBJECTIVES[name],
            **{**dict(policy_pred=policy, ref=ref, target=target, settings=settings(name, 40.0)), **change},
        )


# ---- objectives of one's own ---------------------------------------------------------------------------------------


def own(pairs, settings):
    return -logsigmoid(pairs.margin)


def test_an_objective_from_python_is_known_within_the_block():
    with registered(Objective(own, default_beta=0.5, name="mine")) as name:
        assert name == "python:mine" == FROM_PYTHON + "mine"
        assert find_objective(name).function is own and DEFAULT_BETA[name] == 0.5
        config, _ = resolve(TrainConfig(pretrained_model_name_or_path="m", dataset_name="d", objective=name))
        assert config.beta_dpo == 0.5
        assert TrainConfig(preset="shapes", objective=name).beta_dpo is None  # the preset's is on the scale of dpo
        with (
            pytest.raises(BadInput, match="an objective named mine is in use"),
            registered(Objective(own, name="mine")),
        ):
            pass
    assert name not in OBJECTIVES and name not in DEFAULT_BETA
    with pytest.raises(BadInput, match=r"python:mine is a function that was given in Python .* go on from Python"):
        find_objective(name)
    with registered(own) as name, registered(None) as none:
        assert name == "python:own" and none is None
        assert TrainConfig(preset="shapes", objective=name).beta_dpo == 2000.0
    with pytest.raises(ZeroDivisionError), registered(own):
        raise ZeroDivisionError
    assert "python:own" not in OBJECTIVES


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (3, "objective=3 is neither a name, an Objective nor a function"),
        (Objective, "is neither a name, an Objective nor a function"),
        (lambda pairs, settings: pairs.margin, r"'<lambda>' needs a name that is an identifier: Objective\(..., name="),
        (Objective(own, name="a b"), "'a b' needs a name"),
    ],
)
def test_what_is_no_objective_is_refused(objective, said):
    with pytest.raises(BadInput, match=said), registered(objective):
        pass


WRONG = [
    (lambda p, s: p.margin.mean(), "shape [], not [3]: it must give the loss of each pair, without a mean"),
    (lambda p, s: 3.0, "gives a float, not a tensor"),
    (lambda p, s: p.margin > 0, "a loss of dtype torch.bool"),
    (lambda p, s: p.margin.detach(), "gives a loss without a gradient"),
    (lambda p, s: torch.zeros(len(p.margin)), "gives a loss without a gradient"),
    (lambda p, s: p.margin.log(), "gives a loss of -inf before the first step"),
    (lambda p, s: p.margin.abs().sqrt(), "gives a gradient that is not finite before the first step"),
    (lambda p, s: p.margin * (1 / s.gamma), "fails (AttributeError: 'Settings' object has no attribute 'gamma')"),
    (lambda p, s: (1e3 * p.margin.abs()).exp(), "inf once the policy has moved"),
]


@pytest.mark.parametrize(("function", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_function_is_tried_out_before_a_run(function, said):
    objective = Objective(function, name="mine")
    with pytest.raises(BadInput) as refusal:
        try_out(objective, Settings.of(beta=5000.0, label_smoothing=0.0, kl=KL), torch.device("cpu"))
    assert str(refusal.value).startswith("the objective mine ") and said in str(refusal.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_s_own_rows_can_be_tried_out(name):
    row = OBJECTIVES[name]
    values = {"beta": row.default_beta, "label_smoothing": 0.1 if name == "cdpo" else 0.0, "kl": torch.zeros(())}
    state = torch.get_rng_state()
    try_out(row, row.settings.of(**values), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert row.default_beta == DEFAULT_BETA[name] and row.title == name


def test_settings_of_one_s_own_have_a_run_s_values_and_their_own_defaults():
    @dataclass(frozen=True)
    class Mine(KLTerm):
        gamma: float = 0.25

    made = Mine.of(beta=3.0, label_smoothing=0.0, kl=KL)
    assert (made.beta, made.kl, made.gamma) == (3.0, KL, 0.25)
    objective = Objective(lambda pairs, settings: settings.gamma * pairs.margin, settings=Mine, name="mine")
    try_out(objective, made, torch.device("cpu"))

    @dataclass(frozen=True)
    class Lacking(Settings):
        gamma: float

    with pytest.raises(BadInput, match=r"Lacking.gamma needs a default: a run gives only beta, kl"):
        Lacking.of(beta=3.0, kl=KL)
