"""Marks in model files: honoured and said in one line, or refused before the weights are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from dpo_fast.errors import BadInput
from dpo_fast.models import Family, load
from dpo_fast.models.load import component_config, family_of
from dpo_fast.models.source import ModelSource
from tests.helpers.pipelines import load_model
from tests.helpers.single_file import write_single_file

EMPTY, STATISTICS, NUMBER = torch.tensor([]), torch.ones(1, 4, 1, 1), torch.tensor(120.0)
FP32 = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def marked(request, sdxl_path, sd15_path, tmp_path):
    """Writes a single file with marks; returns its path."""

    def write(*keys: str, kind: str = "sdxl", **metadata: str) -> Path:
        values = {"edm_mean": STATISTICS, "edm_std": STATISTICS, "edm_vpred.sigma_max": NUMBER}
        values["edm_vpred.sigma_min"] = NUMBER / 1000
        pipeline = DiffusionPipeline.from_pretrained({"sdxl": sdxl_path, "sd15": sd15_path}[kind])
        marks = {key: values.get(key, EMPTY).clone() for key in keys}
        path, notes = tmp_path / "model.safetensors", {f"modelspec.{name}": value for name, value in metadata.items()}
        return write_single_file(pipeline, path, marks, notes or None)

    return write


def load_marked(path: Path, config: Path, caplog, **flags: str) -> tuple[Family, list[str]]:
    """The family, and what was logged of its marks."""
    with caplog.at_level("INFO", "dpo_fast.models.marks"):
        family = load_model(path, single_file_config=config, **FP32, **flags)
    return family, [line.removeprefix(f"{path}: ") for line in caplog.messages if "trained with" in line]


def state_of(family: Family) -> tuple[str, bool]:
    return family.schedule.prediction_type, family.schedule.alphas_cumprod[-1].item() == 0


@pytest.mark.parametrize(
    ("keys", "metadata", "flags", "wanted", "said"),
    [
        ((), {}, {}, ("epsilon", False), None),
        ((), {"prediction_type": "epsilon"}, {}, ("epsilon", False), None),
        (("v_pred",), {}, {}, ("v_prediction", False), "v_prediction (key v_pred)"),
        (
            ("v_pred", "ztsnr"),
            {},
            {},
            ("v_prediction", True),
            "v_prediction (key v_pred), zero terminal SNR (key ztsnr)",
        ),
        (("ztsnr",), {}, {}, ("epsilon", True), "zero terminal SNR (key ztsnr)"),
        (
            (),
            {"prediction_type": "v"},
            {},
            ("v_prediction", False),
            "v_prediction (modelspec.prediction_type v)",
        ),
        (
            (),
            {"architecture": "stable-diffusion-v2-768-v"},
            {},
            ("v_prediction", False),
            "v_prediction (modelspec.architecture stable-diffusion-v2-768-v)",
        ),
        ((), {"architecture": "stable-diffusion-xl-v1-base"}, {}, ("epsilon", False), None),
        (
            ("v_pred", "ztsnr"),
            {},
            {"prediction_type": "epsilon", "zero_terminal_snr": "off"},
            ("epsilon", False),
            "--prediction_type epsilon, against its key v_pred, --zero_terminal_snr off, against its key ztsnr",
        ),
        (("v_pred",), {}, {"prediction_type": "v_prediction"}, ("v_prediction", False), "v_prediction (key v_pred)"),
        (("v_pred",), {}, {"zero_terminal_snr": "on"}, ("v_prediction", True), "v_prediction (key v_pred)"),
        (
            ("v_pred",),
            {"prediction_type": "epsilon"},
            {"prediction_type": "v_prediction"},
            ("v_prediction", False),
            "v_prediction (key v_pred)",
        ),
    ],
)
def test_marks_of_a_single_file(marked, sdxl_path, caplog, keys, metadata, flags, wanted, said):
    family, lines = load_marked(marked(*keys, **metadata), sdxl_path, caplog, **flags)
    assert state_of(family) == wanted
    assert lines == ([] if said is None else [f"trained with {said}"])
    config = family.pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == wanted


def test_marks_of_sd15(marked, sd15_path, caplog):
    family, _ = load_marked(marked("v_pred", "ztsnr", kind="sd15"), sd15_path, caplog)
    assert state_of(family) == ("v_prediction", True)


def test_a_mark_wins_over_the_configuration_that_the_file_is_read_with(marked, sdxl_path, tmp_path, caplog):
    config = Path(shutil.copytree(sdxl_path, tmp_path / "config"))
    EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear").save_pretrained(
        config / "scheduler"
    )
    family, lines = load_marked(marked(prediction_type="epsilon"), config, caplog)
    assert state_of(family)[0] == family.pipeline.scheduler.config.prediction_type == "epsilon"
    assert lines == ["trained with epsilon (modelspec.prediction_type epsilon)"]
    caplog.clear()
    family, lines = load_marked(marked(), config, caplog)
    assert state_of(family)[0] == "v_prediction"
    assert lines == ["trained with v_prediction (scheduler's prediction_type)"]


@pytest.mark.parametrize(
    ("keys", "metadata", "match"),
    [
        (("edm_mean", "edm_std"), {}, "has the key edm_mean: .* EDM's continuous noise levels, like Playground v2.5"),
        (("edm_vpred.sigma_max",), {}, r"has the key edm_vpred\.sigma_max: .* like CosXL"),
        (("v_pred", "edm_vpred.sigma_min"), {}, r"has the key edm_vpred\.sigma_min"),
        ((), {"prediction_type": "rectified_flow"}, "modelspec.prediction_type 'rectified_flow', which is not"),
        (
            ("v_pred",),
            {"prediction_type": "epsilon"},
            r"contradicts itself \(key v_pred for v_prediction but modelspec.prediction_type epsilon for epsilon\)",
        ),
    ],
)
def test_marks_that_cannot_be_trained(marked, sdxl_path, monkeypatch, keys, metadata, match):
    path = marked(*keys, **metadata)
    monkeypatch.setattr(load, "_load_file", None)  # any use fails
    with pytest.raises(BadInput, match=match) as caught:
        load_model(path, single_file_config=sdxl_path, **FP32)
    assert "\n" not in str(caught.value)
    if "EDM" in match:
        with pytest.raises(BadInput, match=match):
            family_of(ModelSource(str(path)))


def test_sd2_needs_its_configuration(marked, monkeypatch):
    """2-base predicts epsilon and 768-v the velocity, with the same tensors."""
    path = marked("cond_stage_model.model.token_embedding.weight", kind="sd15")
    monkeypatch.setattr(load, "_load_file", None)
    for use in (lambda: load_model(path, **FP32), lambda: component_config(ModelSource(str(path)), "unet")):
        with pytest.raises(BadInput, match=r"is a Stable Diffusion 2\.x model, .* as single_file_config"):
            use()


@pytest.mark.parametrize(("spread", "looks"), [(0.2, "v_prediction"), (0.05, "epsilon")])
@pytest.mark.parametrize("says", ["epsilon", "v_prediction"])
def test_sd2_that_contradicts_its_configuration_is_asked_for(
    marked, sd15_path, tmp_path, monkeypatch, spread, looks, says
):
    config = Path(shutil.copytree(sd15_path, tmp_path / "config"))
    file = config / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": says}))
    path = marked("cond_stage_model.model.token_embedding.weight", kind="sd15")
    state = load_file(path)
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    save_file({**state, key: spread * torch.tensor([1.0, -1.0] * 8)}, path)

    def reached(*_: object) -> None:
        raise BadInput("the weights are read")

    monkeypatch.setattr(load, "_load_file", reached)
    asks = f"looks as if it was trained with {looks}, but the scheduler .* says {says}: say which"
    with pytest.raises(BadInput, match="the weights are read" if looks == says else asks):
        load_model(path, single_file_config=config, **FP32)
    with pytest.raises(BadInput, match="the weights are read"):
        load_model(path, single_file_config=config, prediction_type=looks, **FP32)


# folders


def with_scheduler(path: Path, scheduler, folder: Path) -> Path:
    """A copy of a pipeline with another scheduler."""
    shutil.copytree(path, folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (EDMDPMSolverMultistepScheduler(), "EDMDPMSolverMultistepScheduler says .* EDM"),  # Playground v2.5
        (
            EulerDiscreteScheduler(  # CosXL
                timestep_type="continuous",
                prediction_type="v_prediction",
                beta_schedule="scaled_linear",
                sigma_min=0.002,
                sigma_max=120.0,
            ),
            r"EulerDiscreteScheduler says .* \(timestep_type continuous\)",
        ),
    ],
)
def test_edm_schedulers_are_refused_before_the_weights_are_read(sdxl_path, tmp_path, monkeypatch, scheduler, match):
    path = with_scheduler(sdxl_path, scheduler, tmp_path / "model")
    monkeypatch.setattr(load, "_load_folder", None)
    for use in (lambda: load_model(path, **FP32), lambda: family_of(ModelSource(str(path)))):
        with pytest.raises(BadInput, match=match) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "wanted", "said"),
    [
        (
            {},
            ("v_prediction", True),
            "v_prediction (scheduler's prediction_type), zero terminal SNR (scheduler's rescale_betas_zero_snr)",
        ),
        (
            {"prediction_type": "epsilon", "zero_terminal_snr": "off"},
            ("epsilon", False),
            "--prediction_type epsilon, against its scheduler's prediction_type, --zero_terminal_snr off, against its"
            " scheduler's rescale_betas_zero_snr",
        ),
    ],
)
def test_what_a_scheduler_says_is_said(sdxl_path, tmp_path, caplog, flags, wanted, said):
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    path = with_scheduler(sdxl_path, scheduler, tmp_path / "model")
    with caplog.at_level("INFO", "dpo_fast.models.marks"):
        family = load_model(path, **FP32, **flags)
    assert state_of(family) == wanted
    assert caplog.messages == [f"{path}: trained with {said}"]
    config = family.pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == wanted
