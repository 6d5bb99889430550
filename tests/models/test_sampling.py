"""Samples are reproducible, whatever else is drawn with them."""

import numpy as np
import pytest
import torch

from dpo_fast.models.sampling import sample
from dpo_fast.pictures import to_picture
from tests.helpers.pipelines import load_model


@pytest.mark.parametrize("name", ["sd15", "turbo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_follow_seed_and_prompt(request, name, dtype, monkeypatch):
    path = request.getfixturevalue(f"{name}_path")
    family = load_model(path, turbo=name == "turbo", dtype=dtype, device=torch.device("cpu"))
    monkeypatch.setattr(type(family), "sampling_steps", 2)
    one, two = images = sample(family, ["a cat", "a cat"], [3, 4], resolution=64)
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8
    assert np.ptp(one.numpy()) > 50  # not a plain surface
    assert not torch.equal(one, two)
    assert torch.equal(sample(family, ["a cat"], [4], resolution=64)[0], two)
    assert not torch.equal(sample(family, ["a dog"], [4], resolution=64)[0], two)
    assert not torch.equal(sample(family, ["a cat"], [4], resolution=64, steps=3)[0], two)
    guided = sample(family, ["a cat"], [4], resolution=64, guidance=family.sampling_guidance + 3)
    assert not torch.equal(guided[0], two)
    assert not family.unet.training


def test_an_image_does_not_depend_on_its_batch(sd15_path):
    """But for rounding, which another batch size may change."""
    family = load_model(sd15_path, dtype=torch.float32, device=torch.device("cpu"))
    prompts, seeds = ["a cat", "a dog", "a cat"], [7, 8, 9]
    alone = sample(family, prompts, seeds, resolution=64, steps=2).int()
    together = sample(family, prompts, seeds, resolution=64, steps=2, batch_size=2).int()
    assert (alone - together).abs().max() <= 1


def test_samples_are_those_of_the_pipeline_itself(sd15_path, monkeypatch):
    family = load_model(sd15_path, dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(type(family), "sampling_steps", 3)
    ours = to_picture(sample(family, ["a cat"], [5], resolution=64)[0])
    family.pipeline.set_progress_bar_config(disable=True)
    theirs = family.pipeline(
        "a cat", num_inference_steps=3, guidance_scale=7.5, height=64, width=64, generator=torch.manual_seed(5)
    ).images[0]
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    assert np.abs(difference).max() <= 1  # rounding
