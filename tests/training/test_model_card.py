"""The model card: the hub's metadata, the table, code that loads the result, and no secrets."""

import ast
import os
import re
import shlex
import subprocess

import pytest
import yaml
from huggingface_hub import ModelCard

from dpo_fast.config import TrainConfig, public
from dpo_fast.hub_revisions import public_name, public_names
from dpo_fast.training.model_card import model_card

SUMMARY = {"steps": 12, "loss_first": 0.693147, "loss_last": 0.5, "implicit_accuracy": None}
COUNTS = {"rows": 100, "ties_dropped": 3, "bad_rows": 0}


def card(
    family: str = "sdxl",
    argv: tuple[str, ...] = (),
    scheduler: tuple | None = None,
    summary: dict | None = None,
    **settings,
) -> str:
    filled = dict(
        pretrained_model_name_or_path="owner/base",
        dataset_name="owner/pairs",
        mixed_precision="bf16",
        beta_dpo=5000.0,
        pairs_per_step=8,
    )
    config = public(TrainConfig(**filled | settings))
    pipeline = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    return model_card(config, SUMMARY | (summary or {}), COUNTS, pipeline, list(argv), scheduler)


def metadata(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.DOTALL)[1])


def code(text: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
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
        "base_model_relation": "adapter",
        "datasets": ["owner/pairs"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
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
    assert "lora" not in metadata(text)["tags"] and metadata(text)["base_model_relation"] == "finetune"
    assert "from diffusers import StableDiffusionPipeline\n" in code(text)
    assert code(text).splitlines()[-1] == "pipeline = StableDiffusionPipeline.from_pretrained('FOLDER')"
    rows = table(text)
    assert rows["tuning"] == "full UNet" and rows["compute dtype"] == "fp32, masters fp32"
    assert rows["learning rate"] == "1e-08 x pairs a step"


def test_local_paths_stay_out_of_the_card(tmp_path):
    """The hub refuses a card whose base model or data set is none of its own, and a path says who wrote it."""
    file = tmp_path / "base.safetensors"
    file.touch()
    flags = ("--dataset_name", str(tmp_path), f"--output_dir={tmp_path}/run", "--init_lora", "~/style")
    names = {"pretrained_model_name_or_path": str(file), "dataset_name": str(tmp_path), "init_lora": f"{tmp_path}/it"}
    text = card(argv=(*flags, "--prompt", "/imagine a cat"), **names)
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(metadata(text))
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    assert "from_single_file('base.safetensors')" in code(text)
    assert table(text)["pairs"].startswith(f"{tmp_path.name}: rows")
    shown = f"--dataset_name {tmp_path.name} --output_dir=run --init_lora style --prompt '/imagine a cat'"
    assert f"python -m dpo_fast.train {shown}\n" in text


@pytest.mark.parametrize(
    "name", ["C:\\Users\\me\\base", "\\\\server\\share\\base", "//home/me/base", "~/base", "/a/../base"]
)
def test_paths_of_any_system(name):
    assert public_name(name) == "base"
    assert "/home" not in card(pretrained_model_name_or_path=name) and "Users" not in card(dataset_name=name)


def test_places_of_one_name_are_told_apart():
    assert public_names([("/a/model", "1"), ("/b/model", "2"), ("o/n", "3")]) == {
        "model": "1",
        "model (2)": "2",
        "o/n": "3",
    }


HOSTILE = [
    "a\n---\nlicense: mit\ntags: [x]\n---\n# Owned",
    "a\r\n\r\n<script>alert(1)</script>",
    "x | y |\n| z | w |",
    "![](https://example.org/pixel.png)",
    "[click](javascript:alert(1))",
    "```\n<img src=x onerror=alert(1)>\n```",
    "`` ``` `code` ~~~",
    "{{ 7 * 7 }} {% raw %} !!python/object/apply:os.system ['id']",
    "a: &b [*b] # comment",
    "www.example.org https://example.org me@example.org",
    "\x1b[31mred\x07\x00\u202e\u2028\udcff",
    "> quote\n- list\n1. one\n=====",
    "'; import os; os.system('id') #",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "field", ["pretrained_model_name_or_path", "dataset_name", "init_lora", "hub_model_id", "argv", "all"]
)
def test_no_name_injects_into_the_card(name, field):
    """The card with a hostile name has the metadata, the headings and the blocks of one with a plain name."""
    fields = ["pretrained_model_name_or_path", "dataset_name", "init_lora", "hub_model_id", "argv"]
    fields = fields if field == "all" else [field]

    def with_name(value: str) -> str:
        changed = {one: value for one in fields if one != "argv"}
        summary = {"validation_accuracy": 0.5}
        return card(argv=("--prompt", value) if "argv" in fields else (), summary=summary, **changed)

    text, plain = with_name(name), with_name("plain name")
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode()  # no half of a surrogate pair
    keys = {"base_model", "base_model_relation", "datasets"}
    assert metadata(text).keys() | keys == metadata(plain).keys() | keys and "license" not in metadata(text)
    assert metadata(text)["tags"] == metadata(plain)["tags"]
    structure = [
        re.findall(r"^(?:#+|`{3,}|~{3,}|\|(?=[^|]* \|)|---|>|- |=+$)", one, re.M) for one in (body(text), body(plain))
    ]
    assert structure[0] == structure[1]
    outside = re.sub(r"^```.*?^```$", "", body(text), flags=re.DOTALL | re.M)
    assert not re.search(r"<\w|(?<!\\)!\[|(?<!\\)`|https?://(?!arxiv)|www\.|\w@\w", outside)
    assert re.findall(r"(?<!\\)\]\(", outside) == ["]("]  # the one of the paper
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in re.findall(r"^\|.*$", outside, re.M))
    code(text)
    if "argv" in fields:
        (command,) = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
        if name.encode(errors="surrogateescape").find(b"\0") < 0:
            echo = ["bash", "-c", f"printf %s {command.split(' --prompt ', 1)[1]}"]
            run = subprocess.run(echo, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=True)
            assert run.stdout == name.encode(errors="surrogateescape")  # one word, as it was given


def body(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)


def test_results_are_for_the_hub_to_read():
    text = card(summary={"validation_accuracy": 0.71234})
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_value, result.dataset_type, result.task_type) == (0.7123, "owner/pairs", "text-to-image")
    assert result.metric_name == "Implicit accuracy on pairs held out"
    assert "model-index" not in metadata(card())


