"""The costs of a run: against counted FLOPs of the real architectures, and the text that `--dry-run` prints."""

import re

import pytest
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from dpo_fast.choices.workload import SD15, SDXL
from dpo_fast.command_line import parse
from dpo_fast.errors import BadInput
from dpo_fast.train import main
from dpo_fast.training.plan import plan, unet_costs

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


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in COUNTED])
def test_the_costs_of_the_real_architectures(name):
    unet, tuning, parameters, trained, forward, backward, saved = COUNTED[name]
    before = F.scaled_dot_product_attention
    costs = unet_costs(unet, config("--tuning", tuning, "--rank", 8), 64)
    assert costs.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert costs.trained / 1e6 == pytest.approx(trained, abs=0.05)
    assert costs.forward / 1e12 == pytest.approx(forward, rel=0.005)
    assert costs.backward / 1e12 == pytest.approx(backward, rel=0.005)
    assert costs.saved_bytes / 1e9 == pytest.approx(saved, rel=0.1)
    assert F.scaled_dot_product_attention is before


@pytest.mark.exhaustive
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_gradient_checkpointing_keeps(tuning):
    """Selective drops what is cheap to compute again and repeats no product but a LoRA's; full keeps block inputs."""
    unet = {**SD15, "block_out_channels": (64, 128, 256, 256), "attention_head_dim": 4}
    modes = ("none", "selective", "full")
    flags = ("--tuning", tuning, "--rank", 8)
    none, selective, full = (unet_costs(unet, config(*flags, "--gradient_checkpointing", m), 32) for m in modes)
    assert full.saved_bytes < 0.25 * none.saved_bytes < 0.9 * selective.saved_bytes
    assert selective.saved_bytes < {"full": 0.75, "lora": 0.9}[tuning] * none.saved_bytes
    assert none.forward == selective.forward == full.forward
    assert none.backward <= selective.backward < 1.1 * none.backward < full.backward


def lines(text: str, start: str) -> dict[str, str]:
    """The plan's lines that begin with `start`, as what they are of -> figure."""
    return {m[2]: m[1] for m in re.finditer(rf"^{start} +([\d.]+(?: [MG]iB)?)  (.*)$", text, re.MULTILINE)}


def planned(path, *flags: object) -> str:
    named = ["--pretrained_model_name_or_path", path, "--dataset_name", "d", "--train_batch_size", 2]
    return plan(parse([str(word) for word in (*named, *flags)])[0])


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def test_the_memory_of_a_full_run(sdxl_path):
    n = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(sdxl_path, subfolder="unet").parameters())
    text = planned(sdxl_path, "--tuning", "full", "--mixed_precision", "bf16", "--use_ema", "--pairs_per_step", 8)
    assert f"parameters        {n:,} in the UNet, {n:,} trained" in text
    assert "a step            8 pairs at 64 x 64" in text
    memory = lines(text, "memory")
    expected = {
        "UNet weights": 2 * n,
        "fp32 masters": 4 * n,
        "gradients": 6 * n,
        "optimizer state": 8 * n,
        "EMA": 4 * n,
        "reference": 2 * n,
    }
    assert {name: memory[name] for name in expected} == {name: mib(value) for name, value in expected.items()}
    total = sum(float(size.split()[0]) for name, size in memory.items() if not name.startswith("in all"))
    assert float(memory["in all, without VAE and text encoders"].split()[0]) == pytest.approx(total, abs=0.5)
    disk = lines(text, "disk")
    assert disk == {"a checkpoint": mib(16 * n), "the result": mib(4 * n)}


def test_what_is_not_needed_costs_nothing(sd15_path):
    full, lora, precise = (
        planned(sd15_path, "--tuning", tuning, "--mixed_precision", precision, "--rank", 4)
        for tuning, precision in (("full", "fp16"), ("lora", "fp16"), ("full", "no"))
    )
    assert lines(full, "memory")["UNet weights"] == lines(lora, "memory")["UNet weights"]
    assert lines(lora, "memory")["reference"] == "0.0 MiB" != lines(full, "memory")["reference"]
    small, large = (float(lines(text, "disk")["the result"].split()[0]) for text in (lora, full))
    assert small < 0.2 * large
    in_fp32 = lines(precise, "memory")  # the weights are the masters
    assert in_fp32["fp32 masters"] == "0.0 MiB" and in_fp32["gradients"] == in_fp32["UNet weights"] != "0.0 MiB"


def tflop(text: str) -> float:
    return float(re.search(r"^UNet FLOPs a step +([\d.]+)", text, re.MULTILINE)[1])


def test_the_flops_of_a_step_count_every_pass(sd15_path):
    size = ["--resolution", 512, "--tuning", "full"]
    unet = UNet2DConditionModel.load_config(sd15_path, subfolder="unet")

    def costs_with(*flags: str):
        named = ["--pretrained_model_name_or_path", str(sd15_path), "--dataset_name", "d", *map(str, size), *flags]
        return unet_costs(unet, parse(named)[0], 64)

    costs, again = costs_with(), costs_with("--gradient_checkpointing")
    assert again.forward == costs.forward
    assert 0.5 * costs.forward < again.backward - costs.backward < costs.forward  # the blocks, not what is around them
    passes = {
        (): 2 * costs.forward + costs.backward,
        ("--objective", "sft"): costs.forward + costs.backward,
        ("--gradient_checkpointing",): 2 * costs.forward + again.backward,
    }
    for flags, flops in passes.items():
        text = planned(sd15_path, *size, "--gradient_accumulation_steps", 32, *flags)
        assert tflop(text) == pytest.approx(2 * 64 * flops / 1e12, abs=6e-4)
        assert ("reference forward" in text) == (flags != ("--objective", "sft"))
        assert ("recompu" in text) == (flags == ("--gradient_checkpointing",))


def test_a_dry_run_prints_the_plan_and_makes_nothing(sdxl_path, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--pretrained_model_name_or_path", sdxl_path, "--dataset_name", "d", "--output_dir", out, "--dry-run"]
    assert main([str(flag) for flag in flags]) == 0
    assert "memory" in capsys.readouterr().out and not out.exists()


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"has no model_index\.json"):
        planned(tmp_path)


def test_a_cached_reference_takes_no_memory_and_no_forward_pass(sdxl_path):
    full = ["--tuning", "full", "--max_train_steps", 100]
    online, cached = planned(sdxl_path, *full), planned(sdxl_path, *full, "--cached_reference", 4)
    assert lines(online, "memory")["reference"] != "0.0 MiB" and lines(cached, "memory")["reference"] == "0.0 MiB"
    assert "reference forward" in online and "reference forward" not in cached
    assert mib(8 * 4 * 200) in cached
