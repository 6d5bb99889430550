"""Loading: what is detected, in which dtype it is held, and one clear line for everything that cannot be loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from dpo_fast.errors import BadInput
from dpo_fast.models import kinds, load
from dpo_fast.models.sdxl import SDXL
from tests.helpers.pipelines import load_model, make_sd15, make_sdxl
from tests.helpers.runs import ROOT
from tests.helpers.single_file import write_single_file

FP32 = {"dtype": torch.float32, "device": "cpu"}
BF16 = {"dtype": torch.bfloat16, "device": "cpu"}


@pytest.fixture
def sd15_copy(sd15_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd15_path, tmp_path / "model"))


@pytest.fixture(scope="module")
def single_files(sd15_path: Path, sdxl_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("single")
    return {
        path.name: write_single_file(DiffusionPipeline.from_pretrained(path), folder / f"{path.name}.safetensors")
        for path in (sd15_path, sdxl_path)
    }


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(match: str, path: object, **settings: object) -> str:
    """The message with which load_family refuses `path`; it must be one line and contain `match`."""
    with pytest.raises(BadInput, match=match) as caught:
        load_model(path, **{**FP32, **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is detected


def test_sd15(sd15_path):
    family = load_model(sd15_path, **FP32)
    assert (family.name, family.needs_time_ids, family.timestep_grid) == ("sd15", False, False)
    assert (family.sampling_steps, family.sampling_guidance) == (50, 7.5)
    assert family.timesteps.tolist() == list(range(1000))
    assert (family.default_resolution, family.resolution_multiple) == (64, 16)
    assert family.schedule.prediction_type == "epsilon"


def test_sdxl(sdxl_path):
    family = load_model(str(sdxl_path), **FP32)
    assert (family.name, family.needs_time_ids, family.timestep_grid) == ("sdxl", True, False)
    assert (family.sampling_steps, family.sampling_guidance) == (50, 5.0)
    assert family.timesteps.tolist() == list(range(1000))


def test_turbo_leaves_out_the_timestep_without_signal(turbo_path):
    family = load_model(turbo_path, turbo=True, **FP32)
    assert (family.name, family.needs_time_ids, family.timestep_grid) == ("turbo", True, True)
    assert (family.sampling_steps, family.sampling_guidance) == (4, 0.0)
    assert family.timesteps.tolist() == [249, 499, 749]
    assert family.schedule.alphas_cumprod[-1] == 0


def test_zero_terminal_snr_can_be_switched_off(turbo_path):
    family = load_model(turbo_path, turbo=True, zero_terminal_snr="off", **FP32)
    assert family.timesteps.tolist() == [249, 499, 749, 999]


def test_turbo_is_said_not_spelled(sdxl_path, tmp_path):
    path = shutil.copytree(sdxl_path, tmp_path / "sdxl-turbo")
    assert load_model(path, **FP32).name == "sdxl"


def test_v_prediction_of_the_scheduler(tmp_path):
    family = load_model(make_sd15(tmp_path, prediction_type="v_prediction"), **FP32)
    assert family.schedule.prediction_type == "v_prediction"


def test_prediction_type_given_is_also_sampled_with(sdxl_path):
    family = load_model(sdxl_path, prediction_type="v_prediction", **FP32)
    assert family.schedule.prediction_type == "v_prediction"
    assert family.pipeline.scheduler.config.prediction_type == "v_prediction"


# dtypes and state


def test_everything_is_frozen_and_in_eval_mode(sdxl_path):
    family = load_model(sdxl_path, **FP32)
    for part in (family.unet, family.pipeline.vae, family.pipeline.text_encoder, family.pipeline.text_encoder_2):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vae_that_overflows_stays_in_fp32(sdxl_path, dtype):
    family = load_model(sdxl_path, dtype=dtype, device="cpu")
    assert family.unet.dtype == family.pipeline.text_encoder.dtype == family.pipeline.text_encoder_2.dtype == dtype
    assert family.pipeline.vae.dtype == torch.float32


def test_vae_that_does_not_overflow_is_cast(sd15_copy):
    edit_json(sd15_copy / "vae" / "config.json", force_upcast=False)
    assert load_model(sd15_copy, **BF16).pipeline.vae.dtype == torch.bfloat16


def test_unet_in_fp32_for_masters(sd15_path):
    family = load_model(sd15_path, unet_dtype=torch.float32, **BF16)
    stored = load_file(sd15_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert (family.unet.dtype, family.pipeline.text_encoder.dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in family.unet.state_dict().items())


def test_variant(sd15_path, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(sd15_path)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    family = load_model(tmp_path / "half", variant="fp16", **FP32)
    weight = pipeline.unet.conv_in.weight.float()
    assert torch.equal(family.unet.conv_in.weight, weight)


def test_other_vae(sd15_path, tmp_path):
    other = make_sd15(tmp_path / "other", seed=1)
    wanted = AutoencoderKL.from_pretrained(other, subfolder="vae").encoder.conv_in.weight
    for path in (other, other / "vae"):
        family = load_model(sd15_path, vae_path=path, **FP32)
        assert torch.equal(family.pipeline.vae.encoder.conv_in.weight, wanted)


def test_other_vae_of_a_single_file_keeps_the_scaling_factor(sd15_path, single_files, tmp_path):
    state = load_file(single_files["sdxl"])
    bare = {name.removeprefix("first_stage_model."): t for name, t in state.items() if name.startswith("first_stage")}
    save_file(bare, tmp_path / "vae.safetensors")
    vae = load_model(sd15_path, vae_path=tmp_path / "vae.safetensors", **FP32).pipeline.vae
    assert torch.equal(vae.encoder.conv_in.weight, state["first_stage_model.encoder.conv_in.weight"])
    assert vae.config.scaling_factor == 0.18215


# single files


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_holds_the_same_weights(name, dtype, single_files, request):
    folder = request.getfixturevalue(f"{name}_path")
    settings = {"dtype": dtype, "device": "cpu", "unet_dtype": torch.float32}
    from_file = load_model(single_files[name], single_file_config=folder, **settings)
    from_folder = load_model(folder, **settings)
    assert from_file.name == name
    parts = [part for part, module in from_folder.pipeline.components.items() if isinstance(module, torch.nn.Module)]
    assert len(parts) == (3 if name == "sd15" else 4)
    for part in parts:
        wanted, found = (getattr(family.pipeline, part) for family in (from_folder, from_file))
        assert found.dtype == wanted.dtype
        assert found.state_dict().keys() == wanted.state_dict().keys()
        for key, tensor in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), f"{part}.{key}"


def test_single_file_without_its_configuration_offline(single_files):
    refused("sd15.safetensors cannot be loaded.*single_file_config", single_files["sd15"])


def test_single_file_of_another_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    refused("is no file", path)
    path.write_bytes(b"not a safetensors file")
    refused("cannot be loaded", path)
    save_file({"joint_blocks.0.weight": torch.zeros(1)}, path)
    refused("first tensor is joint_blocks.0.weight", path)
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(1)}, path)
    refused("is a LoRA", path)


def test_single_file_of_an_inpainting_model(single_files, tmp_path):
    state = load_file(single_files["sd15"])
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    refused("9 input channels", tmp_path / "inpaint.safetensors")


def test_single_file_of_the_refiner(single_files, tmp_path):
    state = load_file(single_files["sdxl"])
    refiner = {
        name.replace("embedders.1.", "embedders.0."): tensor
        for name, tensor in state.items()
        if not name.startswith("conditioner.embedders.0.")
    }
    save_file(refiner, tmp_path / "refiner.safetensors")
    refused("not a whole", tmp_path / "refiner.safetensors")


# what is refused


def test_turbo_of_stable_diffusion(sd15_path):
    """SD-Turbo, and whatever else samples in few steps; its own schedule says whether a timestep has no signal."""
    family = load_model(sd15_path, turbo=True, **FP32)
    assert (family.name, family.needs_time_ids, family.timestep_grid) == ("sd-turbo", False, True)
    assert family.timesteps.tolist() == [249, 499, 749]
    assert (family.sampling_steps, family.sampling_guidance) == (4, 0.0)


def test_folder_without_a_pipeline(tmp_path, sd15_path):
    refused("no model_index.json", tmp_path)
    refused("no model_index.json", sd15_path / "unet")


@pytest.mark.parametrize("class_name", ["StableDiffusion3Pipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_pipelines_of_other_classes(sd15_copy, class_name):
    edit_json(sd15_copy / "model_index.json", _class_name=class_name)
    refused("supported are StableDiffusionPipeline and StableDiffusionXLPipeline", sd15_copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_broken_model_index(sd15_copy, text):
    (sd15_copy / "model_index.json").write_text(text)
    refused("names no pipeline class", sd15_copy)


def test_refiner_without_its_first_text_encoder(sdxl_path, tmp_path):
    path = shutil.copytree(sdxl_path, tmp_path / "refiner")
    edit_json(path / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    refused("no text encoder", path)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [("in_channels", 9, "takes 9 and gives 4 channels"), ("time_cond_proj_dim", 16, "latent consistency")],
)
def test_unets_of_other_tasks(sd15_copy, setting, value, match):
    config = UNet2DConditionModel.load_config(sd15_copy / "unet")
    UNet2DConditionModel.from_config({**config, setting: value}).save_pretrained(sd15_copy / "unet")
    refused(match, sd15_copy)


def test_unet_of_the_other_family(sd15_copy, sdxl_path):
    shutil.rmtree(sd15_copy / "unet")
    shutil.copytree(sdxl_path / "unet", sd15_copy / "unet")
    refused("addition_embed_type", sd15_copy)


def test_flow_matching_scheduler(sd15_copy):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    (sd15_copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit_json(sd15_copy / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    refused("flow matching", sd15_copy)


def test_missing_truncated_and_absent_files(sd15_copy):
    weights = sd15_copy / "unet" / "diffusion_pytorch_model.safetensors"
    refused("variant", sd15_copy, variant="fp16")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("cannot be loaded", sd15_copy)
    weights.unlink()
    refused("cannot be loaded", sd15_copy)


def test_pickles_are_never_opened(sd15_copy, tmp_path):
    refused("is a pickle", tmp_path / "model.ckpt")
    weights = sd15_copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    refused("pickled weights are not loaded", sd15_copy)


def test_bad_vae(sd15_path, tmp_path):
    refused("cannot be loaded", sd15_path, vae_path=tmp_path)
    wide = AutoencoderKL(latent_channels=8, block_out_channels=(4,), norm_num_groups=2)
    wide.save_pretrained(tmp_path / "wide")
    refused("latents have 8", sd15_path, vae_path=tmp_path / "wide")


def test_text_encoder_with_the_names_of_newer_versions(sd15_path, sd15_copy):
    """Read, or refused; an older transformers would leave the weights random."""
    file = sd15_copy / "text_encoder" / "model.safetensors"
    state = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    encoder = load_model(sd15_path, **FP32).pipeline.text_encoder
    if hasattr(encoder, "text_model"):
        refused("pip install --upgrade transformers", sd15_copy)
    else:
        mine = load_model(sd15_copy, **FP32).pipeline.text_encoder.state_dict()
        assert all(torch.equal(mine[name], tensor) for name, tensor in encoder.state_dict().items())


def test_vae_of_another_class(sd15_path, sd15_copy):
    tiny = AutoencoderTiny(encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4))
    shutil.rmtree(sd15_copy / "vae")
    tiny.save_pretrained(sd15_copy / "vae")
    edit_json(sd15_copy / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    refused("the VAE is of class AutoencoderTiny", sd15_copy)
    assert load_model(sd15_copy, vae_path=sd15_path, **FP32).name == "sd15"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("prediction_type", "sample"), ("zero_terminal_snr", "maybe"), ("attention", "flash")],
)
def test_bad_settings(sd15_path, setting, value):
    refused(value, sd15_path, **{setting: value})


def test_hub_id_offline():
    refused("nobody/nothing is no folder and the hub cannot be reached", "nobody/nothing")


@pytest.mark.parametrize("path", ["/no/such/folder", "a b", "too/many/parts"])
def test_what_is_neither_a_path_nor_a_hub_id(path):
    refused(f"{path} is no folder, file or hub id", path)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (hub_errors.GatedRepoError, "owner/name is gated: accept https://huggingface.co/owner/name"),
        (hub_errors.RepositoryNotFoundError, "no model on the hub"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
        (hub_errors.HfHubHTTPError, r"could not be fetched from the hub \(status 500\)"),
    ],
)
def test_hub_errors(monkeypatch, error, match):
    response = SimpleNamespace(headers={}, request=None, status_code=500)

    def fail(*args, **kwargs):
        raise error("several\nlines", response=response)

    monkeypatch.setattr(kinds, "hf_hub_download", fail)
    refused(match, "owner/name", revision="v9")


def test_hub_model_of_another_class_is_refused_before_its_download(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setattr(kinds, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "model_index.json"))
    monkeypatch.setattr(load, "DiffusionPipeline", SimpleNamespace())  # any use fails
    refused("owner/name is a FluxPipeline", "owner/name")


def test_hub_model_is_loaded_from_where_it_was_downloaded(monkeypatch, sd15_path):
    asked = {}

    def download(path, **kwargs):
        asked.update(kwargs, path=path)
        return str(sd15_path)

    monkeypatch.setattr(kinds, "hf_hub_download", lambda *args, **kwargs: str(sd15_path / "model_index.json"))
    monkeypatch.setattr(load.DiffusionPipeline, "download", download)
    family = load_model("owner/name", revision="v1", token="secret", cache_dir="there", **FP32)
    assert family.name == "sd15"
    assert asked == {
        "path": "owner/name",
        "revision": "v1",
        "token": "secret",
        "cache_dir": "there",
        "variant": None,
        "use_safetensors": True,
    }


# quiet


@pytest.mark.exhaustive
def test_nothing_is_printed_that_a_newcomer_would_worry_about(tmp_path):
    make_sd15(tmp_path / "sd15")
    make_sdxl(tmp_path / "sdxl")
    script = f"""
