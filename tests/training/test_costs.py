"""The costs of a run: against counted FLOPs of the real architectures, and part by part on small pipelines."""

import json
import shutil

import pytest
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dpo_fast.choices.workload import SD15, SDXL
from dpo_fast.command_line import parse
from dpo_fast.errors import BadInput
from dpo_fast.models.lora import add_lora
from dpo_fast.training.costs import Costs, costs_of, unet_flops, unet_size

# At 512 pixels, an image: parameters (millions), forward and backward (TFLOP, attention's backward 2.5 times its
# forward), activations kept (GB in bf16). Counted operator by operator, independently of this package.
COUNTED = {
    "sd15 full": (SD15, "full", 859.5, 859.5, 0.803, 1.667, 0.93),
    "sd15 lora": (SD15, "lora", 859.5, 1.594, 0.806, 0.975, 0.80),
    "sdxl full": (SDXL, "full", 2567.5, 2567.5, 1.589, 3.152, 1.74),
    "sdxl lora": (SDXL, "lora", 2567.5, 11.612, 1.594, 1.582, 1.42),
}
SLOW = {"sdxl full": pytest.mark.slow, "sdxl lora": pytest.mark.exhaustive}


def config(*flags: object):
    named = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--mixed_precision", "bf16"]
    return parse([*named, *map(str, flags)])[0]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in COUNTED])
def test_the_costs_of_the_real_architectures(name):
    unet, tuning, parameters, trained, forward, backward, saved = COUNTED[name]
    before = F.scaled_dot_product_attention
    asked = unet, config("--tuning", tuning, "--rank", 8), 64
    size, flops = unet_size(*asked), unet_flops(*asked)
    assert size.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert size.trained / 1e6 == pytest.approx(trained, abs=0.05)
    assert flops.forward / 1e12 == pytest.approx(forward, rel=0.005)
    assert flops.backward / 1e12 == pytest.approx(backward, rel=0.005)
    assert size.saved_bytes / 1e9 == pytest.approx(saved, rel=0.1)
    assert F.scaled_dot_product_attention is before


@pytest.mark.drawn(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_gradient_checkpointing_keeps(tuning):
    """Selective drops what is cheap to compute again and repeats no product but a LoRA's; full keeps block inputs."""
    unet = {**SD15, "block_out_channels": (64, 128, 256, 256), "attention_head_dim": 4}
    flags = ("--tuning", tuning, "--rank", 8)
    asked = [(unet, config(*flags, "--gradient_checkpointing", m), 32) for m in ("none", "selective", "full")]
    none, selective, full = (unet_size(*one).saved_bytes for one in asked)
    assert full < 0.25 * none < 0.9 * selective
    assert selective < {"full": 0.75, "lora": 0.9}[tuning] * none
    none, selective, full = (unet_flops(*one) for one in asked)
    assert none.forward == selective.forward == full.forward
    assert none.backward <= selective.backward < 1.1 * none.backward < full.backward


def costs(path, *flags: object, device: str = "cuda") -> Costs:
    named = ["--pretrained_model_name_or_path", path, "--dataset_name", "d", "--train_batch_size", 2]
    return costs_of(parse([str(word) for word in (*named, *flags)])[0], device)


def parameters(kind: type, path, part: str) -> int:
    return sum(p.numel() for p in kind.from_pretrained(path, subfolder=part).parameters())


def test_the_memory_and_the_disk_of_a_full_run(sdxl_path):
    n = parameters(UNet2DConditionModel, sdxl_path, "unet")
    found = costs(sdxl_path, "--tuning", "full", "--mixed_precision", "bf16", "--use_ema")
    assert found.resolution == 64 and (found.unet.parameters, found.unet.trained) == (n, n)
    assert found.unet.ranks == ()
    activations = found.memory.pop("activations of 2 pairs")
    assert activations == 4 * found.unet.saved_bytes > 0
    assert found.memory == {
        "UNet weights": 2 * n,
        "fp32 masters": 4 * n,
        "gradients": 6 * n,
        "optimizer state": 8 * n,
        "EMA": 4 * n,
        "reference": 2 * n,
    }
    vae = parameters(AutoencoderKL, sdxl_path, "vae")
    text = parameters(CLIPTextModel, sdxl_path, "text_encoder")
    text += parameters(CLIPTextModelWithProjection, sdxl_path, "text_encoder_2")
    assert found.checkpoint == 16 * n and found.result == 4 * (n + vae + text)
    assert found.loading == 4 * n + 4 * vae + 2 * text


def test_what_is_not_needed_costs_nothing(sd15_path):
    full, lora, precise = (
        costs(sd15_path, "--tuning", tuning, "--mixed_precision", precision, "--rank", 4)
        for tuning, precision in (("full", "fp16"), ("lora", "fp16"), ("full", "no"))
    )
    assert full.memory["UNet weights"] == lora.memory["UNet weights"]
    assert lora.memory["reference"] == 0 < full.memory["reference"]
    assert lora.result < 0.2 * full.result and lora.result == 2 * 4 * lora.unet.trained  # two formats
    # in fp32 the weights are the masters
    assert precise.memory["fp32 masters"] == 0 and precise.memory["gradients"] == precise.memory["UNet weights"]
    cached = costs(sd15_path, "--tuning", "full", "--cached_reference", 4)
    assert cached.memory["reference"] == 0


@pytest.mark.parametrize(
    ("flags", "device", "held"),
    [
        ([], "cuda", False),
        ([], "cpu", False),
        (["--no-cache"], "cuda", True),
        (["--run_validation"], "cuda", True),
        (["--tuning", "full"], "cuda", False),
        (["--tuning", "full"], "cpu", True),  # the result is a pipeline, and they wait for it in the host's memory
    ],
)
def test_the_encoders_count_where_a_run_keeps_them(sd15_path, flags, device, held):
    vae, text = parameters(AutoencoderKL, sd15_path, "vae"), parameters(CLIPTextModel, sd15_path, "text_encoder")
    found = costs(sd15_path, "--mixed_precision", "fp16", *flags, device=device)
    assert found.memory.get("VAE and text encoders") == (4 * vae + 2 * text if held else None)
    assert found.needed == max(sum(found.memory.values()), found.loading)


@pytest.mark.parametrize("targets", [["to_q", "to_k"], ["conv1", "proj_in"]])
def test_the_rank_that_each_adapted_layer_has_room_for(sdxl_path, targets):
    unet = UNet2DConditionModel.from_pretrained(sdxl_path, subfolder="unet")
    names = [name for name, _ in unet.named_modules() if name.split(".")[-1] in targets]
    expected = sorted(min(w.flatten(1).shape) for w in (unet.get_submodule(name).weight for name in names))
    found = costs(sdxl_path, "--lora_targets", *targets)
    assert sorted(found.unet.ranks) == expected and len(expected) > 3
    add_lora(unet, 4, 4, targets)
    assert found.unet.trained == sum(p.numel() for p in unet.parameters() if p.requires_grad)


def test_a_model_or_a_target_that_is_not_there_is_refused(sd15_path, tmp_path):
    with pytest.raises(BadInput, match=r"has no model_index\.json"):
        costs(tmp_path)
    with pytest.raises(BadInput, match="LoRA target 'to_qq' names no module"):
        costs(sd15_path, "--lora_targets", "to_qq")


def test_a_text_encoder_whose_size_is_no_number_is_refused(sd15_path, tmp_path):
    model = shutil.copytree(sd15_path, tmp_path / "model")
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(BadInput, match="configuration of a text encoder cannot be used"):
        costs(model)
