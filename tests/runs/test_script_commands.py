"""The three commands of the README of diffusers' DPO scripts, after replacing the script's name.

Hub names stand for local pipelines and pairs here, and the numbers are made small; every other flag is as published.
"""

import shlex
import subprocess
import sys

import pytest

from dpo_fast.command_line import parse
from tests.helpers.runs import environment, lines

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
TURBO = SDXL.replace("stable-diffusion-xl-base-1.0", "sdxl-turbo").replace("sdxl-dpo", "sdxl-turbo-dpo")
TURBO = TURBO.replace("--push_to_hub", "--is_turbo --resolution 512 --push_to_hub")


# A process of its own for each command, as users run them (wandb keeps its folder for the life of a process); the hub,
# which is out of reach, is replaced by a print.
RUN = """
import sys
from dpo_fast.training import hub
from dpo_fast.train import main
hub.check_login = lambda token: "somebody"
hub.push = lambda folder, repository, token: print("UPLOADED", folder) or "https://hub"
sys.exit(main())
"""


COMMANDS = {"sd15": SD, "sdxl": SDXL, "turbo": TURBO}


@pytest.mark.parametrize("family", COMMANDS)
def test_a_published_command_is_understood(family):
    config, notes = parse(shlex.split(COMMANDS[family]))
    assert (
        config.tuning == "lora" and config.objective == "dpo" and config.max_train_steps and config.report_to == "wandb"
    )
    assert all("does nothing here" in note for note in notes)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", COMMANDS)
def test_the_published_command_runs(request, pairs, tmp_path, family):
    model = request.getfixturevalue(f"{family}_path")
    small = {
        "pretrained_model_name_or_path": model,
        "pretrained_vae_model_name_or_path": model,
        "dataset_name": pairs,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "validation_steps": 1,
    }
    flags = []
    for word in shlex.split(COMMANDS[family].replace("--resolution 512", "--resolution=512")):
        name = word.lstrip("-").split("=")[0]
        flags.append(f"--{name}={small[name]}" if name in small else word)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *flags],
        cwd=tmp_path,
        env=environment(WANDB_MODE="offline", WANDB_SILENT="true"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (uploaded,) = [line for line in done.stdout.splitlines() if line.startswith("UPLOADED")]
    out = tmp_path / uploaded.split()[1]
    assert (out / "pytorch_lora_weights.safetensors").is_file() and (out / "samples" / "step-2.png").is_file()
    assert [line["step"] for line in lines(out)] == [1, 2]
    assert lines(out)[0]["margin"] == 0.0
    assert list((out / "logs").rglob("*.wandb"))