from pathlib import Path
import torch
from dpo_fast.errors import BadInput
from dpo_fast.models import add_lora, merge_lora, save_lora
from tests.helpers.pipelines import load_model

folder = Path({str(tmp_path)!r})
for name in ("sd15", "sdxl"):
    family = load_model(folder / name, dtype=torch.float16, device="cpu")
    family.encode_prompts(["a prompt of far more than seventy-seven letters " * 4])
    family.unet.to(torch.float32)
    family.save_full(folder / "full" / name, family.unet.state_dict())
    add_lora(family.unet, 4, 8.0)
    state = {{key: p.detach() for key, p in family.unet.named_parameters() if p.requires_grad}}
    save_lora(family, folder / "lora" / name, state)
    del family
    merge_lora(load_model(folder / name, dtype=torch.float32, device="cpu").pipeline, folder / "lora" / name)
for use in (
    lambda: merge_lora(load_model(folder / "sd15", dtype=torch.float32, device="cpu").pipeline, folder / "lora/sdxl"),
    lambda: load_model(folder / "sd15" / "unet", dtype=torch.float32, device="cpu"),
    lambda: load_model(folder / "sd15", vae_path=folder, dtype=torch.float32, device="cpu"),
):
    try:
        use()
        raise SystemExit("accepted")
    except BadInput:
        pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_weights_lie_where_torch_puts_them(sdxl_path, monkeypatch):
    """Whatever a library left askew is moved, its values unchanged: the last bit of a product depends on the place."""
    values: dict[str, torch.Tensor] = {}

    class Askew(SDXL):
        def __init__(self, pipeline: DiffusionPipeline, **settings: object) -> None:
            for name, parameter in pipeline.text_encoder_2.named_parameters():
                values[name] = parameter.detach().clone()
                room = torch.empty(parameter.nbytes + 8, dtype=torch.uint8)
                parameter.data = room[8:].view(parameter.dtype).view_as(parameter).copy_(values[name])
            super().__init__(pipeline, **settings)

    monkeypatch.setitem(kinds.FAMILIES, "StableDiffusionXLPipeline", Askew)
    family = load_model(sdxl_path, **FP32)
    for name, parameter in family.pipeline.text_encoder_2.named_parameters():
        assert parameter.data_ptr() % load.ALIGNMENT == 0 and torch.equal(parameter, values[name])


