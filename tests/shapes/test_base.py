"""The base pipeline: its classes, its exact autoencoder, its tokenizer, and that the pretraining makes what trains."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from dpo_fast.shapes import pretrain
from dpo_fast.shapes.base import new_base, pixel_vae
from dpo_fast.shapes.render import HEIGHTS, SCENES, render
from tests.helpers.pipelines import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What three steps of pretraining leave."""
    path = tmp_path_factory.mktemp("shapes") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pretrain", "--output_dir", str(path), "--steps", "3", "--batch_size", "4"])
        patch.setattr(pretrain, "SAMPLING_STEPS", 1)
        pretrain.main()
    return path


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str
)
def test_the_latents_are_the_pixels(dtype, tolerance):
    vae = pixel_vae().to(dtype)
    pixels = torch.rand(5, 3, 16, 16).to(dtype) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(latents).sample
    assert (latents - pixels).abs().max() <= tolerance
    assert (decoded - pixels).abs().max() <= tolerance


def test_a_word_of_the_world_is_a_token():
    tokenizer = new_base().tokenizer
    for scene in SCENES:
        tokens = tokenizer(scene.caption).input_ids
        assert len(tokens) == 15, scene
        assert tokenizer.decode(tokens, skip_special_tokens=True).split() == scene.caption.replace(",", " ,").split()
    assert len({tuple(tokenizer(scene.caption).input_ids) for scene in SCENES}) == len(SCENES)


def test_a_saved_base_opens_as_a_pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, StableDiffusionPipeline)
    weights = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert len(weights) == 3 and sum(weights) <= 8 * 2**20
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([SCENES[0].caption] * 2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)


def test_a_saved_base_is_a_family_to_train(folder):
    family = load_model(folder, dtype=torch.float32, device="cpu")
    assert (family.name, family.default_resolution, family.resolution_multiple) == ("sd15", 16, 2)
    pixels = (render([SCENES[0]], torch.tensor([0])) * 255).round().to(torch.uint8)
    latents = family.encode_images(pixels)
    torch.testing.assert_close(latents.float(), pixels / 127.5 - 1, atol=1e-3, rtol=0)


def test_pretraining_reports_and_repeats(folder):
    report = json.loads((folder / "pretraining.json").read_text())
    assert report["prompts"] == 512 and report["steps"] == 3 and 0 <= report["right"] <= 1
    first, second = (pretrain.train(2, 4, seed=0, measure_every=9).unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.exhaustive
def test_the_loss_falls():
    """Fresh weights predict nothing; forty steps in, much of the noise is told from the scene."""
    base = pretrain.train(40, 8, seed=0, measure_every=99)
    generator = torch.Generator().manual_seed(1)
    scenes = [SCENES[row] for row in torch.randint(len(SCENES), (64,), generator=generator)]
    latents = render(scenes, torch.randint(len(HEIGHTS), (64,), generator=generator)) * 2 - 1
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (64,), generator=generator)
    tokens = pretrain._tokens(base, [scene.caption for scene in scenes])
    with torch.no_grad():
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        predicted = base.unet(noisy, timesteps, base.text_encoder(tokens)[0]).sample
    assert (predicted - noise).square().mean() < 0.7
