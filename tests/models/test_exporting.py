"""Results in other programs' formats: read back through diffusers' own converters, and named as those programs name."""

import hashlib
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_fast.errors import BadInput
from dpo_fast.models import Family, add_lora
from dpo_fast.models.exporting import merged_state, sha256_of, write_kohya, write_single_file
from dpo_fast.models.original_layout import unet_places
from dpo_fast.train import main
from tests.helpers import seeds
from tests.helpers.pipelines import load_model, make_sd15, make_sdxl
from tests.helpers.runs import flags_for, train
from tests.helpers.single_file import kohya_name
from tests.helpers.single_file import write_single_file as written_independently

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
RANK, ALPHA = 4, 6.0


def with_lora(path, targets) -> tuple[Family, dict[str, torch.Tensor]]:
    """A model with random adapters, and their weights."""
    family, generator = load_model(path, dtype=torch.float32, device="cpu"), seeds.generator()
    add_lora(family.unet, RANK, ALPHA, targets)
    state = {name: tensor for name, tensor in family.unet.state_dict().items() if ".lora_" in name}
    for tensor in state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return family, state


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    "targets",
    ["attention", *(pytest.param(t, marks=pytest.mark.exhaustive) for t in ("attention+ff", "all-linear")), "conv"],
)
def test_diffusers_reads_the_kohya_file_to_the_last_layer(request, tmp_path, name, targets):
    path, file = request.getfixturevalue(f"{name}_path"), tmp_path / "lora.safetensors"
    family, state = with_lora(path, [targets])
    write_kohya(family, file, state, {"about": "a test"})
    pipeline = PIPELINES[name].from_pretrained(path)
    before = {key: tensor.clone() for key, tensor in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after, merged = pipeline.unet.state_dict(), merged_state(family, state)
    assert after.keys() == merged.keys() == before.keys()
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert len(moved) == len(state) / 2  # one weight for each A and B
    for key, tensor in after.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_layers_are_named_as_kohya_names_them(request, tmp_path, name):
    path, file = request.getfixturevalue(f"{name}_path"), tmp_path / "lora.safetensors"
    family, state = with_lora(path, ["conv"])
    write_kohya(family, file, state, {})
    tensors = load_file(file)
    layers = {key.split(".")[0] for key in tensors}
    modules = load_model(path, dtype=torch.float32, device="cpu").unet.named_modules()
    kinds = {kohya_name(family.pipeline, layer): module for layer, module in modules if hasattr(module, "weight")}
    assert layers <= kinds.keys()
    every = {layer for layer, module in kinds.items() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    ends = ("conv_in", "conv_out", "input_blocks_0_0", "_out_2")
    assert {layer for layer in every - layers} == {layer for layer in every if layer.endswith(ends)} - layers
    assert all(
        tensors[f"{layer}.alpha"] == ALPHA and len(tensors[f"{layer}.lora_down.weight"]) == RANK for layer in layers
    )
    assert len(tensors) == 3 * len(layers)


def test_half_precision_is_rounded_once_and_what_overflows_is_refused(sdxl_path, tmp_path):
    family, state = with_lora(sdxl_path, ["attention"])
    write_kohya(family, tmp_path / "half.safetensors", state, {}, torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for key, tensor in half.items() if not key.endswith(".alpha")} == {torch.float16}
    write_kohya(family, tmp_path / "full.safetensors", state, {})
    full = load_file(tmp_path / "full.safetensors")
    assert all(torch.equal(half[key], full[key].half()) for key in full if not key.endswith(".alpha"))
    next(iter(state.values())).fill_(1e6)
    with pytest.raises(BadInput, match="beyond float16: say --export_dtype"):
        write_kohya(family, tmp_path / "over.safetensors", state, {}, torch.float16)
    assert not (tmp_path / "over.safetensors").exists()


@pytest.mark.parametrize("name", PIPELINES)
def test_the_single_file_is_the_original_layout(request, tmp_path, name):
    family = load_model(request.getfixturevalue(f"{name}_path"), dtype=torch.float32, device="cpu")
    write_single_file(family, tmp_path / "ours.safetensors", family.unet.state_dict(), {}, torch.float32)
    written_independently(family.pipeline, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sdxls_published_layout():
    """Of the real SDXL: the places that its published file has, by hand."""
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    }
    places = unet_places(config)
    assert places["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert places["down_blocks.1.attentions.0"] == "input_blocks.4.1"
    assert places["down_blocks.2.resnets.1.conv_shortcut"] == "input_blocks.8.0.skip_connection"
    assert places["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert places["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert places["up_blocks.1.attentions.2"] == "output_blocks.5.1"
    assert places["up_blocks.2.resnets.2.conv1"] == "output_blocks.8.0.in_layers.2"
    with pytest.raises(BadInput, match="AttnDownBlock2D have no place"):
        unet_places(config | {"down_block_types": ("AttnDownBlock2D",) * 3})


# runs


def metadata(file) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_a_run_writes_what_is_asked_for(sdxl_path, pairs, tmp_path):
    flags = ["--export", "kohya", "single_file", "--lora_alpha", 6, "--beta_dpo", 3000, "--learning_rate", 1e-2]
    out = train(sdxl_path, pairs, tmp_path / "mine", *flags)
    files = {"pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors", "single_file.safetensors"}
    assert {file.name for file in out.glob("*.safetensors")} == files
    assert files <= json.loads((out / "summary.json").read_text())["result"].keys()
    about = metadata(out / "kohya_lora_weights.safetensors")
    wanted = {
        "ss_network_dim": "4",
        "ss_network_alpha": "6.0",
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": "mine",
        "dpo_fast.objective": "dpo",
        "dpo_fast.beta": "3000.0",
        "dpo_fast.pairs": "pairs.parquet",
        "dpo_fast.pairs_seen": "8",
    }
    assert wanted.items() <= about.items() and len(about["dpo_fast.base_weights"]) > 8
    merged = {}
    for name in ("pytorch_lora_weights", "kohya_lora_weights"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_path)
        pipeline.load_lora_weights(out / f"{name}.safetensors")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        merged[name] = pipeline.unet.state_dict()
    pipeline = StableDiffusionXLPipeline.from_single_file(out / "single_file.safetensors", config=str(sdxl_path))
    for key, tensor in merged["kohya_lora_weights"].items():
        torch.testing.assert_close(tensor, merged["pytorch_lora_weights"][key], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pipeline.unet.state_dict()[key].float(), tensor, rtol=2**-10, atol=1e-6)
    assert StableDiffusionXLPipeline.from_pretrained(sdxl_path).load_lora_weights(out) is None  # finds diffusers' own


def test_a_v_prediction_file_is_trained_and_keeps_its_marks(sdxl_path, pairs, tmp_path):
    """NoobAI's kind: one file with the keys v_pred and ztsnr, and an EMA that becomes untrue."""
    source = load_model(make_sdxl(tmp_path / "v", prediction_type="v_prediction"), dtype=torch.float32, device="cpu")
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0), "model_ema.decay": torch.ones(1)}
    base = written_independently(source.pipeline, tmp_path / "base.safetensors", marks)
    flags = ["--single_file_config", tmp_path / "v", "--export", "single_file", "--export_dtype", "fp32"]
    out = train(base, pairs, tmp_path / "run", *flags, "--tuning", "full", "--learning_rate", 1e-3)
    before, after = load_file(base), load_file(out / "single_file.safetensors")
    assert before.keys() - {"model_ema.decay"} == after.keys()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("model.diffusion_model.") for key in changed)
    about = metadata(out / "single_file.safetensors")
    assert about["modelspec.prediction_type"] == "v" and about["ss_zero_terminal_snr"] == "True"
    assert about["ss_new_sd_model_hash"] == hashlib.sha256(base.read_bytes()).hexdigest() == sha256_of(base)
    again = load_model(
        out / "single_file.safetensors", single_file_config=tmp_path / "v", dtype=torch.float32, device="cpu"
    )
    assert again.schedule.prediction_type == "v_prediction" and again.schedule.rescaled
    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    for key, tensor in again.unet.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[key], tensor), key


