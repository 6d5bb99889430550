"""Whole runs with --compile: the first margin, validation, EMA, checkpointing and resuming, nothing compiled late."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dpo_fast.models import programs_made
from dpo_fast.training import progress
from dpo_fast.training.trainer import Trainer
from tests.helpers.runs import assert_same_state, flags_for, lines, opened, train


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# fp32 with LoRA is below, in a run with everything
@pytest.mark.exhaustive
@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    ("tuning", "precision"),
    [("lora", "bf16"), ("lora", "fp16"), ("full", "no"), ("full", "bf16"), ("full", "fp16")],
)
def test_the_first_margin_is_exactly_zero_and_later_steps_compile_nothing(
    sdxl_path, pairs, tmp_path, tuning, precision
):
    more = ["--tuning", tuning, "--mixed_precision", precision, "--gradient_accumulation_steps", 2]
    more += ["--max_train_steps", 5]
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--compile", "regional", "--learning_rate", 1e-3, *more)
    trainer = Trainer(opened(flags), flags)
    before = programs_made()
    trainer.train_step()
    first, made = trainer.sums.read(trainer.ranks.sum_), programs_made()
    assert made > before
    assert first["margin_rms"] == 0.0 and first["loss"] == torch.tensor(2.0).log().item()
    assert first["chosen_error_delta"] == first["rejected_error_delta"] == 0.0
    for _ in range(4):  # the first updates of fp16 are skipped, until the loss scale fits
        trainer.train_step()
    assert trainer.sums.read(trainer.ranks.sum_)["margin_rms"] > 0
    assert programs_made() == made


VARIANTS = {
    "lora": ["--use_ema", "--ema_decay", 0.5],
    "full": ["--tuning", "full", "--mixed_precision", "bf16", "--gradient_checkpointing", "selective"],
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_with_everything_resumes_bit_for_bit(sdxl_path, pairs, tmp_path, name):
    """Validation's last batch is short, and samples have other shapes: both must leave the programs alone."""
    more = ["--compile", "regional", "--learning_rate", 1e-3, "--checkpointing_steps", 2, *VARIANTS[name]]
    more += ["--run_validation", "--validation_steps", 2, "--validation_fraction", 0.25]
    whole = train(sdxl_path, pairs, tmp_path / "whole", *more)
    parts = train(sdxl_path, pairs, tmp_path / "parts", *more, "--max_train_steps", 2)
    train(sdxl_path, pairs, parts, *more, "--resume_from_checkpoint", "latest")
    assert_same_state(whole, parts)
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(parts)]
    assert lines(whole)[0]["margin_rms"] == 0.0
    state = json.loads((whole / "checkpoint-4" / "state.json").read_text())
    assert "compiled_again_at" not in state["notes"]
    files = [*whole.rglob("*.safetensors")]
    assert files and not any("_orig_mod" in key for file in files for key in load_file(file))


@pytest.mark.exhaustive
def test_compilation_may_change_at_resume(sdxl_path, pairs, tmp_path):
    out = train(sdxl_path, pairs, tmp_path / "run", "--compile", "regional", "--max_train_steps", 1)
    train(sdxl_path, pairs, out, "--gradient_checkpointing", "--resume_from_checkpoint", "latest")
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


def test_what_is_compiled_late_is_told_once(sdxl_path, pairs, tmp_path, monkeypatch, capsys):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run")
    run = opened(flags)
    run.config = replace(run.config, compile="regional")
    made = iter([3, 3, 5, 6])
    monkeypatch.setattr(progress, "programs_made", lambda: next(made))
    Trainer(run, flags).train()
    told = [line for line in capsys.readouterr().err.splitlines() if "compiled since the first step" in line]
    assert len(told) == 1 and "step 3: 2 more programs" in told[0]


@pytest.mark.exhaustive
def test_with_cached_errors_the_first_margins_are_those_of_the_compiled_step(sdxl_path, pairs, tmp_path):
    """Scoring runs as written and compiles nothing; margins are off by the rounding of fp32 errors times beta / 2."""
    before = programs_made()
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--compile", "regional", "--cached_reference", 2)
    run = opened(flags)
    assert programs_made() == before
    Trainer(run, flags).train()
    first = lines(tmp_path / "run")[0]["margin_rms"]
    assert 0 <= first < 5e-3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["initial_margin_rms"] == first and "compiled_again_at" not in run.notes
