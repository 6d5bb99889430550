"""The choices of a run: from flags, a file, a checkpoint, or proofs; recorded, and kept when it goes on."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend

from dpo_fast.caching.score_reference import _numerics
from dpo_fast.caching.settings import ScoringSettings
from dpo_fast.choices import choose as choose_module
from dpo_fast.choices.choose import Choices, Chosen
from dpo_fast.choices.decision import decide
from dpo_fast.choices.trial import Evidence
from dpo_fast.command_line import parse
from dpo_fast.errors import BadInput
from dpo_fast.kernels import dispatch
from dpo_fast.models.memory_order import memory_format
from dpo_fast.parallel import Ranks
from dpo_fast.train import main
from dpo_fast.training import choosing
from tests.helpers.planted_gpu import Machine
from tests.helpers.runs import STEPS, assert_same_state, flags_for, lines, opened, train

ROUNDS = {"reference": [2.0, 2.1, 2.2], "native": [1.0, 1.05, 1.1]}
OUTCOME = decide("pair ops on cpu", "reference", Evidence({"native": ""}, ROUNDS))
OTHER = Choices("reference", "sdpa", "contiguous", "off")


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What runs ask for; they are answered with OTHER, as far as it is open."""
    found = []

    def choose(workload, ranks, fixed, passes, root, *, only_known):
        found.append((workload, fixed, passes))
        values = {name: value if value != "auto" else getattr(OTHER, name) for name, value in vars(fixed).items()}
        return Chosen(Choices(**values), (OUTCOME,), ("pair ops by reference: said",))

    monkeypatch.setattr(choosing, "choose", choose)
    return found


def recorded(folder: Path) -> Choices:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    return Choices(**{name: values[name] for name in choosing.FLAGS})


def test_the_outcome_is_used_printed_and_recorded(sdxl_path, pairs, tmp_path, asked, capsys):
    out = train(sdxl_path, pairs, tmp_path / "run")
    ((workload, fixed, passes),) = asked
    assert fixed == Choices() and passes == STEPS
    assert (workload.device, workload.dtype, workload.pairs, workload.latent) == ("cpu", "float32", 2, 8)
    assert (workload.tuning, workload.reference, workload.prediction_type) == ("lora", "online", "epsilon")
    assert recorded(out) == OTHER and "choice: pair ops by reference: said" in capsys.readouterr().err
    state = json.loads((out / f"checkpoint-{STEPS}" / "state.json").read_text())
    assert {name: state["config"][name] for name in choosing.FLAGS} == vars(OTHER)
    assert state["notes"]["choices"] == json.loads(json.dumps([OUTCOME.as_json()]))
    assert json.loads((out / "summary.json").read_text())["choices"] == state["notes"]["choices"]


def test_what_is_chosen_is_what_runs(sdxl_path, pairs, tmp_path, asked):
    run = opened(flags_for(sdxl_path, pairs, tmp_path / "run", "--lora_targets", "conv1", "to_q"))
    assert memory_format(run.family.unet) == torch.contiguous_format and run.config.backend == "reference"
    assert all(p.is_contiguous() for p in run.family.unet.parameters())
    plain = opened(flags_for(sdxl_path, pairs, tmp_path / "plain", "--no-prove"))
    assert memory_format(plain.family.unet) == torch.channels_last


def test_flags_win(sdxl_path, pairs, tmp_path, asked):
    out = train(sdxl_path, pairs, tmp_path / "run", "--backend", "reference", "--memory_order", "channels_last")
    assert asked[0][1] == Choices(backend="reference", memory_order="channels_last")
    assert recorded(out).memory_order == "channels_last"


def test_no_prove_and_short_runs_take_the_defaults(sdxl_path, pairs, tmp_path, monkeypatch, capsys):
    out = train(sdxl_path, pairs, tmp_path / "short")
    assert recorded(out) == Choices(compile="off")
    assert "choice: nothing is proven for a run of about 1 s" in capsys.readouterr().err
    monkeypatch.setattr(choosing, "choose", None)
    out = train(sdxl_path, pairs, tmp_path / "unproven", "--no-prove")
    assert recorded(out) == Choices(compile="off") and "choice" not in capsys.readouterr().err


def test_a_resumed_run_keeps_its_choices(sdxl_path, pairs, tmp_path, asked):
    whole = train(sdxl_path, pairs, tmp_path / "whole")
    parts = train(sdxl_path, pairs, tmp_path / "parts", "--max_train_steps", 2)
    assert len(asked) == 2
    train(sdxl_path, pairs, parts, "--resume_from_checkpoint", "latest")
    assert len(asked) == 2 and recorded(parts) == OTHER  # nothing was asked
    assert_same_state(whole, parts)
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(parts)]
    summaries = [json.loads((folder / "summary.json").read_text())["choices"] for folder in (whole, parts)]
    assert summaries[0] == summaries[1]


