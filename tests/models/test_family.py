"""Encoding, denoising and saving, against diffusers called by hand."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from torch import nn

from dpo_fast.errors import BadInput
from dpo_fast.models import Family, nonfinite_rows
from tests.helpers.pipelines import default_time_ids, load_model, make_sd15, make_sdxl

FAMILIES = ["sd15", "sdxl", "turbo"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROMPTS = ["a red fox", "", "a blue boat", "a red fox"]


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return make_family(request, request.param, torch.float32)


def make_family(request, name: str, dtype: torch.dtype) -> Family:
    return load_model(request.getfixturevalue(f"{name}_path"), turbo=name == "turbo", dtype=dtype, device="cpu")


def random_pixels(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8)


def random_pairs(family: Family, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Noisy latents of three pairs, their timesteps, their conditioning with three different time ids."""
    noisy = torch.randn(6, 4, 8, 8).to(dtype)
    conditioning = family.encode_prompts(PROMPTS[:3])
    conditioning["time_ids"] = torch.cat([default_time_ids(resolution, 1) for resolution in (64, 512, 1023)])
    return noisy, torch.tensor([3, 500, 990]), conditioning


def anonymous_mib() -> float:
    """Memory of this process that is backed by no file."""
    return int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_freed_encoders_leave_the_process(sd15_path):
    family = load_model(sd15_path, dtype=torch.float32, device="cpu")
    family.empty_prompt()
    torch.ones(7 << 20)  # 28 MiB: once freed, glibc keeps what is smaller
    large = nn.Linear(1, 1)
    large.weights = nn.ParameterList(torch.ones(1 << 18) for _ in range(256))  # 256 MiB
    above = torch.ones(1 << 18)  # so that the large one is not at the end of the heap, which glibc gives back
    family.pipeline.register_modules(text_encoder=large)
    del large
    before = anonymous_mib()
    family.free_encoders(keep=False)
    assert before - anonymous_mib() > 200 and above.sum() == 1 << 18


# images


@torch.no_grad()
def test_encode_images_is_the_scaled_mean_of_the_posterior(family):
    pixels = random_pixels(3)
    posterior = family.pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    latents = family.encode_images(pixels)
    wanted = posterior.mean * family.pipeline.vae.config.scaling_factor
    assert latents.dtype == torch.float16
    assert latents.shape == (3, 4, 8, 8)
    torch.testing.assert_close(latents, wanted.half(), rtol=2**-10, atol=1e-5)
    assert posterior.std.mean() * family.pipeline.vae.config.scaling_factor > 1e-3  # a sample would not have passed


def test_encode_images_in_chunks(family):
    pixels = random_pixels(5)
    whole, chunked = family.encode_images(pixels, batch_size=5), family.encode_images(pixels, batch_size=2)
    torch.testing.assert_close(whole, chunked, rtol=2**-10, atol=1e-5)


STATISTICS = {"latents_mean": [-1.6, 1.3, 0.4, -0.2], "latents_std": [0.5, 2.0, 8.0, 5.0], "shift_factor": 0.7}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def normalized(request, tmp_path_factory) -> tuple[Family, Family]:
    """A family whose VAE names statistics and a shift of its latents, and the same without."""
    make, folder = {"sd15": make_sd15, "sdxl": make_sdxl}[request.param], tmp_path_factory.mktemp("normalized")
    paths = make(folder / "statistics", vae=STATISTICS), make(folder / "plain")
    return tuple(load_model(path, dtype=torch.float32, device="cpu") for path in paths)


def test_latents_are_normalized_where_the_pipeline_does_it(normalized):
    family, plain = normalized
    pixels = random_pixels(2)
    latents, wanted = family.encode_images(pixels).float(), plain.encode_images(pixels).float()
    if family.name == "sdxl":
        scale = family.pipeline.vae.config.scaling_factor
        mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        wanted = (wanted / scale - mean) * scale / std
    torch.testing.assert_close(latents, wanted, rtol=2**-9, atol=2e-4)