def test_the_licence_is_that_of_the_base_model(tmp_path):
    assert metadata(card(pretrained_model_name_or_path="stabilityai/sdxl-turbo"))["license_name"] == "sai-nc-community"
    assert "license" not in metadata(card())
    readme, base = tmp_path / "README.md", {"pretrained_model_name_or_path": str(tmp_path)}
    readme.write_text("---\nlicense: openrail++\ntags: [a]\n---\n# A model\n")
    assert metadata(card(**base))["license"] == "openrail++"
    for block in (
        "license: |\n  a\n  b",
        "license: [mit]",
        "license: !!python/object/apply:os.system [id]",
        "license: 'm i t'",
        "license_name: x",
        "[" * 5000,
    ):
        readme.write_text(f"---\n{block}\n---\n")
        assert "license" not in metadata(card(**base)) and "license_name" not in metadata(card(**base))
    readme.write_bytes(b"---\nlicense: \xff\n---\n")
    assert "license" not in metadata(card(**base))


@pytest.mark.parametrize("flag", [["--hub_token", "s3cret"], ["--hub-token", "s3cret"], ["--hub_token=s3cret"]])
def test_the_command_is_shown_without_the_token(flag):
    text = card(argv=("--seed", "1", *flag, "--validation_prompts", "a cat's hat"))
    assert "s3cret" not in text
    (command,) = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    shown = ["python", "-m", "dpo_fast.train", "--seed", "1", "--validation_prompts", "a cat's hat"]
    assert shlex.split(command) == shown
