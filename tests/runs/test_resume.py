"""Stopping and going on: nothing is lost, and a resumed run ends as the uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_fast.checksums import file_digest, write_signed_json
from dpo_fast.train import main
from dpo_fast.training import checkpoint
from dpo_fast.training.resume import older_fingerprint
from dpo_fast.training.trainer import Trainer
from tests.helpers.pipelines import load_model
from tests.helpers.runs import STEPS, assert_same_state, flags_for, lines, start, train

VARIANTS = {
    "lora": [],
    "full bf16 with ema": ["--tuning", "full", "--mixed_precision", "bf16", "--use_ema"],
    "fp16": ["--mixed_precision", "fp16", "--proportion_empty_prompts", 0.3, "--hflip", "--random_crop", "--no-cache"],
    "kto": ["--objective", "kto"],
    "adafactor": ["--optimizer", "adafactor"],
    "8-bit adam": ["--use_8bit_adam"],
    "streamed": ["--streaming"],
}


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_is_bit_identical(sdxl_path, pairs, tmp_path, name):
    more = ["--gradient_accumulation_steps", 2, "--learning_rate", 1e-4, "--checkpointing_steps", 2, *VARIANTS[name]]
    whole = train(sdxl_path, pairs, tmp_path / "whole", *more)
    parts = train(sdxl_path, pairs, tmp_path / "parts", *more, "--max_train_steps", 2)
    train(sdxl_path, pairs, parts, *more, "--resume_from_checkpoint", "latest")
    assert_same_state(whole, parts)
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(parts)]
    for key in ("loss_first", "initial_margin_rms", "steps", "pairs_seen", "loss_last"):
        whole_summary, parts_summary = (json.loads((f / "summary.json").read_text()) for f in (whole, parts))
        assert whole_summary[key] == parts_summary[key]


LAST_STEP = {
    "lora": [],
    "full": ["--tuning", "full", "--use_ema"],
    "streamed": ["--streaming"],
    "cached reference": ["--cached_reference", 2],
}


def results(folder: Path) -> dict[str, object]:
    """The weights of a run's result, and the part of its summary that does not depend on time."""
    files = [p for p in folder.rglob("*.safetensors") if not p.relative_to(folder).parts[0].startswith("checkpoint-")]
    found = {f"{file.relative_to(folder)} {name}": t.tolist() for file in files for name, t in load_file(file).items()}
    summary = json.loads((folder / "summary.json").read_text())
    varying = ("seconds", "pairs_per_second", "evaluation_seconds", "digest")
    return found | {key: value for key, value in summary.items() if key not in varying}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("how", ["latest", pytest.param("auto", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", LAST_STEP)
def test_stopped_after_the_last_checkpoint_the_result_is_still_written(sdxl_path, pairs, tmp_path, capsys, name, how):
    more = ["--max_train_steps", 2, *LAST_STEP[name]]
    out = train(sdxl_path, pairs, tmp_path / "run", *more)
    before, saved = results(out), json.loads((out / "checkpoint-2" / "state.json").read_text())
    for path in out.iterdir():
        if path.name not in ("config.yaml", "metrics.jsonl", "checkpoint-2"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    train(sdxl_path, pairs, out, *more, "--resume_from_checkpoint", how)
    assert "all 2 steps are done: writing the result" in capsys.readouterr().err
    assert results(out) == before
    assert [line["step"] for line in lines(out)] == [1, 2]
    assert json.loads((out / "summary.json").read_text())["seconds"] >= saved["notes"]["seconds"] > 0


def test_auto_starts_goes_on_and_is_done(sdxl_path, pairs, tmp_path, capsys):
    """The same command line, the first time and after every interruption."""
    flags = [sdxl_path, pairs, tmp_path / "run", "--resume_from_checkpoint", "auto", "--checkpointing_steps", 2]
    whole = train(*flags)
    before = results(whole)
    capsys.readouterr()
    train(*flags)
    assert "done already, all 4 steps" in capsys.readouterr().err
    # killed before the first checkpoint: what was begun is begun anew
    for path in whole.iterdir():
        if path.name not in ("config.yaml", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (whole / ".tmp-abc-config.yaml").touch()
    train(*flags)
    assert results(whole) == before
    # killed after a checkpoint
    shutil.rmtree(whole / "checkpoint-4")
    (whole / "summary.json").unlink()
    train(*flags)
    assert results(whole) == before
    assert not list(whole.glob(".tmp-*"))


def test_auto_replaces_nothing_that_it_does_not_know(sdxl_path, pairs, tmp_path, capsys):
    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 1)
    shutil.rmtree(out / "checkpoint-1")  # the result of a run whose checkpoints were deleted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(flags_for(sdxl_path, pairs, out, "--resume_from_checkpoint", "auto")) == 2
    assert "is not empty" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_cache_in_the_output_folder_stays(sdxl_path, pairs, tmp_path):
    """Also where the first start was killed while the cache was filled."""
    out = tmp_path / "run"
    more = ["--latent_cache_dir", out / "cache", "--resume_from_checkpoint", "auto", "--max_train_steps", 1]
    train(sdxl_path, pairs, out, *more)
    filled = {path.relative_to(out): path.read_bytes() for path in (out / "cache").rglob("*.bin")}
    assert filled
    for path in out.iterdir():
        if path.name != "cache":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = results(train(sdxl_path, pairs, out, *more))
    assert before == results(
        train(sdxl_path, pairs, out, "--latent_cache_dir", out / "cache", "--overwrite", "--max_train_steps", 1)
    )
    assert filled == {path.relative_to(out): path.read_bytes() for path in (out / "cache").rglob("*.bin")}


def test_metrics_are_the_same_wherever_a_run_was_stopped(sdxl_path, pairs, tmp_path, monkeypatch):
    """A line is the mean over the pairs since the line before, also if the run stopped between the two, in a step."""
    more = ["--log_every", 3, "--max_train_steps", 6, "--gradient_accumulation_steps", 2]
    whole = train(sdxl_path, pairs, tmp_path / "whole", *more)
    loss, calls = Trainer.loss, []

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * 4 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *arguments)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "loss", counted)
        assert main(flags_for(sdxl_path, pairs, parts, *more)) == 130
    assert [checkpoint.step_of(folder) for folder in checkpoint.all_of(parts)] == [4]
    train(sdxl_path, pairs, parts, *more, "--resume_from_checkpoint", "latest")
    timed = ("step_time", "data_wait", "pairs_per_second", "peak_memory_gib")
    assert [{k: v for k, v in line.items() if k not in timed} for line in lines(parts)] == [
        {k: v for k, v in line.items() if k not in timed} for line in lines(whole)
    ]


def test_a_signal_passed_on_by_a_launcher_is_one(sdxl_path, pairs, tmp_path, monkeypatch):
    loss, calls = Trainer.loss, []

    def counted(self, *arguments):
        calls.append(1)
        for _ in range(2 if len(calls) == 2 else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *arguments)

    monkeypatch.setattr(Trainer, "loss", counted)
    assert main(flags_for(sdxl_path, pairs, tmp_path / "run")) == 130
    assert [checkpoint.step_of(folder) for folder in checkpoint.all_of(tmp_path / "run")] == [2]


def test_a_run_that_lost_its_folder_stops(sdxl_path, pairs, tmp_path, monkeypatch, capsys):
    from dpo_fast import output_folder

    hold = output_folder.hold

    def losing(folder):
        held = hold(folder)
        held.lost = "expired"
        return held

    monkeypatch.setattr(output_folder, "hold", losing)
    assert main(flags_for(sdxl_path, pairs, tmp_path / "run")) == 2
    assert "the lease on the folder was lost (expired)" in capsys.readouterr().err
    assert not checkpoint.all_of(tmp_path / "run")


def test_fewer_steps_than_were_done_are_refused(sdxl_path, pairs, tmp_path, capsys):
    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 2)
    assert main(flags_for(sdxl_path, pairs, out, "--max_train_steps", 1, "--resume_from_checkpoint", "latest")) == 2
    assert "of step 2, after the last of --max_train_steps 1" in capsys.readouterr().err


def test_checkpoints_by_the_clock(sdxl_path, pairs, tmp_path):
    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 3, "--checkpointing_minutes", 1e-6)
    assert [checkpoint.step_of(folder) for folder in checkpoint.all_of(out)] == [1, 2, 3]


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    ("step", "sent"),
    [
        (0, "SIGTERM"),
        (1, "SIGUSR1"),
        *(
            pytest.param(step, sent, marks=pytest.mark.exhaustive)
            for step, sent in ((0, "SIGINT"), (0, "SIGHUP"), (1, "SIGINT"), (1, "SIGTERM"), (1, "SIGHUP"))
        ),
    ],
)
def test_a_signal_is_heard_between_micro_batches(
    default_signals, sdxl_path, pairs, tmp_path, capfd, monkeypatch, sent, step
):
    """The step in progress is given up, the state after the last whole one is saved, and nothing changes by it."""
    more = ["--gradient_accumulation_steps", 8, "--max_train_steps", 2]
    loss, calls = Trainer.loss, []

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) == 8 * step + 3:
            os.kill(os.getpid(), getattr(signal, sent))
        return loss(self, *arguments)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "loss", counted)
        assert main(flags_for(sdxl_path, pairs, out, *more)) == 130
    assert len(calls) == 8 * step + 3  # the micro-batch in progress was the last
    error = capfd.readouterr().err
    assert f"{sent}: stopping after the micro-batch in progress" in error
    assert f"{sent} after step {step}: saved as {out / f'checkpoint-{step}'}" in error
    train(sdxl_path, pairs, out, *more, "--resume_from_checkpoint", "latest")
    if (step, sent) in ((0, "SIGTERM"), (1, "SIGUSR1")):
        whole = train(sdxl_path, pairs, tmp_path / "whole", *more)
        assert_same_state(whole, out, 2)