def test_encoding_is_that_of_the_pipelines_image_to_image(normalized):
    family, _ = normalized
    image_to_image = StableDiffusionXLImg2ImgPipeline if family.name == "sdxl" else StableDiffusionImg2ImgPipeline
    parts = {**family.pipeline.components} | {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    parts = {name: part for name, part in parts.items() if not (family.name == "sdxl" and name == "safety_checker")}
    options = {"requires_safety_checker": False} if family.name == "sd15" else {"add_watermarker": False}
    pipeline, pixels = image_to_image(**parts, **options), random_pixels(1)
    torch.manual_seed(0)
    tail = (False,) if family.name == "sdxl" else ()
    arguments = (pixels.float() / 127.5 - 1, torch.tensor([0]), 1, 1, torch.float32, torch.device("cpu"))
    pipeline.vae.encode = lambda image, encode=pipeline.vae.encode: SimpleNamespace(
        latents=encode(image).latent_dist.mean
    )
    family.pipeline.scheduler.add_noise = lambda latents, noise, timestep: latents
    try:
        wanted = pipeline.prepare_latents(*arguments, torch.Generator().manual_seed(0), *tail)
    finally:
        del pipeline.vae.encode, family.pipeline.scheduler.add_noise
    torch.testing.assert_close(family.encode_images(pixels).float(), wanted, rtol=2**-9, atol=1e-5)


@torch.no_grad()
def test_decoding_is_that_of_the_pipeline_and_undoes_the_encoding(normalized):
    family, _ = normalized
    raw, seen = [], []
    encode, decode = family.pipeline.vae.encode, family.pipeline.vae.decode
    family.pipeline.vae.decode = lambda latents, *rest, **more: (seen.append(latents), decode(latents, *rest, **more))[
        1
    ]
    try:
        pixels = random_pixels(1)
        raw.append(encode(pixels.float() / 127.5 - 1).latent_dist.mean)
        family.decode_latents(family.encode_images(pixels))
        torch.testing.assert_close(seen.pop(), raw[0], rtol=2**-8, atol=2e-2)
        family.pipeline.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 1, "height": 64, "width": 64, "guidance_scale": 0.0}
        latents = family.pipeline("a fox", generator=torch.manual_seed(0), output_type="latent", **call).images
        family.pipeline("a fox", generator=torch.manual_seed(0), output_type="pt", **call)
        family.decode_latents(latents)
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)
    finally:
        del family.pipeline.vae.decode


def test_what_the_pipeline_does_not_apply_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", "dpo_fast"):
        load_model(make_sd15(tmp_path, vae=STATISTICS), dtype=torch.float32, device="cpu")
    assert caplog.messages == [
        "the VAE's latents_mean and latents_std and shift_factor: not applied, as in StableDiffusionPipeline"
    ]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latents_std": [1.0, 1.0, 1.0]}, r"latents_std \[1\.0, 1\.0, 1\.0\] must be 4 numbers"),
        ({"latents_std": [1.0, 1.0, 1.0, 0.0]}, "must be greater than 0"),
        ({"latents_mean": ["a", "b", "c", "d"]}, "cannot be read"),
    ],
)
def test_bad_statistics_of_latents(tmp_path, change, match):
    path = make_sdxl(tmp_path, vae=STATISTICS | change)
    with pytest.raises(BadInput, match=match):
        load_model(path, dtype=torch.float32, device="cpu")


def test_another_vae_brings_its_statistics(sdxl_path, tmp_path):
    other = make_sdxl(tmp_path, vae=STATISTICS)
    family = load_model(sdxl_path, vae_path=other, dtype=torch.float32, device="cpu")
    pixels = random_pixels(1)
    wanted = load_model(other, dtype=torch.float32, device="cpu").encode_images(pixels)
    assert torch.equal(family.encode_images(pixels), wanted)
    family.save_full(tmp_path / "saved", family.unet.state_dict())
    saved = json.loads((tmp_path / "saved" / "vae" / "config.json").read_text())
    assert (saved["latents_mean"], saved["latents_std"]) == (STATISTICS["latents_mean"], STATISTICS["latents_std"])


@torch.no_grad()
def test_decode_latents_is_the_pipelines_decoding(family):
    latents = torch.randn(3, 4, 8, 8)
    vae = family.pipeline.vae
    images = vae.decode(latents / vae.config.scaling_factor).sample
    wanted = family.pipeline.image_processor.postprocess(images, output_type="np")
    decoded = family.decode_latents(latents, batch_size=2)
    assert decoded.dtype == torch.uint8
    difference = decoded.permute(0, 2, 3, 1).float() - torch.from_numpy(wanted * 255).round()
    assert difference.abs().max() <= 1
    assert decoded.float().std() > 20  # an image, not a plane


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_to_latents_then_decoding_runs_in_every_dtype(request, dtype):
    family = make_family(request, "sdxl", dtype)
    family.pipeline.set_progress_bar_config(disable=True)
    latents = family.pipeline("a fox", num_inference_steps=2, height=64, width=64, output_type="latent").images
    assert latents.dtype == dtype
    Image.fromarray(family.decode_latents(latents)[0].permute(1, 2, 0).numpy())


