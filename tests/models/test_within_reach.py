"""What a run needs of the hub is asked for first: what is missing, why, and the flag that cures it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from dpo_fast.errors import BadInput
from dpo_fast.models import within_reach
from dpo_fast.models.source import ModelSource
from dpo_fast.models.within_reach import check_within_reach
from tests.helpers.single_file import write_single_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = "HF_HUB_OFFLINE is set"


@pytest.fixture(autouse=True)
def nothing_remembered():
    check_within_reach.cache_clear()


def put(cache: Path, name: str, files: Path) -> Path:
    """Put a folder into the hub's cache as the repository `name`."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(files, folder / "snapshots" / COMMIT))


def refused(*sources: ModelSource) -> str:
    with pytest.raises(BadInput) as refusal:
        for source in sources:
            check_within_reach(source)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_is_on_this_machine_needs_no_hub(sdxl_path, tmp_path):
    check_within_reach(ModelSource(str(sdxl_path), vae_path=str(sdxl_path / "vae")))
    put(tmp_path, "owner/sdxl", sdxl_path)
    put(tmp_path, "owner/vae", sdxl_path / "vae")
    check_within_reach(ModelSource("owner/sdxl", vae_path="owner/vae", cache_dir=str(tmp_path)))


def test_all_that_is_missing_offline_is_named_with_its_flag(tmp_path):
    said = refused(ModelSource("owner/sdxl", vae_path="owner/vae", merged="owner/lora", cache_dir=str(tmp_path)))
    parts = said.split("; ")
    assert [part.split(" is not")[0] for part in parts] == [
        "the model owner/sdxl",
        "the VAE owner/vae",
        "the LoRA owner/lora",
    ]
    assert all(f"({tmp_path})" in part and OFFLINE in part for part in parts)
    flags = ("--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path", "--init_lora")
    assert all(flag in part for flag, part in zip(flags, parts, strict=True))
    assert "hf download owner/vae" in said


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_model_without_some_of_its_weights_is_not_whole(sdxl_path, tmp_path, part):
    snapshot = put(tmp_path, "owner/sdxl", sdxl_path)
    source = ModelSource("owner/sdxl", cache_dir=str(tmp_path))
    check_within_reach(source)
    check_within_reach.cache_clear()
    for file in (snapshot / part).glob("*.safetensors"):
        file.unlink()
    assert refused(source).startswith("the model owner/sdxl is not, or not whole, in the hub's cache")


def test_a_single_file_needs_a_configuration(sdxl_path, tmp_path):
    file = write_single_file(DiffusionPipeline.from_pretrained(sdxl_path), tmp_path / "model.safetensors", {})
    usual = "stabilityai/stable-diffusion-xl-base-1.0"
    said = refused(ModelSource(str(file), cache_dir=str(tmp_path)))
    assert f"the configuration that {file} is read with, of {usual}," in said and OFFLINE in said
    assert "--single_file_config" in said and f"hf download {usual} --include '*.json' '*.txt'" in said
    check_within_reach(ModelSource(str(file), single_file_config=str(sdxl_path)))
    put(tmp_path, usual, sdxl_path)
    check_within_reach(ModelSource(str(file), cache_dir=str(tmp_path)))


@pytest.fixture
def online(monkeypatch):
    """The files that the hub has, and the error that asking for any other raises."""
    has: dict[str, Exception | None] = {}

    def ask(url: str, **_) -> None:
        error = has.get(url.removeprefix("https://huggingface.co/").replace("/resolve/main", ""), None)
        asked.append(url)
        if error is not None:
            raise error

    asked: list[str] = []
    monkeypatch.setattr(within_reach.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(within_reach, "get_hf_file_metadata", ask)
    monkeypatch.setattr(within_reach, "kind_of", lambda *_: None)
    return has, asked


def test_without_a_network_the_hub_cannot_be_reached(online, tmp_path):
    online[0]["owner/vae/config.json"] = ConnectionError("no route to host")
    said = refused(ModelSource("owner/sdxl", vae_path="owner/vae", cache_dir=str(tmp_path)))
    assert said.startswith("the VAE owner/vae is not") and "the hub cannot be reached (no route to host)" in said
    assert "--pretrained_vae_model_name_or_path" in said


def test_a_vae_may_be_in_a_folder_of_its_repository(online, tmp_path):
    has, asked = online
    has["owner/vae/config.json"] = EntryNotFoundError("404")
    source = ModelSource("owner/sdxl", vae_path="owner/vae", cache_dir=str(tmp_path))
    check_within_reach(source)
    assert [url.split("/main/")[1] for url in asked] == ["model_index.json", "config.json", "vae/config.json"]
    check_within_reach(source)  # asked once
    assert len(asked) == 3
    has["owner/vae/vae/config.json"] = EntryNotFoundError("404")
    check_within_reach.cache_clear()
    assert refused(source) == "owner/vae has no config.json on the hub: check what owner/vae is"


def test_what_the_hub_does_not_have_is_not_called_out_of_reach(online, tmp_path):
    response = SimpleNamespace(status_code=404, headers={}, request=None)
    online[0]["owner/sdxl/model_index.json"] = RepositoryNotFoundError("404", response=response)
    said = refused(ModelSource("owner/sdxl", cache_dir=str(tmp_path)))
    assert said == "owner/sdxl is no folder and no model on the hub: check the spelling, or hf auth login"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(path="nowhere/at/all"), "nowhere/at/all is no folder, file or hub id (owner/name): check the spelling"),
        (dict(path="model.ckpt"), "is a pickle"),
        (dict(path="nowhere.safetensors"), "nowhere.safetensors is no file: check the path"),
        (dict(vae_path="no/such/vae"), "no/such/vae is no folder, file or hub id"),
        (dict(merged="lora.safetensors"), "lora.safetensors is no file: check the path"),
    ],
)
def test_what_cannot_be_a_model_is_refused_at_once(sd15_path, fields, said):
    assert said in refused(ModelSource(**{"path": str(sd15_path), **fields}))


def test_a_local_pipeline_without_weights_is_refused_as_loading_would(sd15_path, tmp_path):
    model = shutil.copytree(sd15_path, tmp_path / "model")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet cannot be loaded: it holds no .safetensors" in refused(ModelSource(str(model)))
