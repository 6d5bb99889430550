"""Input that cannot be used: one line that carries the value and the remedy, exit status 2, nothing half-written."""

import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dpo_fast.data.pairs import build_index
from dpo_fast.train import main
from dpo_fast.training import checkpoint
from tests.helpers import disks
from tests.helpers.pairs import pickapic, write_pickapic, write_table
from tests.helpers.runs import command, environment, flags_for, train


def edited(pairs: Path, path: Path, **columns: list) -> Path:
    """A copy of a parquet file of pairs with some columns replaced, or removed (None)."""
    table = pq.read_table(pairs).to_pydict()
    for name, values in columns.items():
        if values is None:
            del table[name]
        else:
            table[name] = [value if value is not ... else table[name][i] for i, value in enumerate(values)]
    pq.write_table(pa.table(table), path)
    return path


def corrupt_image(pairs: Path, folder: Path) -> Path:
    whole = pq.read_table(pairs).to_pydict()["jpg_0"]
    return edited(pairs, folder / "pairs.parquet", jpg_0=[whole[0][: len(whole[0]) // 2], *[...] * (len(whole) - 1)])


def model_with(sdxl: Path, folder: Path, change) -> Path:
    copy = shutil.copytree(sdxl, folder / "model")
    change(copy)
    return copy


def damage_vae(model: Path) -> None:
    """A VAE whose latents overflow fp16."""
    from safetensors.torch import load_file, save_file

    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["quant_conv.bias"] += 1e6
    save_file(state, file, metadata={"format": "pt"})


def spoil_unet(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})


# name -> (what makes model, pairs and flags, what the line must say)
CASES = {
    "missing column": (lambda m, p, t: (m, edited(p, t / "p.parquet", label_0=None), []), ["label_0"]),
    "corrupt JPEG": (lambda m, p, t: (m, corrupt_image(p, t), []), ["row 0: jpg_0", "--max_bad_fraction"]),
    "label 0.7": (
        lambda m, p, t: (m, edited(p, t / "p.parquet", label_0=[0.7, *[...] * 11]), []),
        ["row 0: label_0 is 0.7", "--soft_labels"],
    ),
    "all ties": (lambda m, p, t: (m, edited(p, t / "p.parquet", label_0=[0.5] * 12), []), ["12 ties", "--soft_labels"]),
    "empty set": (lambda m, p, t: (m, write_pickapic(t / "p.parquet", n=0, size=72), []), ["no rows"]),
    "no such data": (lambda m, p, t: (m, t / "nowhere", []), ["nowhere"]),
    "unknown split": (lambda m, p, t: (m, p, ["--dataset_split_name", "best"]), ["best"]),
    "no such model": (lambda m, p, t: (t / "nowhere", p, []), ["nowhere"]),
    "wrong folder": (lambda m, p, t: (p.parent, p, []), ["model_index.json"]),
    "pickled model": (lambda m, p, t: (t / "model.ckpt", p, []), ["safetensors"]),
    "resolution 130": (lambda m, p, t: (m, p, ["--resolution", 130]), ["--resolution (130)", "multiple of"]),
    "odd pairs_per_step": (lambda m, p, t: (m, p, ["--pairs_per_step", 5]), ["--pairs_per_step (5)", "multiple"]),
    "lr nan": (lambda m, p, t: (m, p, ["--learning_rate", "nan"]), ["--learning_rate (nan)"]),
    "unknown flag": (
        lambda m, p, t: (m, p, ["--batch_size", 4]),
        ["--batch_size", "did you mean --eval_batch_size or --train_batch_size?"],
    ),
    "no timesteps": (lambda m, p, t: (m, p, ["--min_timestep", 1000]), ["--min_timestep (1000)", "0 to 999"]),
    "crossed timesteps": (
        lambda m, p, t: (m, p, ["--min_timestep", 500, "--max_timestep", 500]),
        ["--max_timestep (500)", "widen"],
    ),
    "LoRA target": (lambda m, p, t: (m, p, ["--lora_targets", "to_qq"]), ["to_qq"]),
    "missing extra": (lambda m, p, t: (m, p, ["--report_to", "comet_ml"]), ["comet_ml", "dpo_fast[trackers]"]),
    "missing xformers": (lambda m, p, t: (m, p, ["--attention", "xformers"]), ["xformers"]),
    "non-finite latent": (
        lambda m, p, t: (model_with(m, t, damage_vae), p, []),
        ["non-finite latent", "row ", "--pretrained_vae_model_name_or_path"],
    ),
    "non-finite model": (
        lambda m, p, t: (model_with(m, t, spoil_unet), p, []),
        ["1 tensors of the UNet are not finite", "conv_in.bias", "name another"],
    ),
    "backend not here": (lambda m, p, t: (m, p, ["--backend", "triton"]), ["--backend triton", "choose auto"]),
    "nothing to resume": (lambda m, p, t: (m, p, ["--resume_from_checkpoint", "latest"]), ["no checkpoint-N"]),
    "occupied folder": (lambda m, p, t: (m, p, occupy(t)), ["not empty", "--overwrite"]),
    "not a run to overwrite": (lambda m, p, t: (m, p, [*occupy(t), "--overwrite"]), ["does not look like a run"]),
    "output is a file": (lambda m, p, t: (m, p, ["--output_dir", p]), ["is a file"]),
}


def occupy(folder: Path) -> list:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("ten years of work")
    return []


@pytest.mark.parametrize("name", CASES)
def test_one_line_with_the_remedy(sdxl_path, pairs, tmp_path, capfd, name):
    make, said = CASES[name]
    model, data, flags = make(sdxl_path, pairs, tmp_path)
    assert_refused(flags_for(model, data, tmp_path / "out", *flags), said, capfd)
    left = {path.name for path in (tmp_path / "out").glob("*")} if (tmp_path / "out").is_dir() else set()
    assert not any(entry.startswith((".tmp", "checkpoint", "pytorch_lora", "summary")) for entry in left), left


OF_WEIGHTS = ("non-finite latent", "non-finite model")  # what only loading the model shows


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_WEIGHTS])
def test_a_dry_run_says_the_same_and_leaves_nothing(sdxl_path, pairs, tmp_path, capfd, name):
    make, said = CASES[name]
    model, data, flags = make(sdxl_path, pairs, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(flags_for(model, data, tmp_path / "out", *flags, "--dry-run"), said, capfd)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_flags_that_do_not_fit_the_family(sd15_path, pairs, tmp_path, capfd, more):
    assert_refused(flags_for(sd15_path, pairs, tmp_path / "out", "--time_ids", "real", *more), ["--time_ids"], capfd)
    polynomial = ["--lr_scheduler", "polynomial", "--learning_rate", 1e-8, *more]
    assert_refused(flags_for(sd15_path, pairs, tmp_path / "out", *polynomial), ["--lr_scheduler polynomial"], capfd)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_the_hub_must_give_is_asked_before_the_pairs_are_opened(sdxl_path, tmp_path, monkeypatch, capfd, more):
    """Offline: a preset's VAE, named with its flag, although the pairs do not exist either."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    flags = flags_for(sdxl_path, tmp_path / "nowhere", tmp_path / "out", "--preset", "sdxl-lora", *more)
    said = [
        "the VAE madebyollin/sdxl-vae-fp16-fix is not",
        "HF_HUB_OFFLINE is set",
        "--pretrained_vae_model_name_or_path",
    ]
    assert_refused(flags, said, capfd)
    assert not (tmp_path / "out").exists()


def assert_refused(flags: list[str], said: list[str], capfd) -> None:
    capfd.readouterr()
    assert main(flags) == 2
    error = capfd.readouterr().err
    (line,) = [text for text in error.replace("\r", "\n").splitlines() if text.startswith("dpo_fast: error: ")]
    assert "Traceback" not in error
    assert all(words in line for words in said), line


def test_a_run_that_could_not_start_does_not_block_the_next(sdxl_path, pairs, tmp_path, capfd):
    out = tmp_path / "out"
    assert_refused(flags_for(sdxl_path, corrupt_image(pairs, tmp_path), out), ["max_bad_fraction"], capfd)
    report = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["column"]) for row in report] == [(0, "jpg_0")]
    assert main(flags_for(sdxl_path, corrupt_image(pairs, tmp_path), out, "--max_bad_fraction", 0.5)) == 0
    assert json.loads((out / "summary.json").read_text())["bad_rows"] == 1


@pytest.mark.faults
def test_a_missing_package_names_its_extra(sdxl_path, pairs, tmp_path):
    """bitsandbytes hidden from a process of its own."""
    hide = "import sys; sys.modules['bitsandbytes'] = None; sys.argv = ['train', *sys.argv[1:]];"
    hide += "from dpo_fast.train import main; sys.exit(main())"
    python, *_ = command()
    flags = flags_for(sdxl_path, pairs, tmp_path / "out", "--use_8bit_adam")
    done = subprocess.run([python, "-c", hide, *flags], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'dpo_fast[gpu]'" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1200 KiB; needs the right to mount."""
    with disks.small_disk(tmp_path / "disk", "1200k") as disk:
        yield disk


@pytest.mark.faults
def test_a_disk_that_is_too_small_is_found_before_training(sdxl_path, pairs, small_disk, capfd):
    flags = flags_for(sdxl_path, pairs, small_disk / "out", "--tuning", "full")
    assert_refused(flags, ["MiB free", "need"], capfd)
    assert not (small_disk / "out").exists()


@pytest.mark.faults
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints_whole(sdxl_path, pairs, small_disk, capfd):
    out = small_disk / "out"
    flags = flags_for(sdxl_path, pairs, out, "--checkpointing_steps", 1, "--max_train_steps", 50)
    assert_refused(flags, ["No space left", "--resume_from_checkpoint auto"], capfd)
    kept = sorted(out.glob("checkpoint-*"))
    assert kept and not list(out.glob(".tmp-*"))
    for folder in kept:
        json.loads((folder / "state.json").read_text())
    for earlier in checkpoint.all_of(out)[:-1]:
        shutil.rmtree(earlier)
    assert main([*flags, "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1"]) == 0


@pytest.mark.faults
def test_a_read_only_disk(sdxl_path, pairs, small_disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_refused(flags_for(sdxl_path, pairs, small_disk / "out"), ["cannot be written", "Read-only"], capfd)


def test_a_non_finite_update_is_skipped_and_counted(sdxl_path, pairs, tmp_path, monkeypatch):
    """One micro-batch of NaNs: weights and moments stay, the step counts as skipped, training goes on."""
    from dpo_fast.models import Family
    from tests.helpers.runs import lines, train, weights

    denoise, calls = Family.denoise, []

    def faulty(self, unet, noisy, *rest):
        calls.append(0)
        prediction = denoise(self, unet, noisy, *rest)
        return prediction * torch.nan if len(calls) == 4 else prediction  # the policy's of step 2

    monkeypatch.setattr(Family, "denoise", faulty)
    out = train(sdxl_path, pairs, tmp_path / "run", "--checkpointing_steps", 1)
    assert [line["skipped_updates"] for line in lines(out)] == [0, 1, 1, 1]
    assert lines(out)[1]["loss"] is None and lines(out)[2]["loss"] is not None
    first, second, third = (weights(out, step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)


class Spoiled:
    """`Trainer.loss` with values that are not finite, from `first` on."""

    def __init__(self, monkeypatch, first: int = 0) -> None:
        from dpo_fast.training.trainer import Trainer

        loss, calls = Trainer.loss, []

        def spoiled(trainer, *arguments):
            calls.append(0)
            terms = loss(trainer, *arguments)
            return terms._replace(loss=terms.loss * torch.nan) if len(calls) > first else terms

        monkeypatch.setattr(Trainer, "loss", spoiled)


def test_updates_that_are_never_finite_stop_the_run(sdxl_path, pairs, tmp_path, monkeypatch, capfd):
    Spoiled(monkeypatch)
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--max_skipped_updates", 2)
    assert_refused(flags, ["2 updates were not finite", "--learning_rate"], capfd)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_whose_updates_were_all_skipped_publishes_nothing(sdxl_path, pairs, tmp_path, monkeypatch, capfd, tuning):
    """It ended as done, with exit status 0."""
    Spoiled(monkeypatch)
    out = tmp_path / "run"
    said = ["no update was finite: all 4 were skipped", "checkpoint-4 holds the state", "--learning_rate"]
    assert_refused(flags_for(sdxl_path, pairs, out, "--tuning", tuning), said, capfd)
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "config.yaml",
        "metrics.jsonl",
        "bad_rows.jsonl",
        "checkpoint-4",
    }


@pytest.mark.parametrize("more", [["--cache"], ["--no-cache"]], ids=str)
def test_a_run_without_a_pair_to_train_on_publishes_nothing(sdxl_path, tmp_path, monkeypatch, capfd, more):
    columns = pickapic()
    data = write_table(tmp_path / "pairs.parquet", {**columns, "jpg_1": columns["jpg_0"]})
    out, more = tmp_path / "run", [*more, "--latent_cache_dir", tmp_path / "cache"]
    assert_refused(flags_for(sdxl_path, data, out, *more), ["no training pair is left", "12 bad"], capfd)
    monkeypatch.setitem(build_index.__kwdefaults__, "check_pairs", 0)  # of a large set few are looked at
    said = ["no pair could be trained on", "bad_rows.jsonl", "identical images"]
    assert_refused(flags_for(sdxl_path, data, out, "--overwrite", *more), said, capfd)
    assert not (out / "summary.json").exists()
    again = flags_for(sdxl_path, data, out, *more, "--resume_from_checkpoint", "latest")
    assert_refused(again, said, capfd)


def test_pairs_left_out_while_training_are_told_at_the_end(sdxl_path, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(build_index.__kwdefaults__, "check_pairs", 0)
    columns = pickapic()
    columns["jpg_1"][3] = columns["jpg_0"][3]
    columns["jpg_1"][5] = columns["jpg_1"][5][:100]
    data = write_table(tmp_path / "pairs.parquet", columns)
    train(sdxl_path, data, tmp_path / "run", "--max_bad_fraction", 0.5, "--max_train_steps", 6)
    said = "2 rows were left out when they were met, 1 of them with identical images: "
    assert said in capfd.readouterr().err


def test_many_skipped_updates_are_told_of(sdxl_path, pairs, tmp_path, monkeypatch, capfd):
    Spoiled(monkeypatch, first=2)
    assert main(flags_for(sdxl_path, pairs, tmp_path / "run")) == 0
    assert "warning: 2 of 4 updates were not finite and were skipped" in capfd.readouterr().err


def test_weights_that_are_not_finite_are_not_published(sdxl_path, pairs, tmp_path, monkeypatch, capfd):
    from dpo_fast.training.optim import MasterOptimizer

    export = MasterOptimizer.export
    monkeypatch.setattr(MasterOptimizer, "export", lambda self: {n: w * torch.inf for n, w in export(self).items()})
    assert_refused(flags_for(sdxl_path, pairs, tmp_path / "run"), ["trained tensors are not finite, first"], capfd)
    assert not list((tmp_path / "run").glob("*.safetensors"))