# what is saved in other ways


@pytest.mark.parametrize("length", [None, 10**30, 248])
def test_a_tokenizer_without_a_length_takes_what_its_encoder_has_positions_for(sdxl_path, tmp_path, length):
    """transformers has 10^30 in its place, which ended in an OverflowError of the tokenizer."""
    model = Path(shutil.copytree(sdxl_path, tmp_path / "model"))
    for name in ("tokenizer", "tokenizer_2"):
        config = json.loads((model / name / "tokenizer_config.json").read_text())
        config = {key: value for key, value in config.items() if key != "model_max_length"}
        more = {} if length is None else {"model_max_length": length}
        (model / name / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    family, usual = load_model(model, **FP32), load_model(sdxl_path, **FP32)
    prompts = ["a cat", "a long caption " * 40]
    ours, theirs = family.encode_prompts(prompts), usual.encode_prompts(prompts)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert family.cut_off(prompts) == usual.cut_off(prompts)


def asymmetric() -> AsymmetricAutoencoderKL:
    """A VAE with all the weights of an AutoencoderKL, and more."""
    blocks = {"down_block_out_channels": (8,), "up_block_out_channels": (8,), "norm_num_groups": 4}
    return AsymmetricAutoencoderKL(**blocks, layers_per_down_block=1, layers_per_up_block=1)


def test_a_vae_of_another_class_is_refused_whatever_names_it(sd15_copy, tmp_path):
    """diffusers fills an AutoencoderKL with those weights of an AsymmetricAutoencoderKL that fit, and warns."""
    asymmetric().save_pretrained(tmp_path / "vae")
    refused("the VAE is of class AsymmetricAutoencoderKL", sd15_copy, vae_path=tmp_path / "vae")
    shutil.rmtree(sd15_copy / "vae")
    asymmetric().save_pretrained(sd15_copy / "vae")  # model_index.json says AutoencoderKL
    refused("the VAE is of class AsymmetricAutoencoderKL", sd15_copy)
    edit_json(sd15_copy / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])
    refused("the VAE is of class AsymmetricAutoencoderKL", sd15_copy)


