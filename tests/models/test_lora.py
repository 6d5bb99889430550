"""Adapters: their start, the reference with them off, and files that other programs read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.errors import BadInput
from dpo_fast.models import AdapterSwitch, Family, add_lora, merge_lora, save_lora
from dpo_fast.models.lora import WEIGHT_NAME, check_loaded
from tests.helpers import seeds
from tests.helpers.pipelines import default_time_ids, load_model

RANK, ALPHA = 4, 6.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_family(path: Path, dtype: torch.dtype = torch.float32) -> Family:
    return load_model(path, dtype=dtype, device="cpu")


def with_lora(path: Path, dtype: torch.dtype = torch.float32, **settings) -> Family:
    family = make_family(path, dtype)
    add_lora(family.unet, RANK, ALPHA, **settings)
    return family


@torch.no_grad()
def train(family: Family) -> None:
    """Give every B a value, as training would."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in family.unet.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def trainable(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in unet.named_parameters() if parameter.requires_grad}


def predict(family: Family) -> torch.Tensor:
    noisy = torch.randn(4, 4, 8, 8, generator=seeds.generator()).to(family.dtype)
    conditioning = family.encode_prompts(["a red fox", "a blue boat"]) | {"time_ids": default_time_ids(64, 2)}
    return family.denoise(family.unet, noisy, torch.tensor([20, 800]), conditioning)


def lora_file(family: Family, folder: Path) -> Path:
    save_lora(family, folder, trainable(family.unet))
    return folder / "pytorch_lora_weights.safetensors"


# adding


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_adapters_train_and_they_start_in_fp32(sdxl_path, dtype):
    family = with_lora(sdxl_path, dtype)
    names = trainable(family.unet)
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in family.unet.named_modules())
    assert len(names) == attentions * 4 * 2  # to_q, to_k, to_v, to_out.0, each with A and B
    for name, parameter in family.unet.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert parameter.dtype == (torch.float32 if ".lora_" in name else dtype)
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names)


def test_start_is_gaussian_and_zero_and_the_seeds(sdxl_path, seed):
    first, again, other = (trainable(with_lora(sdxl_path, seed=of).unet) for of in (seed, seed, seed + 1))
    a = torch.cat([tensor.flatten() for name, tensor in first.items() if "lora_A" in name])
    assert a.std().item() == pytest.approx(1 / RANK, rel=seeds.SIGMAS / (2 * a.numel()) ** 0.5)
    assert abs(a.mean().item()) < seeds.SIGMAS / RANK / a.numel() ** 0.5
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, other[name]) == ("lora_B" in name) for name, tensor in first.items())


def test_start_is_not_rounded_to_the_unets_dtype(sd15_path):
    full, half = (trainable(with_lora(sd15_path, dtype).unet) for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(tensor, half[name]) for name, tensor in full.items())


def test_convolutions_can_be_targets(sd15_path):
    family = with_lora(sd15_path, targets=("to_q", "conv1"))
    train(family)
    assert any("conv1.lora_B" in name for name in trainable(family.unet))
    on = predict(family)
    with AdapterSwitch(family.unet).off():
        assert not torch.equal(predict(family), on)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (("to_q", "to_qq"), "'to_qq' names no module"),
        (("to_q", "q"), "'q' names"),
        (("attn1",), "attn1 cannot be used"),
    ],
)
def test_bad_targets(sd15_path, targets, match):
    with pytest.raises(BadInput, match=match) as caught:
        with_lora(sd15_path, targets=targets)
    assert "\n" not in str(caught.value)


