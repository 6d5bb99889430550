"""The model card: the hub's metadata, the table, code that loads the result, and no secrets."""

import ast
import re
import shlex

import pytest
import yaml

from dpo_fast.card import model_card
from dpo_fast.config import TrainConfig, public

SUMMARY = {"steps": 12, "loss_first": 0.693147, "loss_last": 0.5, "implicit_accuracy": None}
COUNTS = {"rows": 100, "ties_dropped": 3, "bad_rows": 0}


def card(family: str = "sdxl", argv: tuple[str, ...] = (), scheduler: tuple | None = None, **settings) -> str:
    filled = dict(
        pretrained_model_name_or_path="owner/base",
        dataset_name="owner/pairs",
        mixed_precision="bf16",
        beta_dpo=5000.0,
        pairs_per_step=8,
    )
    return model_card(public(TrainConfig(**filled | settings)), SUMMARY, COUNTS, family, list(argv), scheduler)


def metadata(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.DOTALL)[1])


def code(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(block)
    return block


def table(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", text, re.MULTILINE))


def test_the_scheduler_that_was_trained():
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    block = code(card("sd15", scheduler=("DDIMScheduler", changes)))
    assert block.splitlines()[0] == "from diffusers import DDIMScheduler, StableDiffusionPipeline"
    assert block.splitlines()[-1] == (
        "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True,"
        " timestep_spacing='trailing')"
    )
    assert "scheduler" not in code(card("sd15", scheduler=("DDIMScheduler", changes), tuning="full"))  # saved with it
    assert "scheduler" not in code(card("sd15"))


def test_a_lora_of_hub_models_and_pairs():
    text = card(rank=8, lora_alpha=4.0, hub_model_id="me/aligned", init_lora="owner/style")
    assert metadata(text) == {
        "base_model": "owner/base",
        "datasets": ["owner/pairs"],
        "library_name": "diffusers",
        "tags": ["text-to-image", "diffusers", "diffusion-dpo", "lora"],
    }
    assert code(text).splitlines()[-2:] == [
        "pipeline = StableDiffusionXLPipeline.from_pretrained('owner/base')",
        "pipeline.load_lora_weights('me/aligned')",
    ]
    rows = table(text)
    assert rows["tuning"] == "LoRA, rank 8, alpha 4.0"
    assert rows["base model"] == "owner/base with the LoRA owner/style merged: load that first"
    assert rows["pairs"] == "owner/pairs: rows 100, ties dropped 3, bad rows 0"
    assert rows["objective"] == "dpo, beta 5000" and rows["steps"] == "12 of 8 pairs"
    assert rows["compute dtype"] == "bf16, masters fp32"
    assert rows["loss"] == "0.6931 at first, 0.5000 at last" and rows["implicit accuracy"] == "none"


def test_a_whole_pipeline():
    text = card("sd15", tuning="full", mixed_precision="no", scale_lr=True, learning_rate=1e-8)
    assert "lora" not in metadata(text)["tags"]
    assert "from diffusers import StableDiffusionPipeline\n" in code(text)
    assert code(text).splitlines()[-1] == "pipeline = StableDiffusionPipeline.from_pretrained('FOLDER')"
    rows = table(text)
    assert rows["tuning"] == "full UNet" and rows["compute dtype"] == "fp32, masters fp32"
    assert rows["learning rate"] == "1e-08 x pairs a step"


def test_local_paths_stay_out_of_the_metadata(tmp_path):
    """The hub refuses a card whose base model or data set is none of its own."""
    file = tmp_path / "base.safetensors"
    file.touch()
    text = card(pretrained_model_name_or_path=str(file), dataset_name=str(tmp_path))
    assert {"base_model", "datasets"}.isdisjoint(metadata(text))
    assert f"from_single_file('{file}')" in code(text)
    assert str(tmp_path) in table(text)["pairs"]


@pytest.mark.parametrize("flag", [["--hub_token", "s3cret"], ["--hub-token", "s3cret"], ["--hub_token=s3cret"]])
def test_the_command_is_shown_without_the_token(flag):
    text = card(argv=("--seed", "1", *flag, "--validation_prompts", "a cat's hat"))
    assert "s3cret" not in text
    (command,) = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    shown = ["python", "-m", "dpo_fast.train", "--seed", "1", "--validation_prompts", "a cat's hat"]
    assert shlex.split(command) == shown
