"""Hostile models are refused in one line before a library loads anything, and none of their code runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

from dpo_fast.errors import BadInput
from dpo_fast.models import merge_lora
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.opened import OneAtATime
from dpo_fast.models.source import ModelSource
from dpo_fast.models.untrusted import check_part, check_pipeline, check_settings
from dpo_fast.scorers import load_scorer
from dpo_fast.scorers.clip_models import VIT_L
from dpo_fast.train import main
from tests.helpers import hostile
from tests.helpers.pipelines import load_model
from tests.helpers.runs import flags_for
from tests.helpers.scorer_files import write_all
from tests.helpers.single_file import write_single_file

FP32 = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What hostile code would create; the module that has it can be imported."""
    monkeypatch.delitem(sys.modules, hostile.MODULE, raising=False)
    monkeypatch.syspath_prepend(hostile.folder_of_modules(tmp_path / "modules", tmp_path / "marker"))
    return tmp_path / "marker"


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_, **__):
        raise AssertionError("a library was asked to load something")

    for kind in (DiffusionPipeline, AutoencoderKL, UNet2DConditionModel, PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "from_pretrained", loaded)
    for kind in (StableDiffusionPipeline, AutoencoderKL, UNet2DConditionModel):
        monkeypatch.setattr(kind, "from_single_file", loaded)


def refusal(capfd, flags: list[str]) -> str:
    """The one line with which training refuses these flags."""
    capfd.readouterr()
    assert main(flags) == 2
    error = capfd.readouterr().err
    (line,) = [text for text in error.replace("\r", "\n").splitlines() if text.startswith("dpo_fast: error: ")]
    assert "Traceback" not in error and len(line) < 1000
    return line


