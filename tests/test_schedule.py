"""schedule: agreement with diffusers, exact zero terminal SNR, and which timesteps are worth a step."""

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from dpo_fast.errors import BadInput
from dpo_fast.kernels import noise_pair
from dpo_fast.kernels.reference import normal_noise
from dpo_fast.schedule import noise_schedule, turbo_grid, usable_timesteps

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def schedule(config=SD, *, zero_terminal_snr="auto", turbo=False, prediction_type=None):
    return noise_schedule(config, zero_terminal_snr=zero_terminal_snr, turbo=turbo, prediction_type=prediction_type)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_alpha_bar_is_that_of_diffusers(beta_schedule):
    config = {**SD, "beta_schedule": beta_schedule}
    ours, theirs = schedule(config), DDPMScheduler(**config).alphas_cumprod
    assert ours.alphas_cumprod.dtype == torch.float64 and ours.num_train_timesteps == 1000
    torch.testing.assert_close(ours.alphas_cumprod, theirs.double(), rtol=2e-4, atol=2e-7)


def test_alpha_bar_is_a_float64_product():
    expected, product = [], 1.0
    for beta in DDPMScheduler(**SD).betas.tolist():
        product *= 1 - beta
        expected.append(product)
    assert schedule().alphas_cumprod.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_roots_are_float32_rounded_once():
    ours = schedule()
    assert torch.equal(ours.sqrt_alpha_bar, ours.alphas_cumprod.sqrt().float())
    assert torch.equal(ours.sqrt_one_minus_alpha_bar, (1 - ours.alphas_cumprod).sqrt().float())
    total = ours.sqrt_alpha_bar.double() ** 2 + ours.sqrt_one_minus_alpha_bar.double() ** 2
    torch.testing.assert_close(total, torch.ones(1000).double(), rtol=2e-7, atol=0)


def test_trained_betas_and_a_short_schedule():
    betas = [0.1, 0.2, 0.4]
    ours = schedule({"trained_betas": betas, "num_train_timesteps": 3})
    torch.testing.assert_close(ours.alphas_cumprod, torch.tensor([0.9, 0.72, 0.432]).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"]
)
def test_the_config_of_any_scheduler_with_betas_will_do(name):
    config = getattr(diffusers, name)(**SD).config
    assert torch.equal(schedule(config).alphas_cumprod, schedule().alphas_cumprod)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_agrees_with_the_scheduler(prediction_type, seed):
    """add_noise and get_velocity of diffusers in float32, from our schedule and kernel."""
    ours, scheduler = schedule(prediction_type=prediction_type), DDPMScheduler(**SD)
    timesteps = torch.tensor([0, 250, 999])
    latents = torch.randn(6, 4, 8, 8)
    ids = torch.arange(3)
    noisy, target = noise_pair(
        latents,
        ours.sqrt_alpha_bar[timesteps],
        ours.sqrt_one_minus_alpha_bar[timesteps],
        seed,
        ids,
        ids,
        prediction_type=ours.prediction_type,
        dtype=torch.float32,
    )
    eps, both = normal_noise(seed, ids, ids, 4, 8, 8).repeat(2, 1, 1, 1), timesteps.repeat(2)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, eps, both), rtol=1e-5, atol=1e-5)
    expected = eps[:3] if prediction_type == "epsilon" else scheduler.get_velocity(latents, eps, both)
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_zero_terminal_snr(beta_schedule):
    config = {**SD, "beta_schedule": beta_schedule}
    plain, zero = schedule(config, zero_terminal_snr="off"), schedule(config, zero_terminal_snr="on")
    assert zero.alphas_cumprod[-1].item() == 0.0 and zero.sqrt_alpha_bar[-1].item() == 0.0
    assert zero.sqrt_one_minus_alpha_bar[-1].item() == 1.0
    torch.testing.assert_close(zero.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-14, atol=0)
    assert (zero.alphas_cumprod.diff() < 0).all()
    theirs = DDPMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(zero.alphas_cumprod, theirs.double(), rtol=1e-3, atol=1e-6)


