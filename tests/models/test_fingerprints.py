"""What an encoding depends on: all of it changes the recipe, and using a model does not."""

import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerFast

from dpo_fast.models import latents_recipe_facts, reference_recipe_facts, text_recipe_facts
from dpo_fast.models.fingerprints import weights_digest
from dpo_fast.store import Field, Recipe
from tests.helpers.pipelines import load_model, make_sdxl
from tests.helpers.single_file import write_single_file


@pytest.fixture(scope="module")
def family(sdxl_path):
    return load_model(sdxl_path, dtype=torch.float32, device=torch.device("cpu"))


def test_encoding_changes_nothing(family):
    before = latents_recipe_facts(family), text_recipe_facts(family)
    family.encode_images(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 1)
    family.encode_prompts(["a prompt"])
    assert (latents_recipe_facts(family), text_recipe_facts(family)) == before
    json.dumps(before)


def test_every_weight_counts(family):
    vae = copy.deepcopy(family.pipeline.vae)
    digests = {weights_digest(vae)}
    for tensor in list(vae.state_dict().values())[::7]:
        tensor.view(-1)[torch.randint(tensor.numel(), (1,))] += 1
        digests.add(weights_digest(vae))
    assert len(digests) == 1 + len(list(vae.state_dict())[::7])


def changed(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return f"other-{value}"
    if isinstance(value, (list, tuple)):
        return [*value, *value[-1:]]
    return value + 1


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_every_setting_of_a_model_counts_but_those_that_change_nothing(family, monkeypatch, part):
    """Whatever the library adds counts too."""
    module, account = (
        getattr(family.pipeline, part),
        {"vae": latents_recipe_facts, "unet": reference_recipe_facts}[part],
    )
    before, silent = account(family), set()
    for name, value in {**module.config, "new_setting": 1}.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, "_internal_dict", type(module.config)({**module.config, name: changed(value)}))
            if account(family) == before:
                silent.add(name)
    names = {name for name in module.config if name.startswith("_")}
    assert silent == names | {"sample_size"} | ({"force_upcast"} if part == "vae" else set())
    json.dumps(before, allow_nan=False)


def test_every_setting_of_a_text_encoder_counts_but_those_that_change_nothing(family, monkeypatch):
    encoder = family.pipeline.text_encoder_2
    before, silent = text_recipe_facts(family), set()
    for name, value in encoder.config.to_dict().items():
        other = copy.deepcopy(encoder.config)
        if name in ("id2label", "label2id", "dtype", "output_attentions", "problem_type"):  # which the library checks
            continue
        setattr(other, name, changed(value))
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "config", other)
            if text_recipe_facts(family) == before:
                silent.add(name)
    counted = {"vocab_size", "hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id", "projection_dim"}
    assert not silent & counted and silent >= {"initializer_range", "transformers_version", "architectures"}
    monkeypatch.setattr(encoder.config, "use_attention_mask", True, raising=False)
    assert text_recipe_facts(family) != before


def test_statistics_of_latents_count(sdxl_path, tmp_path):
    paths = [sdxl_path]
    for number, mean in enumerate((0.0, 0.5)):
        vae = {"latents_mean": [mean] * 4, "latents_std": [1.0] * 4}
        paths.append(make_sdxl(tmp_path / str(number), vae=vae))
    accounts = [latents_recipe_facts(load_model(path, dtype=torch.float32, device="cpu")) for path in paths]
    assert accounts[0]["vae"] == accounts[1]["vae"] == accounts[2]["vae"]  # the weights are the same
    assert accounts[0] != accounts[1] != accounts[2]
    assert Recipe("latents", accounts[1], (Field("latents", (4, 8, 8)),)).differences(
        Recipe("latents", accounts[2], (Field("latents", (4, 8, 8)),)).as_json()
    ) == ["facts.vae_config.latents_mean: [0.0, 0.0, 0.0, 0.0] -> [0.5, 0.5, 0.5, 0.5]"]


@pytest.mark.parametrize("kind", ["single file", "saved again"])
def test_one_model_has_one_recipe_wherever_it_is_read_from(sdxl_path, family, tmp_path, kind):
    accounts = latents_recipe_facts, text_recipe_facts, reference_recipe_facts
    if kind == "single file":
        path = write_single_file(DiffusionPipeline.from_pretrained(sdxl_path), tmp_path / "model.safetensors")
        other = load_model(path, dtype=torch.float32, device="cpu", single_file_config=sdxl_path)
    else:
        family.pipeline.save_pretrained(tmp_path / "saved")
        other = load_model(tmp_path / "saved", dtype=torch.float32, device="cpu")
    assert [account(other) for account in accounts] == [account(family) for account in accounts]


@pytest.mark.parametrize("setting", ["model_max_length", "padding_side", "truncation_side", "pad_token", "unk_token"])
def test_the_settings_of_a_tokenizer_count(family, monkeypatch, setting):
    before, other = text_recipe_facts(family), copy.deepcopy(family.pipeline.tokenizer_2)
    value = {"model_max_length": 76, "padding_side": "left", "truncation_side": "left"}.get(setting, "a</w>")
    setattr(other, setting, value)
    monkeypatch.setattr(family.pipeline, "tokenizer_2", other)
    assert text_recipe_facts(family)["tokenizer_2"] != before["tokenizer_2"]


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
    before, tokenizer = text_recipe_facts(family), family.pipeline.tokenizer_2
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["vocab"]["hi"] = len(rules["model"]["vocab"])

    def with_rules() -> str:
        other = copy.deepcopy(tokenizer)
        other._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(rules))
        assert isinstance(other, PreTrainedTokenizerFast)
        monkeypatch.setattr(family.pipeline, "tokenizer_2", other)
        return text_recipe_facts(family)["tokenizer_2"]

    plain = with_rules()
    assert plain != before["tokenizer_2"]
    change(rules)
    assert with_rules() != plain


def test_tf32_counts_on_a_gpu(family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert latents_recipe_facts(family)["dtype"] == text_recipe_facts(family)["dtype"] == "float32"
    monkeypatch.setattr(family, "device", torch.device("cuda"))
    assert latents_recipe_facts(family)["dtype"] == text_recipe_facts(family)["dtype"] == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert latents_recipe_facts(family)["dtype"] == "float32"