def test_overflowing_image_is_found(family):
    latents = family.encode_images(random_pixels(3))
    assert not nonfinite_rows(latents).any()
    family.pipeline.vae.register_to_config(scaling_factor=1e6)
    assert nonfinite_rows(family.encode_images(random_pixels(3))).tolist() == [True] * 3
    latents[1, 2, 3, 4] = math.nan
    assert nonfinite_rows(latents).tolist() == [False, True, False]


# prompts


def test_prompts_are_what_the_pipeline_gives_its_unet(family):
    """The UNet's inputs inside pipeline(...), one prompt at a time and without guidance, are ours."""
    seen = {}

    def record(module, args, kwargs):
        seen.update(kwargs["added_cond_kwargs"] or {}, prompt_embeds=kwargs["encoder_hidden_states"])

    family.pipeline.set_progress_bar_config(disable=True)
    ours = family.encode_prompts(PROMPTS)
    hook = family.unet.register_forward_pre_hook(record, with_kwargs=True)
    for row, prompt in enumerate(PROMPTS):
        family.pipeline(prompt, guidance_scale=0.0, num_inference_steps=1, height=64, width=64, output_type="latent")
        pairs = [("prompt_embeds", seen["prompt_embeds"])]
        if family.needs_time_ids:
            pairs.append(("pooled_prompt_embeds", seen["text_embeds"]))
            assert torch.equal(seen["time_ids"], default_time_ids(64, 1))
        assert ours.keys() == {name for name, _ in pairs}
        for name, wanted in pairs:
            assert ours[name].dtype == torch.float16
            torch.testing.assert_close(ours[name][row : row + 1], wanted.half(), rtol=2**-10, atol=1e-5)
    hook.remove()
    assert (ours["prompt_embeds"][0] - ours["prompt_embeds"][2]).abs().max() > 0.1


def test_each_prompt_is_encoded_once(family):
    rows = []
    family.pipeline.text_encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    encoded = family.encode_prompts(["one", "two", "one", "one"])
    assert rows == [1, 1]  # on a CPU each alone
    embeds = encoded["prompt_embeds"]
    assert torch.equal(embeds[0], embeds[2])
    assert torch.equal(embeds[0], embeds[3])
    assert not torch.equal(embeds[0], embeds[1])


def test_on_a_cpu_company_changes_no_bit(family):
    """What the cache holds was encoded in other batches than training without it would make."""
    pixels = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    alone = torch.cat([family.encode_images(pixels[i : i + 1]) for i in range(5)])
    assert torch.equal(family.encode_images(pixels, 4), alone)
    together = family.encode_prompts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for name, tensor in family.encode_prompts([prompt]).items():
            assert torch.equal(together[name][row], tensor[0])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_empty_prompt_of_sdxl(tmp_path, force_zeros):
    path = make_sdxl(tmp_path, force_zeros=force_zeros)
    family = load_model(path, dtype=torch.float32, device="cpu")
    encoded, empty = family.encode_prompts([""]), family.empty_prompt()
    assert empty.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    for name, tensor in empty.items():
        wanted = torch.zeros_like(encoded[name]) if force_zeros else encoded[name]
        assert torch.equal(tensor, wanted)
        assert tensor.dtype == torch.float16
    assert encoded["pooled_prompt_embeds"].abs().sum() > 0


def test_empty_prompt_is_the_encoded_empty_string_in_sd15(request):
    family = make_family(request, "sd15", torch.float32)
    assert torch.equal(family.empty_prompt()["prompt_embeds"], family.encode_prompts([""])["prompt_embeds"])


# denoising