def test_zero_terminal_snr_leaves_a_schedule_that_has_it():
    config = {"trained_betas": [0.1, 0.5, 1.0], "num_train_timesteps": 3}
    on, off = (schedule(config, zero_terminal_snr=value).alphas_cumprod for value in ("on", "off"))
    torch.testing.assert_close(on, off, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "value, turbo, in_config, expected",
    [
        ("auto", False, False, False),
        ("auto", True, False, True),
        ("auto", False, True, True),
        ("on", False, False, True),
        ("off", True, True, False),
    ],
)
def test_when_the_schedule_is_rescaled(value, turbo, in_config, expected):
    config = DDIMScheduler(**SD, rescale_betas_zero_snr=in_config).config
    assert (schedule(config, zero_terminal_snr=value, turbo=turbo).alphas_cumprod[-1].item() == 0) is expected


def test_prediction_type():
    v = DDIMScheduler(**SD, prediction_type="v_prediction").config
    assert schedule().prediction_type == "epsilon"
    assert schedule(v).prediction_type == "v_prediction"
    assert schedule(v, prediction_type="epsilon").prediction_type == "epsilon"


def test_turbo_grid():
    assert turbo_grid(1000) == [249, 499, 749, 999]
    assert turbo_grid(100, steps=2) == [49, 99]


def test_timesteps_without_a_gradient_are_left_out():
    """Turbo's last timestep under epsilon; it stays under v_prediction and without zero terminal SNR."""
    turbo = EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing").config
    grid = turbo_grid(1000)
    assert usable_timesteps(schedule(turbo, turbo=True), grid).tolist() == [249, 499, 749]
    assert usable_timesteps(schedule(turbo, turbo=True, prediction_type="v_prediction"), grid).tolist() == grid
    assert usable_timesteps(schedule(turbo, turbo=True, zero_terminal_snr="off"), grid).tolist() == grid
    assert torch.equal(usable_timesteps(schedule(), None), torch.arange(1000))
    assert torch.equal(usable_timesteps(schedule(zero_terminal_snr="on"), None), torch.arange(999))
    unsorted = usable_timesteps(schedule(), [749, 249, 499, 249])
    assert unsorted.tolist() == [249, 499, 749] and unsorted.dtype == torch.int64


def test_to_moves_every_tensor():
    moved = schedule().to("meta")
    devices = {x.device.type for x in (moved.alphas_cumprod, moved.sqrt_alpha_bar, moved.sqrt_one_minus_alpha_bar)}
    assert devices == {"meta"} and moved.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({**SD, "prediction_type": "sample"}, {}, "prediction_type 'sample' is not supported; choose epsilon"),
        (SD, dict(prediction_type="flow"), "prediction_type 'flow'"),
        (SD, dict(zero_terminal_snr="yes"), "zero_terminal_snr 'yes' is not known; choose auto, on or off"),
        ({**SD, "beta_schedule": "mine"}, {}, "beta_schedule 'mine'"),
        (FlowMatchEulerDiscreteScheduler().config, {}, "scheduler config has no betas"),
        (EDMEulerScheduler().config, {}, "the scheduler says .* EDM's continuous noise levels, which is not"),
        (EDMDPMSolverMultistepScheduler().config, {}, "the scheduler says .* EDM"),
        (EulerDiscreteScheduler(**SD, timestep_type="continuous").config, {}, "timestep_type continuous"),
        (DPMSolverMultistepScheduler(**SD, use_flow_sigmas=True).config, {}, "use_flow_sigmas"),
        (CogVideoXDDIMScheduler(**SD, snr_shift_scale=3.0).config, {}, "snr_shift_scale 3.0"),
        ({}, {}, "scheduler config has no betas"),
    ],
)
def test_bad_input_is_named(config, options, message):
    with pytest.raises(BadInput, match=message):
        schedule(config, **options)