def test_a_resumed_run_may_be_told_otherwise(sdxl_path, pairs, tmp_path, asked):
    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 2)
    train(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest", "--memory_order", "channels_last")
    assert recorded(out) == Choices("reference", "sdpa", "channels_last", "off") and len(asked) == 1


def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_was(sdxl_path, pairs, tmp_path, asked):
    """It says auto, or nothing, which meant the plain defaults."""
    saved = {"backend": "auto", "attention": "auto", "compile": "off"}
    config, _ = parse(flags_for(sdxl_path, pairs, tmp_path / "run"))
    assert choosing.choices_of(choosing.resumed(config, saved)) == Choices(compile="off")


def test_what_this_machine_lacks_ends_a_resumed_run_with_the_remedy(sdxl_path, pairs, tmp_path, capsys, monkeypatch):
    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 2, "--backend", "native")
    monkeypatch.setattr(dispatch, "_reason_against", lambda name, device: "not built" if name == "native" else "")
    assert main(flags_for(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest")) == 2
    said = capsys.readouterr().err
    assert "--backend native" in said and "not built" in said and "reference" in said
    assert main(flags_for(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest", "--backend", "reference")) == 0


def test_a_file_of_choices(sdxl_path, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "choose", None)  # nothing is open
    file = tmp_path / "choices.yaml"
    file.write_text(yaml.safe_dump(vars(OTHER)))
    one = train(sdxl_path, pairs, tmp_path / "one", "--choices", file)
    assert recorded(one) == OTHER
    two = train(sdxl_path, pairs, tmp_path / "two", "--choices", one / "config.yaml", "--memory_order", "channels_last")
    assert recorded(two) == Choices("reference", "sdpa", "channels_last", "off")


@pytest.mark.exhaustive
def test_a_resumed_run_does_not_read_the_file_again(sdxl_path, pairs, tmp_path, monkeypatch):
    """It may be gone, or say something else by now."""
    monkeypatch.setattr(choosing, "choose", None)
    file = tmp_path / "choices.yaml"
    file.write_text(yaml.safe_dump(vars(OTHER)))
    out = train(sdxl_path, pairs, tmp_path / "run", "--choices", file, "--max_train_steps", 2)
    file.write_text(yaml.safe_dump(vars(OTHER) | {"memory_order": "channels_last"}))
    train(sdxl_path, pairs, out, "--choices", file, "--resume_from_checkpoint", "latest", "--max_train_steps", 3)
    file.unlink()
    train(sdxl_path, pairs, out, "--choices", file, "--resume_from_checkpoint", "latest")
    assert recorded(out) == OTHER
    file.write_text("attention: fast")  # but where there is no checkpoint, it is read
    fresh = flags_for(sdxl_path, pairs, tmp_path / "new", "--choices", file, "--resume_from_checkpoint", "auto")
    assert main(fresh) == 2


def test_what_a_model_predicts_is_read_from_its_scheduler(sdxl_path, pairs, tmp_path, asked):
    model = tmp_path / "model"
    shutil.copytree(sdxl_path, model)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    opened(flags_for(model, pairs, tmp_path / "run"))
    opened(flags_for(model, pairs, tmp_path / "told", "--prediction_type", "epsilon"))
    opened(flags_for(sdxl_path, pairs, tmp_path / "plain"))
    assert [workload.prediction_type for workload, *_ in asked] == ["v_prediction", "epsilon", "epsilon"]


@pytest.mark.parametrize("folder", ["pipeline/vae", "alone"])
def test_latents_are_as_large_as_the_named_vae_makes_them(sdxl_path, pairs, tmp_path, folder):
    config, _ = parse(flags_for(sdxl_path, pairs, tmp_path / "run", "--resolution", "64"))
    ranks = Ranks(None, 0, 1, torch.device("cpu"), None)
    own = choosing.workload_of(config, ranks).latent
    vae = json.loads((Path(sdxl_path) / "vae" / "config.json").read_text())
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        vae[name] = [*vae[name], vae[name][-1]]  # one more level: half the side
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text(json.dumps(vae))
    config = replace(config, pretrained_vae_model_name_or_path=str(tmp_path / folder.removesuffix("/vae")))
    assert choosing.workload_of(config, ranks).latent == own // 2


@pytest.mark.parametrize(
    ("changes", "said"), [({"in_channels": 9}, "inpainting"), ({"time_cond_proj_dim": 8}, "latent consistency")]
)
def test_a_unet_that_cannot_be_trained_is_refused_before_it_is_tried(sdxl_path, pairs, tmp_path, capsys, changes, said):
    model = tmp_path / "model"
    shutil.copytree(sdxl_path, model)
    file = model / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    config, _ = parse(flags_for(model, pairs, tmp_path / "run"))
    with pytest.raises(BadInput, match=said):
        choosing.workload_of(config, Ranks(None, 0, 1, torch.device("cpu"), None))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: [", "cannot be read"),
        (b"", "names none of backend, attention, memory_order, compile"),
        (b"- 1", "names none of"),
        (b"seed: 1", "names none of"),
        (b"attention: fast", "attention ('fast') must be one of auto, sdpa, cudnn, flash, efficient, xformers"),
        (b"compile: [off]", "compile ([False]) must be one of auto, off"),
        (b"compile: off", ""),  # YAML reads it as False
        (b"attention: flash", "--attention flash cannot be used here (needs a CUDA device): sdpa can"),
    ],
)
def test_a_bad_file_of_choices_is_one_line(sdxl_path, pairs, tmp_path, capsys, content, said):
    if "CUDA" in said and torch.cuda.is_available():
        pytest.skip("it can be used here")
    file = tmp_path / "choices.yaml"
    if content is not None:
        file.write_bytes(content)
    out = tmp_path / "run"
    status = main(flags_for(sdxl_path, pairs, out, "--choices", file, "--max_train_steps", 1))
    errors = [line for line in capsys.readouterr().err.splitlines() if "--choices" in line or "--attention" in line]
    if not said:
        assert status == 0 and recorded(out).compile == "off"
        return
    assert status == 2 and len(errors) == 1 and said in errors[0] and not out.exists()


def test_cached_errors_are_of_the_memory_order_that_computes_them(sdxl_path, pairs, tmp_path):
    def numerics(*flags: str) -> dict[str, str]:
        config, _ = parse(flags_for(sdxl_path, pairs, tmp_path / "run", *flags))
        return _numerics(ScoringSettings.of(config), torch.device("cpu"))

    assert numerics() == numerics("--attention", "sdpa", "--memory_order", "channels_last")
    assert numerics("--memory_order", "contiguous") == numerics() | {"memory_order": "contiguous"}


def test_the_reference_is_cached_with_the_choices_of_the_run(sdxl_path, pairs, tmp_path, asked):
    more = ["--cached_reference", 2, "--latent_cache_dir", tmp_path / "cache"]
    run = opened(flags_for(sdxl_path, pairs, tmp_path / "run", *more))
    assert asked[0][0].reference == "cached"
    assert [made["memory_order"] for made in run.scored.errors.made_by] == ["contiguous"]


@pytest.mark.parametrize(
    "compiled", ["off", pytest.param("regional", marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)
def test_on_a_planted_gpu_a_run_computes_with_what_is_proven_there(
    sdxl_path, pairs, tmp_path, monkeypatch, capsys, compiled
):
    """From the questions to the last step: native kernels, the best attention, compiled blocks."""
    planted = Machine.here(monkeypatch)
    workload_of = choosing.workload_of
    monkeypatch.setattr(choosing, "workload_of", lambda *given: replace(workload_of(*given), device="cuda:0"))
    monkeypatch.setattr(choose_module, "GAIN_AT_MOST", math.inf)  # the shortest run pays for trials
    monkeypatch.setattr(UNet2DConditionModel, "device", torch.device("cuda:0"))  # asks for attention of a GPU
    monkeypatch.setattr(choosing, "usable_attention", lambda: {})
    planted.compile_seconds = 0.0  # pays at once
    first = []
    attend = F.scaled_dot_product_attention

    def noted(*args: object, **kwargs: object) -> torch.Tensor:
        first.append(torch._C._get_sdp_priority_order()[0])
        return attend(*args, **kwargs)

    if compiled == "off":  # the compiler cannot trace it
        monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    if reason := dispatch.usable_backends("cpu")["native"]:
        pytest.skip(reason)
    flags = ["--compile", "off"] if compiled == "off" else []
    out = train(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", tmp_path / "cache", *flags)
    assert recorded(out) == Choices("native", "cudnn", "channels_last", compiled)
    said = capsys.readouterr().err
    assert "choice: attention cudnn, memory order channels_last: proven here" in said
    assert "choice: pair ops by native: proven here, 2.00 times as fast as reference" in said
    assert compiled == "regional" or int(SDPBackend.CUDNN_ATTENTION) in first
    assert json.loads((out / "summary.json").read_text())["initial_margin_rms"] == 0.0


def test_a_model_that_leaves_out_what_has_a_default_is_asked_about(sdxl_path, pairs, tmp_path, asked):
    model = tmp_path / "model"
    shutil.copytree(sdxl_path, model)
    file = model / "unet" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("in_channels") == 4 and config.pop("act_fn") == "silu"
    file.write_text(json.dumps(config))
    opened(flags_for(model, pairs, tmp_path / "run"))
    assert asked[0][0].unet["in_channels"] == 4


def test_a_configuration_without_a_unet_is_one_line(sdxl_path, pairs, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(sdxl_path, model)
    file = model / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_out_channels": [16, "x", 32]}))
    assert main(flags_for(model, pairs, tmp_path / "run")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpo_fast: error")]
    assert "config" in line and not (tmp_path / "run").exists()
