"""What an encoding depends on: all of it changes the recipe, and using a model does not."""

import copy
import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dpo_fast.models import image_encoding, load_family, text_encoding
from dpo_fast.models.encoding import weights_digest


@pytest.fixture(scope="module")
def family(sdxl_path):
    return load_family(sdxl_path, dtype=torch.float32, device=torch.device("cpu"))


def test_encoding_changes_nothing(family):
    before = image_encoding(family), text_encoding(family)
    family.encode_images(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 1)
    family.encode_prompts(["a prompt"])
    assert (image_encoding(family), text_encoding(family)) == before
    json.dumps(before)


def test_every_weight_counts(family):
    vae = copy.deepcopy(family.pipeline.vae)
    digests = {weights_digest(vae)}
    for tensor in list(vae.state_dict().values())[::7]:
        tensor.view(-1)[torch.randint(tensor.numel(), (1,))] += 1
        digests.add(weights_digest(vae))
    assert len(digests) == 1 + len(list(vae.state_dict())[::7])


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_the_scale_of_latents_counts(family, monkeypatch, name):
    before, vae = image_encoding(family), family.pipeline.vae
    monkeypatch.setattr(vae, "_internal_dict", type(vae.config)({**vae.config, name: 0.5}))
    assert image_encoding(family) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda rules: rules["model"]["merges"].append(["h", "i"]),
        lambda rules: rules.update(normalizer=None),
        lambda rules: rules["post_processor"].update(sep=rules["post_processor"]["cls"]),
    ],
    ids=["merges", "normalizer", "ends"],
)
def test_the_rules_of_a_tokenizer_count(family, monkeypatch, change):
    """Other tokens from the same vocabulary."""
    before, tokenizer = text_encoding(family), family.pipeline.tokenizer_2
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["vocab"]["hi"] = len(rules["model"]["vocab"])

    def with_rules() -> str:
        other = copy.deepcopy(tokenizer)
        other._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(rules))
        assert isinstance(other, PreTrainedTokenizerFast)
        monkeypatch.setattr(family.pipeline, "tokenizer_2", other)
        return text_encoding(family)["tokenizer_2"]

    plain = with_rules()
    assert plain != before["tokenizer_2"]
    change(rules)
    assert with_rules() != plain


def test_tf32_counts_on_a_gpu(family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert image_encoding(family)["dtype"] == text_encoding(family)["dtype"] == "float32"
    monkeypatch.setattr(family, "device", torch.device("cuda"))
    assert image_encoding(family)["dtype"] == text_encoding(family)["dtype"] == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert image_encoding(family)["dtype"] == "float32"