@torch.no_grad()
def test_denoise_is_the_unet_on_each_image(family):
    noisy, timesteps, conditioning = random_pairs(family, torch.float32)
    prediction = family.denoise(family.unet, noisy, timesteps, conditioning)
    for row in range(6):
        pair = slice(row % 3, row % 3 + 1)
        added = {}
        if family.needs_time_ids:
            pooled = conditioning["pooled_prompt_embeds"][pair].float()
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": conditioning["time_ids"][pair]}}
        alone = family.unet(
            noisy[row : row + 1], timesteps[pair], conditioning["prompt_embeds"][pair].float(), **added
        ).sample
        torch.testing.assert_close(prediction[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt_embeds", "pooled_prompt_embeds", "time_ids", "timesteps"])
def test_every_input_matters_to_its_own_pair_only(request, name):
    family = make_family(request, "sdxl", torch.float32)
    noisy, timesteps, conditioning = random_pairs(family, torch.float32)
    before = family.denoise(family.unet, noisy, timesteps, conditioning)
    changed = timesteps if name == "timesteps" else conditioning[name]
    changed[1] += 2
    after = family.denoise(family.unet, noisy, timesteps, conditioning)
    moved = (before - after).flatten(1).abs().amax(1) > 1e-4
    assert moved.tolist() == [False, True, False, False, True, False]


@torch.no_grad()
def test_time_ids_are_not_rounded(request):
    family = make_family(request, "sdxl", torch.bfloat16)  # which has no 1023
    noisy, timesteps, conditioning = random_pairs(family, torch.bfloat16)
    seen = []
    family.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    family.denoise(family.unet, noisy, timesteps, conditioning)
    assert torch.equal(seen[0], conditioning["time_ids"].repeat(2, 1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_copy_predicts_the_same_bits(request, name, dtype):
    family = make_family(request, name, dtype)
    noisy, timesteps, conditioning = random_pairs(family, dtype)
    policy = family.denoise(family.unet, noisy, timesteps, conditioning)
    reference = family.denoise(copy.deepcopy(family.unet), noisy, timesteps, conditioning)
    assert policy.dtype == dtype
    assert policy.isfinite().all()
    assert torch.equal(policy, reference)


# saving


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_save_full_and_reload(request, tmp_path, name, dtype):
    family = make_family(request, name, dtype)
    live = {key: tensor.clone() for key, tensor in family.unet.state_dict().items()}
    masters = {key: tensor.float() + 1e-3 for key, tensor in live.items()}
    scheduler = dict(family.pipeline.scheduler.config)
    family.save_full(tmp_path / "saved", masters)

    assert family.unet.dtype == dtype
    assert all(torch.equal(tensor, live[key]) for key, tensor in family.unet.state_dict().items())
    assert not [*tmp_path.rglob("*.bin")]
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(reloaded) is type(family.pipeline)
    assert dict(reloaded.scheduler.config) == scheduler
    assert reloaded.unet.state_dict().keys() == masters.keys()
    assert all(torch.equal(tensor, masters[key]) for key, tensor in reloaded.unet.state_dict().items())
    parts = [part for part, module in reloaded.components.items() if isinstance(module, torch.nn.Module)]
    assert len(parts) == (3 if name == "sd15" else 4)
    for part in parts:
        assert getattr(reloaded, part).dtype == torch.float32
        if part != "unet":
            saved, held = getattr(reloaded, part).state_dict(), getattr(family.pipeline, part).state_dict()
            assert all(torch.equal(tensor, held[key].float()) for key, tensor in saved.items())
    reloaded.set_progress_bar_config(disable=True)
    assert reloaded("a fox", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    again = load_model(tmp_path / "saved", turbo=name == "turbo", dtype=torch.float32, device="cpu")
    assert again.name == name


def test_save_full_refuses_a_state_that_is_not_the_unets(request, tmp_path):
    family = make_family(request, "sd15", torch.float32)
    state = family.unet.state_dict()
    del state["conv_in.weight"]
    with pytest.raises(RuntimeError, match=r"conv_in\.weight"):
        family.save_full(tmp_path, state)


def test_prompts_that_are_cut_off_are_those_whose_last_words_say_nothing(family):
    prompts = ["word " * n + "end" for n in range(10, 40)]  # a letter is a token in these tokenizers
    cut, limit = family.cut_off(prompts)
    assert limit == 75 and any(cut) and not all(cut)
    for prompt, is_cut in zip(prompts, cut, strict=True):
        one, other = (family.encode_prompts([text])["prompt_embeds"] for text in (prompt, prompt[:-1] + "q"))
        assert torch.equal(one, other) == is_cut
    assert cut == sorted(cut)


@pytest.mark.parametrize("alike", [True, False])
def test_tokens_are_counted_once_where_both_tokenizers_make_the_same(request, monkeypatch, capfd, alike):
    family = make_family(request, "sdxl", torch.float32)
    first, second = family.pipeline.tokenizer, copy.deepcopy(family.pipeline.tokenizer)
    second.pad_token = "a"
    if not alike:
        second.add_tokens(["word"])
    monkeypatch.setattr(family.pipeline, "tokenizer_2", second)
    counted, call = [], type(first).__call__
    monkeypatch.setattr(type(first), "__call__", lambda self, *a, **k: counted.append(self) or call(self, *a, **k))
    prompts = ["word " * n for n in range(10, 40)]
    cut = family.cut_off(prompts)[0]
    assert counted == ([first] if alike else [first, second]) and any(cut) and not all(cut)
    assert "Counting tokens" not in capfd.readouterr().err
    monkeypatch.setattr("dpo_fast.models.caption_limits.MANY_PROMPTS", 1)
    assert family.cut_off(prompts)[0] == cut and "Counting tokens" in capfd.readouterr().err