def test_a_single_file_of_diffusers_own_converter(single_files, sdxl_path, tmp_path):
    """It leaves a projection under transformers' name, where the loader left it without values."""
    state, name = load_file(single_files["sdxl"]), "conditioner.embedders.1.model.text_projection"
    state[f"{name}.weight"] = state.pop(name).T.contiguous()
    save_file(state, tmp_path / "converted.safetensors")
    ours = load_model(tmp_path / "converted.safetensors", single_file_config=sdxl_path, **FP32).pipeline
    theirs = load_model(sdxl_path, **FP32).pipeline
    assert torch.equal(ours.text_encoder_2.text_projection.weight, theirs.text_encoder_2.text_projection.weight)
    save_file({**state, f"{name}.weight": torch.ones(2, 2)}, tmp_path / "converted.safetensors")
    refused("is of shape", tmp_path / "converted.safetensors", single_file_config=sdxl_path)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_that_lacks_a_tensor_is_refused(single_files, sd15_path, sdxl_path, tmp_path, family):
    """It ended in a NotImplementedError about meta tensors, or with a library's own kind of error."""
    state, config = load_file(single_files[family]), {"sd15": sd15_path, "sdxl": sdxl_path}[family]
    lacking = next(name for name in state if name.endswith("text_model.final_layer_norm.weight"))
    save_file({name: t for name, t in state.items() if name != lacking}, tmp_path / "a.safetensors")
    refused("lacks 1 of the tensors of the text_encoder", tmp_path / "a.safetensors", single_file_config=config)
    without = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in state.items()}
    save_file(without, tmp_path / "b.safetensors")
    refused("cannot be loaded", tmp_path / "b.safetensors", single_file_config=config)


def test_a_folder_with_weights_of_a_variant_only_names_the_variant(sd15_path, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(sd15_path)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    refused("add --variant fp16", tmp_path / "half")
    refused("it holds fp16, not bf16: leave --variant out", tmp_path / "half", variant="bf16")
    refused("it holds no variants, not fp16: leave --variant out", sd15_path, variant="fp16")
    family = load_model(sd15_path, vae_path=tmp_path / "half" / "vae", **FP32)  # there is no flag for its variant
    whole = load_model(tmp_path / "half", variant="fp16", **FP32)
    for ours, theirs in zip(family.pipeline.vae.parameters(), whole.pipeline.vae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["x" * 500, "owner/" + "x" * 500, "a\0b"], ids=["long", "long with an owner", "null"])
def test_a_name_that_no_file_can_have(sd15_path, name):
    refused("no folder, file or hub id", name)
    refused("cannot be loaded as a VAE", sd15_path, vae_path=name)
    refused("is no file", name + ".safetensors")