# the reference


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_policy_starts_as_the_reference_bit_for_bit(request, name, dtype, cast):
    family = make_family(request.getfixturevalue(f"{name}_path"), dtype)
    before = predict(family)
    add_lora(family.unet, RANK, ALPHA)
    if cast:
        family.unet.to(dtype)  # as the trainer does after copying the masters
    policy = predict(family)
    with AdapterSwitch(family.unet).off():
        reference = predict(family)
    assert policy.dtype == dtype
    assert torch.equal(policy, reference)
    assert torch.equal(policy, before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_stays_what_it_was(sdxl_path, dtype):
    family = make_family(sdxl_path, dtype)
    before = predict(family)
    add_lora(family.unet, RANK, ALPHA)
    train(family)
    policy = predict(family)
    switch = AdapterSwitch(family.unet)
    for _ in range(2):
        with switch.off():
            assert torch.equal(predict(family), before)
        assert torch.equal(predict(family), policy)
    assert (policy - before).abs().max() > 0.01


def test_the_switch_leaves_gradients_alone_and_ends_with_an_error(sd15_path):
    family = with_lora(sd15_path)
    train(family)
    policy, names = predict(family), trainable(family.unet).keys()
    with pytest.raises(KeyboardInterrupt), AdapterSwitch(family.unet).off():
        assert trainable(family.unet).keys() == names
        raise KeyboardInterrupt
    assert trainable(family.unet).keys() == names
    assert torch.equal(predict(family), policy)


def test_gradients_are_those_without_a_reference_pass(sd15_path):
    gradients = []
    for reference_first in (False, True):
        family = with_lora(sd15_path)
        train(family)
        if reference_first:
            with AdapterSwitch(family.unet).off():
                predict(family)
        predict(family).square().mean().backward()
        gradients.append({name: p.grad for name, p in family.unet.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert all(gradient.any() for gradient in gradients[0].values())


def test_adapters_that_are_off_are_not_run(sd15_path):
    family = make_family(sd15_path)
    with FlopCounterMode(display=False) as base:
        predict(family)
    add_lora(family.unet, RANK, ALPHA)
    with FlopCounterMode(display=False) as policy:
        predict(family)
    with FlopCounterMode(display=False) as reference, AdapterSwitch(family.unet).off():
        predict(family)
    assert reference.get_total_flops() == base.get_total_flops() < policy.get_total_flops()


# files


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_saved_adapter_gives_the_policy_back(request, tmp_path, name):
    path = request.getfixturevalue(f"{name}_path")
    family = with_lora(path)
    train(family)
    file = lora_file(family, tmp_path)
    other = make_family(path)
    base = predict(other)
    other.pipeline.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)  # offline diffusers 0.39 wants it
    torch.testing.assert_close(predict(other), predict(family), rtol=1e-4, atol=1e-5)  # B was rounded anew
    assert (predict(other) - base).abs().max() > 0.01
    stored = load_file(file)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    masters = trainable(family.unet)
    assert {f"unet.{key.replace('.default', '')}" for key in masters} == stored.keys()
    with safe_open(file, framework="pt") as opened:
        written = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert written == {
        "unet.r": RANK,
        "unet.lora_alpha": RANK,
        "unet.target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
        "unet.rank_pattern": {},  # without which diffusers 0.39 fails
        "unet.alpha_pattern": {},
    }


def test_equal_loras_are_equal_files(sd15_path, tmp_path):
    """safetensors writes the metadata in an order that differs from file to file."""
    family = load_model(sd15_path, dtype=torch.float32, device="cpu")
    add_lora(family.unet, RANK, ALPHA)
    state = {n: p.detach() for n, p in family.unet.named_parameters() if p.requires_grad}
    written = set()
    for number in range(12):
        save_lora(family, tmp_path / f"{number}", state)
        written |= {file.read_bytes() for file in (tmp_path / f"{number}").iterdir()}
    assert len(written) == 1
    with safe_open(tmp_path / "0" / WEIGHT_NAME, framework="pt") as file:
        assert set(file.metadata()) == {"format", "lora_adapter_metadata"}


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 2.0, 6.0, 4.0])
def test_the_tensors_alone_are_the_whole_update(sd15_path, tmp_path, alpha):
    """A reader that knows no metadata takes alpha for the rank: the same update, which is the policy's."""
    family = make_family(sd15_path)
    add_lora(family.unet, RANK, alpha)
    train(family)
    masters = {name: tensor.clone() for name, tensor in trainable(family.unet).items()}
    stored = load_file(lora_file(family, tmp_path))
    for name, tensor in trainable(family.unet).items():
        assert torch.equal(tensor, masters[name])  # what a checkpoint holds
    for name, layer in family.unet.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (stored[f"unet.{name}.lora_{part}.weight"] for part in "AB")
            assert torch.equal(a, masters[f"{name}.lora_A.default.weight"])
            policy = alpha / RANK * masters[f"{name}.lora_B.default.weight"].double()
            exact = alpha in (1.0, 2.0, 4.0)  # alpha / rank is a power of two
            torch.testing.assert_close(b.double(), policy, rtol=0 if exact else 2**-24, atol=0)
            torch.testing.assert_close(layer.get_delta_weight("default"), b @ a, rtol=1e-6, atol=1e-7)
    save_file(stored, tmp_path / "bare.safetensors")
    bare = make_family(sd15_path)
    bare.pipeline.load_lora_weights(tmp_path, weight_name="bare.safetensors")
    torch.testing.assert_close(predict(bare), predict(family), rtol=1e-4, atol=1e-5)


def test_a_file_of_another_unet_is_noticed(sd15_path, tmp_path):
    """diffusers loads the layers that it knows."""
    family = with_lora(sd15_path)
    state = load_file(lora_file(family, tmp_path))
    file = tmp_path / "more.safetensors"
    name = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    state |= {f"{name}.lora_A.weight": torch.ones(RANK, 16), f"{name}.lora_B.weight": torch.ones(16, RANK)}
    save_file(state, file)
    other = make_family(sd15_path)
    other.pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    with pytest.raises(BadInput, match=r"1 of its \d+ layers are not in this one \(down_blocks\.7"):
        check_loaded(other.unet, file)
    check_loaded(family.unet, tmp_path / "pytorch_lora_weights.safetensors")