def test_stable_diffusion_2_by_velocity(pairs, tmp_path):
    source = make_sd15(tmp_path / "v2", second=True, prediction_type="v_prediction")
    family = load_model(source, dtype=torch.float32, device="cpu")
    base = written_independently(family.pipeline, tmp_path / "base.safetensors")
    flags = [
        "--single_file_config",
        source,
        "--export",
        "single_file",
        "--export_dtype",
        "fp32",
        "--learning_rate",
        1e-2,
    ]
    out = train(base, pairs, tmp_path / "run", *flags)
    before, after = load_file(base), load_file(out / "single_file.safetensors")
    assert before.keys() | {"v_pred"} == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".attn" in key for key in changed)
    about = metadata(out / "single_file.safetensors")
    assert about["ss_base_model_version"] == "sd_v2_v"
    assert about["modelspec.architecture"] == "stable-diffusion-v2-768-v" and "ss_network_dim" not in about
    again = load_model(out / "single_file.safetensors", single_file_config=source, dtype=torch.float32, device="cpu")
    assert again.schedule.prediction_type == "v_prediction" and again.name == "sd15"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pruned_file_says_what_it_lacks_and_takes_it_from_elsewhere(request, tmp_path, name):
    folder = request.getfixturevalue(f"{name}_path")
    family = load_model(folder, dtype=torch.float32, device="cpu")
    whole = load_file(written_independently(family.pipeline, tmp_path / "whole.safetensors"))
    vae, text = ("first_stage_model.",), ("cond_stage_model.", "conditioner.")
    half = {key: tensor.half() for key, tensor in whole.items()}
    settings, encoders = {"dtype": torch.float32, "device": "cpu"}, family.text_encoders
    for lacking, supplied, match in (
        (vae, ("vae",), "has no VAE: name one with --pretrained_vae_model_name_or_path, or"),
        (text, encoders, "has no text encoders: name a whole pipeline"),
        (vae + text, ("vae", *encoders), "has no text encoders and no VAE: name a whole pipeline"),
    ):
        path = tmp_path / "pruned.safetensors"
        save_file({key: tensor for key, tensor in half.items() if not key.startswith(lacking)}, path)
        with pytest.raises(BadInput, match=match):
            load_model(path, **settings)
        loaded = load_model(path, single_file_config=folder, **settings)
        assert loaded.name == name
        for part in ("unet", "vae", *encoders):
            found = getattr(loaded.pipeline, part).state_dict()
            for key, tensor in getattr(family.pipeline, part).state_dict().items():
                wanted = tensor if part in supplied else tensor.half().float()
                assert torch.equal(found[key], wanted), (part, key)


