"""The three commands of the README of diffusers' DPO scripts, after replacing the script's name.

Hub names stand for local pipelines and pairs here, and the numbers are made small; every other flag is as published.
"""

import shlex

import pytest

from dpo_fast import hub
from dpo_fast.train import main
from tests.helpers.runs import lines

SD = """
  --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5  \
  --output_dir="diffusion-dpo" \
  --mixed_precision="fp16" \
  --dataset_name=kashif/pickascore \
  --resolution=512 \
  --train_batch_size=16 \
  --gradient_accumulation_steps=2 \
  --gradient_checkpointing \
  --use_8bit_adam \
  --rank=8 \
  --learning_rate=1e-5 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=10000 \
  --checkpointing_steps=2000 \
  --run_validation --validation_steps=200 \
  --seed="0" \
  --report_to="wandb" \
  --push_to_hub
"""
SDXL = """
  --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0  \
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix \
  --output_dir="diffusion-sdxl-dpo" \
  --mixed_precision="fp16" \
  --dataset_name=kashif/pickascore \
  --train_batch_size=8 \
  --gradient_accumulation_steps=2 \
  --gradient_checkpointing \
  --use_8bit_adam \
  --rank=8 \
  --learning_rate=1e-5 \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --max_train_steps=2000 \
  --checkpointing_steps=500 \
  --run_validation --validation_steps=50 \
  --seed="0" \
  --report_to="wandb" \
  --push_to_hub
"""
TURBO = SDXL.replace("stable-diffusion-xl-base-1.0", "sdxl-turbo").replace("diffusion-sdxl-dpo", "diffusion-sdxl-turbo-dpo")
TURBO = TURBO.replace("--push_to_hub", "--is_turbo --resolution 512 --push_to_hub")


@pytest.mark.parametrize(("family", "text"), [("sd15", SD), ("sdxl", SDXL), ("turbo", TURBO)])
def test_the_published_command_runs(request, pairs, tmp_path, monkeypatch, family, text):
    model = request.getfixturevalue(f"{family}_path")
    uploads = []
    monkeypatch.setattr(hub, "check_login", lambda token: "somebody")
    monkeypatch.setattr(hub, "push", lambda folder, repository, token: uploads.append(folder) or "https://hub")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    small = {
        "pretrained_model_name_or_path": model,
        "pretrained_vae_model_name_or_path": model,
        "dataset_name": pairs,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "validation_steps": 1,
    }
    words, flags = shlex.split(text.replace("--resolution 512", "--resolution=512")), []
    for word in words:
        name = word.lstrip("-").split("=")[0]
        flags.append(f"--{name}={small[name]}" if name in small else word)
    if family == "sdxl":  # the script's own default, 1024 px, is the model's; this model is small
        flags.append("--resolution=64")
    assert main(flags) == 0
    (out,) = uploads
    assert (out / "pytorch_lora_weights.safetensors").is_file() and (out / "samples" / "step-2.png").is_file()
    assert [line["step"] for line in lines(out)] == [1, 2]
    assert lines(out)[0]["margin"] == 0.0
    assert list((out / "logs").rglob("*.wandb"))