def test_another_batch_split_may_resume(sdxl_path, pairs, tmp_path):
    out = tmp_path / "run"
    train(sdxl_path, pairs, out, "--pairs_per_step", 4, "--max_train_steps", 2)
    train(sdxl_path, pairs, out, "--pairs_per_step", 4, "--train_batch_size", 4, "--resume_from_checkpoint", "latest")
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


REFUSED = {
    "beta": ["--beta_dpo", 2000],
    "seed": ["--seed", 1],
    "pairs a step": ["--gradient_accumulation_steps", 2],
    "rank": ["--rank", 8],
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_are_refused_and_shown(sdxl_path, pairs, tmp_path, capsys, name):
    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main(flags_for(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest", *REFUSED[name])) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "->" in error and "other settings" in error
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_another_base_model_is_refused(sdxl_path, sd15_path, pairs, tmp_path, capsys):
    from tests.helpers import pipelines

    out = train(sdxl_path, pairs, tmp_path / "run", "--max_train_steps", 1)
    changed = pipelines.make_sdxl(tmp_path / "model", seed=5)
    kept = tmp_path / "kept"
    os.rename(changed, kept)
    flags = flags_for(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest")
    state = out / "checkpoint-1" / "state.json"
    saved = json.loads(state.read_text())
    saved["config"]["pretrained_model_name_or_path"] = str(kept)
    del saved["digest"]
    write_signed_json(state, saved)
    assert main([str(kept) if flag == str(sdxl_path) else flag for flag in flags]) == 2
    assert "base weights: " in capsys.readouterr().err


def as_earlier_versions_wrote(folder: Path, base: dict[str, str]) -> None:
    """Move a checkpoint's counters to the optimizer's tensors, and give it the earlier fingerprint `base`."""
    state = json.loads((folder / "state.json").read_text())
    optimizer, counters = (load_file(folder / f"{name}.safetensors") for name in ("optimizer", "counters"))
    save_file(optimizer | {f"|{name}": value for name, value in counters.items()}, folder / "optimizer.safetensors")
    (folder / "counters.safetensors").unlink()
    del state["files"]["counters"], state["digest"], state["fingerprints"]["base weights"]
    state["files"]["optimizer"] = file_digest(folder / "optimizer.safetensors")
    state["fingerprints"] |= base
    write_signed_json(folder / "state.json", state)


def test_a_checkpoint_of_an_earlier_version_goes_on(sd15_path, pairs, tmp_path, capsys):
    more = ["--checkpointing_steps", 2, "--objective", "kto", "--mixed_precision", "fp16"]
    whole = train(sd15_path, pairs, tmp_path / "whole", *more)
    out = train(sd15_path, pairs, tmp_path / "run", *more)
    for later in checkpoint.all_of(out)[1:]:
        shutil.rmtree(later)
    unet = load_model(sd15_path, dtype=torch.float16, device="cpu").unet
    as_earlier_versions_wrote(out / "checkpoint-2", older_fingerprint(unet))
    train(sd15_path, pairs, out, *more, "--resume_from_checkpoint", "latest")
    assert_same_state(whole, out)
    assert lines(whole)[-1]["loss"] == lines(out)[-1]["loss"]

    as_earlier_versions_wrote(out / f"checkpoint-{STEPS}", {"base model": "0" * 16})
    assert main(flags_for(sd15_path, pairs, out, *more, "--resume_from_checkpoint", "latest")) == 2
    assert "base model: 0000000000000000 -> " in capsys.readouterr().err


def test_an_older_checkpoint_goes_on_elsewhere(sdxl_path, pairs, tmp_path, capsys):
    """Beside later checkpoints it would leave a folder of two histories."""
    more = ["--checkpointing_steps", 1]
    out = train(sdxl_path, pairs, tmp_path / "run", *more, "--max_train_steps", 3)
    flags = flags_for(sdxl_path, pairs, out, *more, "--resume_from_checkpoint", "checkpoint-1")
    assert main(flags) == 2
    assert "later checkpoints than step 1 (checkpoint-2, checkpoint-3)" in capsys.readouterr().err
    again = train(sdxl_path, pairs, tmp_path / "again", *more, "--resume_from_checkpoint", out / "checkpoint-1")
    assert_same_state(out, again, 3)


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            process.kill()
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.faults
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(sdxl_path, pairs, tmp_path, sent):
    out = tmp_path / "run"
    process = start(
        *flags_for(sdxl_path, pairs, out, "--no-prove", "--max_train_steps", 100000, "--dataloader_num_workers", 1)
    )
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) > 2, process)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error and f"--output_dir {out} --resume_from_checkpoint auto goes on" in error
    (saved,) = checkpoint.all_of(out)
    step = json.loads((saved / "state.json").read_text())["step"]
    train(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest", "--max_train_steps", step + 1)
    assert [line["step"] for line in lines(out)][-1] == step + 1
    whole = train(sdxl_path, pairs, tmp_path / "whole", "--max_train_steps", step + 1)
    assert_same_state(whole, out, step + 1)


@pytest.mark.faults
def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(sdxl_path, pairs, tmp_path):
    out = tmp_path / "run"
    process = start(
        *flags_for(sdxl_path, pairs, out, "--no-prove", "--max_train_steps", 100000, "--checkpointing_steps", 1)
    )
    wait_for(lambda: len(checkpoint.all_of(out)) > STEPS, process)
    process.kill()
    process.communicate()
    last = int(checkpoint.all_of(out)[-1].name.removeprefix(checkpoint.PREFIX))
    train(sdxl_path, pairs, out, "--resume_from_checkpoint", "latest", "--max_train_steps", last + 2)
    assert [line["step"] for line in lines(out)] == list(range(1, last + 3))
    assert not list(out.glob(".tmp-*"))
    whole = train(sdxl_path, pairs, tmp_path / "whole", "--max_train_steps", last + 2)
    assert_same_state(whole, out, last + 2)


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_samples_of_the_base_are_drawn_again_by_a_run_that_has_no_base_any_more(sdxl_path, pairs, tmp_path, damage):
    """Of full tuning with a cached reference no copy of the base is held: they are drawn before the checkpoint is."""
    more = ["--tuning", "full", "--cached_reference", 2, "--run_validation", "--validation_prompts", "a cat"]
    more += ["--sampling_steps", 1, "--learning_rate", 1e-2]
    out = train(sdxl_path, pairs, tmp_path / "run", *more, "--max_train_steps", 1)
    file = out / "samples" / "base-0.png"
    data = file.read_bytes()
    file.write_bytes(data[:-100]) if damage == "cut" else file.unlink()
    train(sdxl_path, pairs, out, *more, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert file.read_bytes() == data