def test_the_vae_of_a_pruned_file_may_be_named(sdxl_path, tmp_path):
    family = load_model(sdxl_path, dtype=torch.float32, device="cpu")
    whole = load_file(written_independently(family.pipeline, tmp_path / "whole.safetensors"))
    path = tmp_path / "pruned.safetensors"
    save_file({key: tensor for key, tensor in whole.items() if not key.startswith("first_stage_model.")}, path)
    settings = {"dtype": torch.float32, "device": "cpu", "single_file_config": sdxl_path}
    vae = load_model(path, vae_path=sdxl_path, **settings).pipeline.vae
    assert all(torch.equal(tensor, vae.state_dict()[key]) for key, tensor in family.pipeline.vae.state_dict().items())


def test_the_default_and_what_is_refused(sd15_path, pairs, tmp_path, capsys):
    out = train(sd15_path, pairs, tmp_path / "run")
    assert (out / "kohya_lora_weights.safetensors").is_file() and not (out / "single_file.safetensors").exists()
    assert metadata(out / "kohya_lora_weights.safetensors")["ss_base_model_version"] == "sd_v1"
    capsys.readouterr()
    assert main(flags_for(sd15_path, pairs, tmp_path / "no", "--tuning", "full", "--export", "kohya")) == 2
    assert "say --export single_file" in capsys.readouterr().err and not (tmp_path / "no").exists()