@torch.no_grad()
def test_saving_writes_the_state_given_not_the_live_weights(sd15_path, tmp_path):
    family = with_lora(sd15_path, torch.bfloat16)
    masters = {name: tensor + 2**-20 for name, tensor in trainable(family.unet).items()}
    save_lora(family, tmp_path, masters)
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, master in masters.items():
        scale = ALPHA / RANK if "lora_B" in name else 1.0
        assert torch.equal(stored[f"unet.{name.replace('.default', '')}"], scale * master)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_merged_adapter_is_the_policy(request, tmp_path, name, as_folder):
    path = request.getfixturevalue(f"{name}_path")
    family = with_lora(path)
    train(family)
    file = lora_file(family, tmp_path)
    merged = make_family(path)
    keys = merged.unet.state_dict().keys()
    merge_lora(merged.pipeline, tmp_path if as_folder else file)
    torch.testing.assert_close(predict(merged), predict(family), rtol=1e-4, atol=1e-5)
    assert merged.unet.state_dict().keys() == keys
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.unet.modules())
    assert not any(parameter.requires_grad for parameter in merged.unet.parameters())
    before = predict(merged)
    add_lora(merged.unet, RANK, ALPHA)  # a new adapter may follow
    assert torch.equal(predict(merged), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once(sd15_path, tmp_path, dtype):
    family = with_lora(sd15_path)
    train(family)
    file = lora_file(family, tmp_path)
    merged = make_family(sd15_path, dtype)
    base = {key: tensor.clone() for key, tensor in merged.unet.state_dict().items()}
    merge_lora(merged.pipeline, str(file))
    lora = load_file(file)
    assert merged.unet.dtype == merged.pipeline.text_encoder.dtype == dtype
    for key, weight in merged.unet.state_dict().items():
        stem = "unet." + key.removesuffix(".weight")
        wanted = base[key].double()
        if f"{stem}.lora_A.weight" in lora:
            a, b = (lora[f"{stem}.lora_{part}.weight"].double() for part in "AB")
            wanted = wanted + b @ a
        error = (weight.double() - wanted).abs()
        assert (error <= wanted.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-7).all(), key


def test_text_encoder_part_is_merged_too(sd15_path, tmp_path):
    family = with_lora(sd15_path)
    train(family)
    state = load_file(lora_file(family, tmp_path))
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = torch.ones(RANK, 32), torch.ones(32, RANK)
    save_file(state, tmp_path / "both.safetensors")
    merged = make_family(sd15_path)
    before = merged.encode_prompts(["a red fox"])["prompt_embeds"]
    names = merged.pipeline.text_encoder.state_dict().keys()
    merge_lora(merged.pipeline, tmp_path / "both.safetensors")
    assert not torch.equal(merged.encode_prompts(["a red fox"])["prompt_embeds"], before)
    assert merged.pipeline.text_encoder.state_dict().keys() == names


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("another model's", "cannot be merged"),
        ("not a lora", "cannot be merged"),
        ("text encoder only", "no LoRA of a UNet"),
        ("garbage", "cannot be merged"),
        ("missing", "is no file"),
        ("hub", "cannot be merged"),
        ("pickle", "is a pickle"),
        ("empty folder", "holds 0 .safetensors"),
        ("two files", "holds 2 .safetensors"),
    ],
)
def test_bad_files_leave_the_model_as_it_was(sd15_path, sdxl_path, tmp_path, kind, match):
    family = with_lora(sdxl_path)
    train(family)
    file = lora_file(family, tmp_path)
    path = tmp_path / "bad.safetensors"
    if kind == "another model's":
        path = file
    elif kind == "not a lora":
        save_file({"unet.weight": torch.zeros(1)}, path)
    elif kind == "text encoder only":
        layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        save_file({f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}, path)
    elif kind == "garbage":
        path.write_bytes(b"garbage")
    elif kind == "hub":
        path = "nobody/nothing"
    elif kind == "pickle":
        path = tmp_path / "lora.bin"
    elif kind == "empty folder":
        path = tmp_path / "empty"
        path.mkdir()
    elif kind == "two files":
        path = tmp_path / "two"
        path.mkdir()
        for name in ("a.safetensors", "b.safetensors"):
            shutil.copy(file, path / name)
    model = make_family(sd15_path, torch.bfloat16)
    wanted = DiffusionPipeline.from_pretrained(sd15_path)
    with pytest.raises(BadInput, match=match) as caught:
        merge_lora(model.pipeline, path)
    assert "\n" not in str(caught.value)
    for part in ("unet", "text_encoder"):
        found, stored = getattr(model.pipeline, part).state_dict(), getattr(wanted, part).state_dict()
        assert found.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[key].bfloat16()) for key, tensor in found.items())