def test_the_code_would_leave_its_mark(marker):
    """Else no test below could fail."""
    __import__(hostile.MODULE)
    assert marker.exists()
    marker.unlink()
    bomb = marker.parent / "bomb"
    bomb.write_bytes(hostile.pickle.dumps(hostile.Bomb(marker)))
    hostile.pickle.loads(bomb.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("kind", hostile.PIPELINES)
def test_pipelines(sd15_path, pairs, tmp_path, marker, nothing_loads, capfd, kind):
    model = Path(shutil.copytree(sd15_path, tmp_path / "model"))
    hostile.PIPELINES[kind](model, marker)
    assert str(model) in refusal(capfd, flags_for(model, pairs, tmp_path / "out"))
    assert not marker.exists() and not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("kind", hostile.VAES)
def test_vaes(sd15_path, tmp_path, marker, kind):
    model = Path(shutil.copytree(sd15_path / "vae", tmp_path / "vae"))
    hostile.VAES[kind](model, marker)
    with pytest.raises(BadInput) as caught:
        load_model(sd15_path, vae_path=model, **FP32)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not marker.exists()


@pytest.fixture(scope="module")
def scorer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    write_all(folder)
    return folder


@pytest.mark.parametrize("kind", hostile.CLIPS)
def test_scorers(scorer_files, tmp_path, marker, nothing_loads, kind):
    folder = Path(shutil.copytree(scorer_files / VIT_L, tmp_path / VIT_L))
    hostile.CLIPS[kind](folder, marker)
    with pytest.raises(BadInput, match=VIT_L) as caught:
        load_scorer("clip", where=tmp_path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_scorer_whose_tokenizer_is_of_a_class_of_its_own(scorer_files, tmp_path, marker):
    """The class is not read: that of the published model is taken."""
    folder = Path(shutil.copytree(scorer_files / VIT_L, tmp_path / VIT_L))
    hostile.edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    scores = [load_scorer("clip", where=where).score(images, ["a cat"]) for where in (scorer_files, tmp_path)]
    assert torch.equal(*scores) and not marker.exists()


@pytest.fixture(scope="module")
def single_file(sd15_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    return write_single_file(DiffusionPipeline.from_pretrained(sd15_path), file)


@pytest.mark.parametrize("kind", ["imported module for scheduler", "own module for text_encoder", "auto_map of unet"])
def test_configurations_of_single_files(sd15_path, single_file, tmp_path, marker, nothing_loads, kind):
    folder = Path(shutil.copytree(sd15_path, tmp_path / "config"))
    hostile.PIPELINES[kind](folder, marker)
    with pytest.raises(BadInput, match="config"):
        load_model(single_file, single_file_config=folder, **FP32)
    assert not marker.exists()


def cached(folder: Path, where: Path, name: str) -> str:
    """`folder` as the repository `name` in a cache of the hub at `where`, which is read without a connection."""
    repository = where / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return name


def test_parts_from_the_hub(sd15_path, single_file, tmp_path, marker):
    """They are checked where they were downloaded to, and loaded from there."""
    vae = cached(sd15_path / "vae", tmp_path / "hub", "owner/vae")
    whole = cached(sd15_path, tmp_path / "hub", "owner/model")
    where = {**FP32, "cache_dir": str(tmp_path / "hub")}
    for path, more in ((sd15_path, {"vae_path": vae}), (single_file, {"single_file_config": whole})):
        assert load_model(path, **more, **where).name == "sd15"
    bad = Path(shutil.copytree(sd15_path, tmp_path / "bad"))
    hostile.PIPELINES["own module beside known names, text_encoder"](bad, marker)
    hostile.VAES["auto_map"](bad / "vae", marker)
    vae = cached(bad / "vae", tmp_path / "hub", "owner/bad-vae")
    whole = cached(bad, tmp_path / "hub", "owner/bad-model")
    for path, more in ((sd15_path, {"vae_path": vae}), (single_file, {"single_file_config": whole}), (whole, {})):
        with pytest.raises(BadInput, match=r"which is not run|auto_map"):
            load_model(path, **more, **where)
    assert not marker.exists()


def adapter(folder: Path, said: object, rank: int = 2) -> Path:
    """A run's LoRA for one layer, with what it says of itself."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": torch.zeros(rank, 32), f"{layer}.lora_B.weight": torch.zeros(32, rank)}
    save_file(state, folder / WEIGHT_NAME, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    return folder


GOOD = {
    "unet.r": 2,
    "unet.lora_alpha": 2,
    "unet.target_modules": ["to_q"],
    "unet.rank_pattern": {},
    "unet.alpha_pattern": {},
}


@pytest.mark.parametrize(
    "said",
    [
        {**GOOD, "unet.megatron_config": {"a": 1}, "unet.megatron_core": hostile.MODULE},
        {**GOOD, "text_encoder.r": 2},
        {**GOOD, "unet.auto_mapping": {"base_model_class": "Own", "parent_library": hostile.MODULE}},
        {**GOOD, "unet.r": 10**9, "unet.lora_alpha": 10**9},
        {**GOOD, "unet.target_modules": "(.*)*x"},
        {**GOOD, "unet.rank_pattern": {"(.*)*x": 10**9}},
        [GOOD],
    ],
)
def test_adapters(sd15_path, tmp_path, marker, said):
    source = ModelSource(path=str(sd15_path), adapter=str(adapter(tmp_path, said)))
    with pytest.raises(BadInput, match=WEIGHT_NAME):
        OneAtATime(torch.device("cpu")).open(source)
    assert not marker.exists()


def test_a_runs_own_adapter_is_loaded(sd15_path, tmp_path):
    OneAtATime(torch.device("cpu")).open(ModelSource(path=str(sd15_path), adapter=str(adapter(tmp_path, GOOD))))


@pytest.mark.parametrize("pattern", ["(.*)*x", ".*.*.*.*.*.*x", "a{1000}{1000}", "[a"])
def test_a_pattern_that_never_ends(sd15_path, tmp_path, pattern):
    said = {**GOOD, "unet.alpha_pattern": {pattern: 1}}
    pipeline = load_model(sd15_path, **FP32).pipeline
    with pytest.raises(BadInput, match="alpha_pattern"):
        merge_lora(pipeline, adapter(tmp_path, said))


@pytest.mark.parametrize("pattern", [r"mid_block\.attentions.0.*to_q", "to_q", r"^.*\.attn1.to_q"])
def test_patterns_of_one_repetition(sd15_path, tmp_path, pattern):
    said = {**GOOD, "unet.alpha_pattern": {pattern: 1}}
    merge_lora(load_model(sd15_path, **FP32).pipeline, adapter(tmp_path, said))


def test_good_models_pass(sd15_path, sdxl_path, turbo_path, scorer_files):
    for path in (sd15_path, sdxl_path, turbo_path):
        check_pipeline(path, weights=True)
    check_part(scorer_files / VIT_L)
    assert issubclass(CLIPModel, PreTrainedModel)


def test_settings_that_are_empty_or_known_pass():
    check_settings("config.json", {"auto_map": None, "attn_implementation": "sdpa", "trust_remote_code": False})
    check_settings("config.json", {"attn_implementation": {"": "eager", "text_config": None}})
    check_settings("config.json", {"_name_or_path": "/home/somebody/model", "architectures": ["CLIPModel"]})
