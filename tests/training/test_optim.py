"""Masters, accumulation, clipping, loss scale, skipped updates, schedules, EMA, and into a checkpoint and back."""

import math
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.training import checkpoint, optim
from dpo_fast.training.optim import INITIAL_LOSS_SCALE, MasterOptimizer
from tests.helpers import seeds

OPTIMIZERS = get_args(get_type_hints(TrainConfig)["optimizer"])
SCHEDULES = get_args(get_type_hints(TrainConfig)["lr_scheduler"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"big": (80, 64), "small": (5, 3), "bias": (7,), "conv": (32, 16, 3, 3)}  # 8-bit states begin at 4096 elements
FINITE = torch.tensor(0.5)


def make(dtype=torch.float32, *, seed=0, lr=1e-3, steps=100, fill=None, **settings) -> MasterOptimizer:
    generator = seeds.generator(seed)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator) if fill is None else torch.full(shape, fill))
        for name, shape in SHAPES.items()
    }
    parameters["conv"].data = parameters["conv"].data.to(memory_format=torch.channels_last)  # as in the UNet
    config = TrainConfig(pretrained_model_name_or_path="m", dataset_name="d", **settings)  # no preset's values
    return MasterOptimizer(parameters, dtype, config, lr=lr, steps=steps)


def give_gradients(masters: MasterOptimizer, seed: int, size: float = 1.0) -> list[torch.Tensor]:
    """One backward pass's gradients in the module's dtype, taken up by the masters; returns them."""
    generator = seeds.generator(seed)
    given = []
    for parameter in masters.parameters:
        gradient = (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        given.append(gradient)
    masters.accumulate()
    return given


def train(masters: MasterOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(masters, seed=step)
        masters.step(step, FINITE, 1)


def everything(masters: MasterOptimizer) -> dict[str, object]:
    """All of the state, copied."""
    files, values = masters.state()
    copies = {(f, n): t.clone() for f, tensors in files.items() for n, t in tensors.items()}
    module = {("module", n): p.detach().clone() for n, p in zip(masters.names, masters.parameters, strict=True)}
    return {**copies, **module, **values}


def changed(before: dict[str, object], after: dict[str, object]) -> set:
    assert before.keys() == after.keys()
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return {key for key in before if not same(before[key], after[key])}


# ---- masters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_begin_at_the_fp32_weights_and_the_module_at_their_rounding(dtype):
    masters, exact = make(dtype), make().weights()
    assert all(torch.equal(masters.weights()[name], exact[name]) for name in SHAPES)
    for name, parameter in zip(masters.names, masters.parameters, strict=True):
        assert parameter.dtype == dtype and torch.equal(parameter, exact[name].to(dtype))
    assert (masters.masters is masters.parameters) == (dtype == torch.float32)


def test_updates_below_the_resolution_of_bf16_add_up():
    masters = make(torch.bfloat16, fill=1.0, lr=1e-4, adam_weight_decay=0.0, max_grad_norm=0.0)
    lost = torch.ones((), dtype=torch.bfloat16)
    for step in range(100):
        for parameter in masters.parameters:
            parameter.grad = torch.ones_like(parameter)
        masters.accumulate()
        masters.step(step, FINITE, 1)
        lost -= 1e-4
    assert lost == 1  # what a bf16 weight would have made of it
    for parameter, master in zip(masters.parameters, masters.masters, strict=True):
        torch.testing.assert_close(master, torch.full_like(master, 0.99), rtol=0, atol=1e-5)
        assert torch.equal(parameter, master.bfloat16()) and (parameter < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_add_up_in_fp32(dtype):
    masters = make(dtype)
    given = [give_gradients(masters, seed) for seed in range(128)]
    for index, gradient in enumerate(masters.gradients()):
        terms = torch.stack([g[index] for g in given])
        exact = terms.double().sum(0)
        rounding = 128 * 2.0**-24 * terms.double().abs().sum(0)  # the bound of 128 fp32 additions
        assert gradient.dtype == torch.float32
        assert ((gradient - exact).abs() <= rounding).all()
        half = torch.zeros_like(terms[0])
        for term in terms:
            half += term
        assert ((half - exact).abs() > rounding).any()
    assert all(parameter.grad is None for parameter in masters.parameters)


# ---- the update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm, size", [(1.0, 1.0), (1e4, 1.0), (0.0, 1.0), (1e-6, 1e-7)])
def test_an_update_is_pytorchs_own(max_grad_norm, size):
    """Clipping as clip_grad_norm_, then AdamW at the schedule's rate, bit for bit."""
    settings = dict(max_grad_norm=max_grad_norm, lr_scheduler="cosine", lr_warmup_steps=2)
    masters = make(**settings)
    twins = [nn.Parameter(p.detach().clone()) for p in masters.parameters]
    adamw = torch.optim.AdamW(twins, lr=1e-3, weight_decay=1e-2, fused=True)
    schedule = get_scheduler("cosine", adamw, num_warmup_steps=2, num_training_steps=100)
    for step in range(5):
        for twin, gradient in zip(twins, give_gradients(masters, step, size), strict=True):
            twin.grad = gradient
        norm = masters.step(step, FINITE, 1)
        clipped = torch.nn.utils.clip_grad_norm_(twins, max_grad_norm or math.inf)
        adamw.step()
        schedule.step()
        assert torch.equal(norm, clipped)
        assert all(torch.equal(m, t) for m, t in zip(masters.masters, twins, strict=True))
        assert masters.gradients() == [None] * len(twins)


def test_loss_scale_and_ranks_are_divided_out():
    one, two = make(torch.float16), make(torch.float16)
    for step in range(3):
        given = give_gradients(one, step, size=2.0**-8)
        one.loss_scale.fill_(1.0)
        for parameter, gradient in zip(two.parameters, given, strict=True):
            parameter.grad = gradient * 512  # two ranks' sum at a scale of 256
        two.accumulate()
        assert torch.equal(one.step(step, FINITE, 1), two.step(step, FINITE, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.masters, two.masters, strict=True))
    assert two.loss_scale == INITIAL_LOSS_SCALE


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_that_of_diffusers(name):
    settings = dict(lr_scheduler=name, lr_warmup_steps=4, lr_num_cycles=2, lr_power=2.0)
    masters = make(lr=3e-4, steps=20, **settings)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    usual = get_scheduler(name, plain, num_warmup_steps=4, num_training_steps=20, num_cycles=2, power=2.0)
    for step in range(20):
        (expected,) = usual.get_last_lr()
        assert masters.lr(step) == expected
        give_gradients(masters, step)
        masters.step(step, FINITE, 1)
        assert [group["lr"] for group in masters.optimizer.param_groups] == [expected]
        plain.step()
        usual.step()


def test_a_rate_the_schedule_cannot_begin_at_is_refused():
    with pytest.raises(BadInput, match="--lr_scheduler polynomial at learning rate 1e-08"):
        make(lr=1e-8, lr_scheduler="polynomial")


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(BadInput, match=r"dpo_fast\[gpu\]"):
        make(optimizer="adamw8bit")


# ---- updates that are not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fault", ["nan", "inf", "nan loss"])
def test_a_non_finite_update_leaves_everything_as_it_was(optimizer, dtype, fault):
    masters = make(dtype, optimizer=optimizer)
    train(masters, 0, 2)
    before = everything(masters)
    give_gradients(masters, seed=2)
    if fault != "nan loss":
        masters.gradients()[1][0, 0] = float(fault)
    masters.step(2, torch.tensor(math.nan) if fault == "nan loss" else FINITE, 1)
    after = everything(masters)
    counters = {("counters", "skipped"), ("counters", "skipped_in_a_row")}
    if dtype == torch.float16:
        counters |= {("counters", "loss_scale"), ("counters", "good_updates")}
    assert changed(before, after) == counters
    assert masters.skipped == 1

    train(masters, 2, 3)
    assert {("weights", name) for name in SHAPES} <= changed(after, everything(masters))
    assert masters.skipped == 1 and masters.skipped_in_a_row == 0


def test_skipped_updates_in_a_row_are_counted():
    masters, seen = make(), []
    for step, finite in enumerate([False, False, True, False]):
        give_gradients(masters, step)
        masters.step(step, FINITE if finite else torch.tensor(math.inf), 1)
        seen.append((int(masters.skipped), int(masters.skipped_in_a_row)))
    assert seen == [(1, 1), (2, 2), (2, 0), (3, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_scale_of_fp16_halves_and_grows_again(dtype, monkeypatch):
    monkeypatch.setattr(optim, "LOSS_SCALE_GROWTH_INTERVAL", 3)
    masters, scales = make(dtype), []
    for step, finite in enumerate([False, False, True, True, False, True, True, True, True]):
        give_gradients(masters, step)
        masters.step(step, FINITE if finite else torch.tensor(math.nan), 1)
        scales.append(masters.loss_scale.item())
    halvings = [2, 4, 4, 4, 8, 8, 8, 4, 4]
    assert scales == ([INITIAL_LOSS_SCALE / h for h in halvings] if dtype == torch.float16 else [1.0] * 9)


# ---- EMA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ema_follows_its_formula(dtype):
    masters = make(dtype, use_ema=True, ema_decay=0.3, lr=0.1)
    expected = {name: weight.double() for name, weight in masters.weights().items()}
    for step in range(8):
        train(masters, step, step + 1)
        decay = min(0.3, (1 + step) / (10 + step))
        assert (decay == 0.3) == (step >= 3)
        for name, weight in masters.weights().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
    for name, average in masters.export().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(average, masters.weights()[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_ema", [True, False])
def test_the_module_shows_the_export_only_within_the_block(dtype, use_ema):
    masters = make(dtype, use_ema=use_ema, lr=0.1)
    train(masters, 0, 3)
    before = everything(masters)
    with pytest.raises(KeyboardInterrupt), masters.showing_export():
        for parameter, name in zip(masters.parameters, masters.names, strict=True):
            assert torch.equal(parameter, masters.export()[name].to(dtype))
            assert torch.equal(parameter, before["module", name]) != use_ema
        raise KeyboardInterrupt
    assert changed(before, everything(masters)) == set()


# ---- into a checkpoint and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_brings_back_every_bit(optimizer, dtype, tmp_path):
    settings = dict(optimizer=optimizer, use_ema=True, lr_scheduler="linear", lr_warmup_steps=2)
    masters = make(dtype, **settings)
    train(masters, 0, 2)
    give_gradients(masters, 2)
    masters.step(2, torch.tensor(math.nan), 1)  # so that no counter is at its initial value
    train(masters, 3, 5)
    files, values = masters.state()
    if optimizer == "adamw8bit":
        assert any(key.count("|") > 1 and t.dtype == torch.uint8 for key, t in files["optimizer"].items())
    folder = checkpoint.save(tmp_path, 5, files, {"optimizer_values": values})

    resumed = make(dtype, seed=9, **settings)
    files, state = checkpoint.load(folder)
    resumed.load_state(files, state["optimizer_values"])
    assert changed(everything(masters), everything(resumed)) == set()
    train(masters, 5, 8)
    train(resumed, 5, 8)
    assert changed(everything(masters), everything(resumed)) == set()


def test_state_of_before_the_first_update_loads():
    masters, resumed = make(), make(seed=9)
    resumed.load_state(*masters.state())
    train(masters, 0, 2)
    train(resumed, 0, 2)
    assert changed(everything(masters), everything(resumed)) == set()
