"""A family that is added here alone trains, samples and is saved: nothing else asks a family for its name."""

import json

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from dpo_fast.command_line import parse
from dpo_fast.models import kinds, load
from dpo_fast.models.family import Conditioning
from dpo_fast.models.opened import settled
from dpo_fast.models.sd15 import SD15
from dpo_fast.models.source import ModelSource
from dpo_fast.training.costs import costs_of
from tests.helpers.pipelines import load_model, make_sd15
from tests.helpers.runs import STEPS, lines, train


class OtherPipeline(StableDiffusionPipeline):
    """A pipeline class that diffusers does not have."""


class Other(SD15):
    """Its prompt embeddings are halved."""

    name = "other"
    pipeline_class = OtherPipeline
    image_to_image_class = StableDiffusionImg2ImgPipeline
    text_kind = "half of the last hidden state"
    sampling_steps = 2
    usual_resolution = 80

    def _encode(self, prompts: list[str]) -> Conditioning:
        return {name: tensor / 2 for name, tensor in super()._encode(prompts).items()}


@pytest.fixture
def other(tmp_path, monkeypatch):
    """The folder of a model of the new family, which is known within the test."""
    monkeypatch.setitem(kinds.FAMILIES, "OtherPipeline", Other)
    folder = make_sd15(tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
    return folder


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_family_added_in_a_test_trains(other, pairs, tmp_path, tuning):
    flags = ["--tuning", tuning, "--run_validation", "--validation_fraction", 0.3, "--cached_reference", 2]
    out = train(other, pairs, tmp_path / "run", *flags)
    assert [line["step"] for line in lines(out)] == [*range(1, STEPS + 1)]
    assert abs(lines(out)[0]["margin"]) < 1e-2 and (out / "samples").is_dir()
    if tuning == "lora":
        assert load_file(out / "pytorch_lora_weights.safetensors")
    else:
        assert json.loads((out / "model_index.json").read_text())["_class_name"] == "OtherPipeline"
    card = (out / "README.md").read_text()
    assert f"from {__name__} import OtherPipeline\n" in card and "= OtherPipeline.from_pretrained(" in card


def test_its_usual_settings_are_those_of_every_command(other, tmp_path):
    assert load_model(other, dtype=torch.float32, device="cpu").default_resolution == 80
    source = settled(ModelSource(str(other)))
    assert (source.resolution, source.steps) == (80, 2)
    config, _ = parse(["--pretrained_model_name_or_path", str(other), "--dataset_name", "x", "--max_train_steps", "1"])
    assert costs_of(config, "cpu").resolution == 80


def test_a_hub_id_is_downloaded_by_its_own_class(other, monkeypatch):
    """diffusers looks for the class of a plain DiffusionPipeline among its own, where this one is not."""
    asked = []

    def download(cls, path, **kwargs):
        asked.append((cls, path))
        return str(other)

    monkeypatch.setattr(kinds, "hf_hub_download", lambda *args, **kwargs: str(other / "model_index.json"))
    monkeypatch.setattr(load.DiffusionPipeline, "download", classmethod(download))
    load_model("owner/name", dtype=torch.float32, device="cpu")
    assert asked == [(OtherPipeline, "owner/name")]


def test_its_own_encoding_is_used(other, sd15_path, pairs, tmp_path):
    """The same weights, but for the prompts."""
    ours = train(other, pairs, tmp_path / "other-run", "--no-cache")
    theirs = train(sd15_path, pairs, tmp_path / "sd15-run", "--no-cache")
    assert lines(ours)[-1]["loss"] != lines(theirs)[-1]["loss"]
