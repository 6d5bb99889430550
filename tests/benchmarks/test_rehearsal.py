"""The rehearsal: its parts in this process on a small model, its measurements, and the whole script on demand."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import rehearsal
from benchmarks.rehearsal import GIB, checks_of, dry_run, flags, measured
from benchmarks.rehearsal_parts import make, policy, read
from benchmarks.step.cases import CASES
from dpo_fast.train import main
from tests.benchmarks import tiny
from tests.helpers.runs import ROOT

CASE = tiny.case("sdxl", "lora")
RESOLUTION = CASE.resolution


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A folder after the training and the resumed training, with the prediction of the policy; the two summaries."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, CASE.name, CASE)
        make(folder, CASE.name, RESOLUTION, "bf16")
    summaries = {}
    for name, more in (("train", ["1"]), ("resume", ["2", "--resume_from_checkpoint", "latest"])):
        large = ["--learning_rate", "1e-2"]  # for so small a model, so that a fifth of the LoRA stands out of rounding
        assert main([*flags(folder, RESOLUTION), *large, "--max_train_steps", *more]) == 0
        summaries[name] = json.loads((folder / "run" / "summary.json").read_text())
    policy(folder, RESOLUTION)
    return folder, summaries


def read_back(folder):
    read(folder)
    return json.loads((folder / "read.json").read_text())


def test_diffusers_predicts_with_the_exported_lora_as_the_policy_does(rehearsed):
    folder, summaries = rehearsed
    checks = checks_of(summaries, read_back(folder))
    assert len(checks) == 6 and all(checks.values()), checks


@pytest.mark.parametrize(("factor", "failing"), [(1.2, "predicts as the policy does"), (0.0, "differs from the base")])
def test_another_lora_does_not_pass(rehearsed, factor, failing):
    folder, summaries = rehearsed
    file = folder / "run" / "pytorch_lora_weights.safetensors"
    exported, tensors = file.read_bytes(), load_file(file)
    save_file({name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()}, file)
    try:
        checks = checks_of(summaries, read_back(folder))
    finally:
        file.write_bytes(exported)
    assert not next(holds for check, holds in checks.items() if failing in check)


def test_weights_are_written_in_the_dtype_that_was_asked_for(rehearsed):
    folder, _ = rehearsed
    vocabulary = CASE.model.text[0]["vocab_size"]
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / "model" / component).glob("*.safetensors")
        tensors = load_file(file)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert all(tensor.float().isfinite().all() for tensor in tensors.values())
        assert component != "text_encoder" or any(t.shape[0] == vocabulary for t in tensors.values())


def test_the_dry_run_is_read_as_it_is_printed(rehearsed, tmp_path, capsys):
    folder, _ = rehearsed
    more = ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"]
    assert main([*flags(folder, 512), *more, "--dry-run"]) == 0
    predicted = dry_run(capsys.readouterr().out.splitlines())
    unet = sum(t.nbytes for file in (folder / "model" / "unet").glob("*.safetensors") for t in load_file(file).values())
    assert predicted["UNet weights"] == pytest.approx(unet / GIB, abs=0.1 / 1024)
    assert predicted["in all, without VAE and text encoders"] > predicted["UNet weights"]
    assert predicted["TFLOP a step"] > 0


def test_the_memory_of_a_process_is_measured(tmp_path):
    program = f"""
import time
held = b"x" * (300 << 20)
time.sleep(0.5)  # long against the time between two samples, on a busy machine too
print({rehearsal.SETTLED!r}, flush=True)
time.sleep(0.5)
more = b"y" * (200 << 20)
time.sleep(0.5)
"""
    phase = measured("hold", [sys.executable, "-c", program], tmp_path)
    assert phase.status == 0 and phase.seconds > 1
    assert phase.peak_resident == pytest.approx(500 / 1024, abs=0.05)
    assert phase.peak_anonymous == pytest.approx(500 / 1024, abs=0.05)
    assert phase.held == pytest.approx(300 / 1024, abs=0.05)
    assert phase.step_anonymous == pytest.approx(500 / 1024, abs=0.05)


def test_a_phase_that_fails_ends_the_rehearsal(tmp_path, monkeypatch):
    commands = {
        name: [sys.executable, "-c", f"raise SystemExit({k})"] for k, name in enumerate(("one", "two", "three"))
    }
    monkeypatch.setattr(rehearsal, "commands_of", lambda *_: commands)
    file, folder = tmp_path / "result.json", tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["rehearsal.py", "--model", "tiny", "--folder", str(folder), "--json", str(file)])
    assert rehearsal.main() == 1
    result = json.loads(file.read_text())
    assert [(phase["name"], phase["status"]) for phase in result["phases"]] == [("one", 0), ("two", 1)]
    assert result["checks"] == {"one: exit status 0": True, "two: exit status 0": False} and not result["passed"]
    assert str(tmp_path) not in file.read_text() and not any(folder.iterdir())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_whole_rehearsal_of_a_small_model(tmp_path):
    file = tmp_path / "result.json"
    flags = ["--model", "tiny", "--folder", tmp_path / "work", "--json", file]
    command = [sys.executable, "benchmarks/rehearsal.py", *map(str, flags)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(file.read_text())
    assert result["passed"] and len(result["phases"]) == 8
    assert str(tmp_path) not in file.read_text() and not any((tmp_path / "work").iterdir())
    assert result["memory"]["held before the first step"]["measured"] > 0.1
