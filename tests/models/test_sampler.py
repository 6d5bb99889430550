"""The scheduler that samples and is saved has the schedule that was trained, and samples sanely."""

import json
from inspect import signature

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from dpo_fast.models.sampler import sampler_for
from dpo_fast.schedule import noise_schedule
from tests.helpers.pipelines import load_model

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FP32 = {"dtype": torch.float32, "device": "cpu"}
KINDS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


def latent(kind: type, **settings):
    """A scheduler for latents, as pipelines have it: without clipping."""
    clip = {"clip_sample": False} if "clip_sample" in signature(kind.__init__).parameters else {}
    return kind(**BETAS, **clip, **settings)


def fitted(scheduler, turbo: bool = False, **settings):
    """The schedule, and the scheduler that it is sampled with."""
    schedule = noise_schedule(scheduler.config, turbo=turbo, **{"zero_terminal_snr": "auto", **settings})
    return schedule, sampler_for(scheduler, schedule, turbo=turbo).of(scheduler)


def sample(scheduler, prediction_type: str, abar: torch.Tensor, steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """What a UNet gives that always knows the image, but for an error of 1e-3; and the image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler.set_timesteps(steps)
    x = torch.randn(image.shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(x, t)
        alpha, sigma = abar[int(t)].sqrt().float(), (1 - abar[int(t)]).sqrt().float()
        eps = (noisy - alpha * image) / sigma
        prediction = eps if prediction_type == "epsilon" else alpha * eps - sigma * image
        prediction = prediction + 1e-3 * torch.randn(image.shape, generator=generator)
        x = scheduler.step(prediction, t, x).prev_sample
    return x, image


@pytest.mark.parametrize("kind", KINDS)
def test_zero_terminal_snr_with_v_prediction(kind):
    scheduler = latent(kind, prediction_type="v_prediction")
    schedule, sampler = fitted(scheduler, zero_terminal_snr="on")
    config = sampler.config
    assert (config.rescale_betas_zero_snr, config.timestep_spacing) == (True, "trailing")
    assert (config.prediction_type, config.beta_start, config.beta_end) == ("v_prediction", 0.00085, 0.012)
    supported = "rescale_betas_zero_snr" in scheduler.config
    assert type(sampler) is (kind if supported else DDIMScheduler)
    abar = schedule.alphas_cumprod
    torch.testing.assert_close(sampler.alphas_cumprod[:-1].double(), abar[:-1], rtol=1e-3, atol=1e-6)
    assert sampler.alphas_cumprod[-1] <= 2**-24
    sampler.set_timesteps(20)
    assert int(sampler.timesteps[0]) == 999
    sampled, image = sample(sampler, "v_prediction", abar)
    assert (sampled - image).abs().max() < 0.2


def test_ddim_in_the_place_of_pndm_does_not_clip():
    _, sampler = fitted(PNDMScheduler(**BETAS, prediction_type="v_prediction", steps_offset=1), zero_terminal_snr="on")
    assert (sampler.config.clip_sample, sampler.config.thresholding, sampler.config.steps_offset) == (False, False, 1)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_epsilon_never_visits_the_timestep_without_signal(kind, spacing):
    schedule, sampler = fitted(latent(kind, timestep_spacing=spacing, steps_offset=1), zero_terminal_snr="on")
    assert (sampler.config.rescale_betas_zero_snr, sampler.config.timestep_spacing) == (True, "leading")
    for steps in (4, 20, 50):
        sampler.set_timesteps(steps)
        assert 999 not in sampler.timesteps.tolist()
    sampled, image = sample(sampler, "epsilon", schedule.alphas_cumprod)
    assert sampled.isfinite().all() and (sampled - image).abs().max() < 1


def test_turbo_keeps_the_scheduler_it_was_published_with():
    """Rescaled, its first step would be at sigma 4096, where an error of 1e-3 of the noise is one of 4 of the image."""
    published = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1)
    schedule, sampler = fitted(published, turbo=True)
    assert schedule.rescaled and sampler is published
    schedule, sampler = fitted(published, turbo=True, prediction_type="v_prediction")
    assert (sampler.config.rescale_betas_zero_snr, sampler.config.timestep_spacing) == (True, "trailing")
    rescaled = EulerAncestralDiscreteScheduler.from_config(published.config, rescale_betas_zero_snr=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))  # of an image that is 0
    for scheduler, least, most in ((published, 0.01, 0.02), (rescaled, 4, 5)):
        scheduler.set_timesteps(1)
        x, timestep = noise * scheduler.init_noise_sigma, scheduler.timesteps[0]
        scheduler.scale_model_input(x, timestep)
        error = scheduler.step(noise + 1e-3, timestep, x).prev_sample.abs().max().item()
        assert least < error < most


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_plain_stays_the_scheduler_it_is(kind):
    scheduler = kind(**BETAS)
    assert fitted(scheduler)[1] is scheduler


def test_a_scheduler_that_says_it_itself_stays_as_it_is():
    """A model that is published with it is sampled as its makers sample it."""
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule, sampler = fitted(scheduler)
    assert schedule.rescaled and sampler is scheduler
    schedule, sampler = fitted(scheduler, zero_terminal_snr="off")
    assert not schedule.rescaled and sampler.config.rescale_betas_zero_snr is False


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_saved_pipeline_has_it_and_is_read_back_the_same(request, tmp_path, caplog, name):
    with caplog.at_level("INFO", "dpo_fast"):
        path = request.getfixturevalue(f"{name}_path")
        family = load_model(path, prediction_type="v_prediction", zero_terminal_snr="on", **FP32)
    kind = "DDIMScheduler" if name == "sd15" else "EulerDiscreteScheduler"
    (line,) = caplog.messages
    assert line.startswith(f"sampled with {kind}, prediction_type v_prediction, rescale_betas_zero_snr True, timestep_")
    family.save_full(tmp_path, family.unet.state_dict())
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["_class_name"], saved["prediction_type"]) == (kind, "v_prediction")
    assert (saved["rescale_betas_zero_snr"], saved["timestep_spacing"]) == (True, "trailing")
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler).__name__ == kind
    again = load_model(tmp_path, **FP32)
    assert torch.equal(again.schedule.alphas_cumprod, family.schedule.alphas_cumprod)
    assert again.schedule.prediction_type == "v_prediction" and again.sampler.changes == {}
