"""Looks at a run while it trains: what they say, when they end it, what the result is then, and resuming."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_fast.checksums import read_signed_json
from dpo_fast.evaluation import watching
from dpo_fast.evaluation.halving import in_two
from dpo_fast.files import delete
from dpo_fast.shapes.pairs import split
from dpo_fast.train import main
from tests.helpers.runs import start
from tests.runs.test_distributed import TORCHRUN

RUN = (
    "--preset shapes --no-prove --seed 1 --max_train_steps 6 --checkpointing_steps 100 --train_batch_size 4"
    " --eval_images 4 --sampling_steps 2 --learning_rate 1e-3 --eval_every 2 --eval_every_images 4"
).split()
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def train(folder: Path, *flags: str) -> dict:
    assert main([*RUN, *flags, "--output_dir", str(folder)]) == 0
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def planned(monkeypatch):
    """Give the looks planned scores: the base's first, then one value a look, each with a little spread."""

    def plan(*means: float) -> list[int]:
        left, looked = list(means), []

        def scores(self, trainer) -> torch.Tensor:
            looked.append(trainer.run.step)
            return left.pop(0) + 0.001 * torch.arange(4, dtype=torch.float64)

        monkeypatch.setattr(watching.Watch, "_scores", scores)
        return looked

    return plan


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run of two looks, which may be resumed but not to its end."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(folder, "--max_train_steps", "4")
    return folder


def test_looks_are_told_kept_and_judged_on_other_prompts(tmp_path, capsys):
    summary = train(tmp_path / "run")
    said = capsys.readouterr().err
    assert "every 2 steps 4 images of 4 prompts are scored by quality: 3 looks and the base, 16 images in all" in said
    assert "step 2: quality " in said and "the best so far" in said
    assert [look["step"] for look in summary["looks"]] == [2, 4, 6] and summary["ended_early"] is None
    assert all(look["gain"][1] <= look["gain"][0] <= look["gain"][2] for look in summary["looks"])
    listing = json.loads((tmp_path / "run" / "evaluation" / "images" / "images.json").read_text())
    judged = {row["prompt"] for row in listing["images"]}
    looked_at, other = in_two(split()[1])
    assert judged and judged <= set(other) and not judged & set(looked_at)


@pytest.mark.exhaustive
def test_looking_changes_nothing_of_the_training(tmp_path):
    train(tmp_path / "run")
    assert main([*RUN[: RUN.index("--eval_every")], "--output_dir", str(tmp_path / "plain")]) == 0
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "plain"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_that_gets_worse_is_ended_with_its_best(tmp_path, planned, capsys):
    looked, folder = planned(0.5, 0.6, 0.2), tmp_path / "run"
    summary = train(folder, "--stop_when_worse")
    assert looked == [0, 2, 4] and summary["steps"] == 4
    assert summary["ended_early"] == {"at": 4, "result_of": 2}
    assert "ended after step 4: the result is that of step 2" in capsys.readouterr().err
    best, result = load_file(folder / "checkpoint-2" / "weights.safetensors"), load_file(folder / WEIGHTS)
    assert all(torch.equal(result[name], value) for name, value in best.items())
    last = load_file(folder / "checkpoint-4" / "weights.safetensors")
    assert any(not torch.equal(result[name], value) for name, value in last.items())

    # it is done: another start with auto does nothing, and without the flag the run goes on where it ended
    again = [*RUN, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    assert main([*again, "--stop_when_worse"]) == 0 and "is done already, all 4 steps" in capsys.readouterr().err
    planned(0.55)
    assert main(again) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["ended_early"] is None and len(summary["looks"]) == 3


def test_what_may_be_chance_ends_nothing(tmp_path, monkeypatch):
    values = iter([[0.5] * 4, [0.6] * 4, [0.9, 0.2, 0.7, 0.5], [0.6] * 4])
    monkeypatch.setattr(watching.Watch, "_scores", lambda self, trainer: torch.tensor(next(values)).double())
    assert train(tmp_path / "run", "--stop_when_worse")["steps"] == 6


def test_a_resumed_run_remembers_its_looks(tmp_path, planned):
    looked = planned(0.5, 0.6, 0.61)
    folder = tmp_path / "run"
    train(folder, "--max_train_steps", "4")
    assert looked == [0, 2, 4]
    looked = planned(0.1)
    summary = train(folder, "--resume_from_checkpoint", "latest", "--stop_when_worse")
    assert looked == [6] and summary["ended_early"] == {"at": 6, "result_of": 4}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval_every_images", "6"], "--eval_every_images was 4 and is 6, so that looks before and after cannot be"),
        (["--eval_scorers", "appeal"], "--eval_scorers was quality and is appeal"),
        (["--eval_prompts", "OTHERS"], "--eval_prompts differs"),
    ],
    ids=["images", "scorer", "prompts"],
)
def test_a_resumed_run_looks_at_the_same_images(begun, tmp_path, planned, capsys, flags, said):
    others = tmp_path / "others.txt"
    others.write_text("\n".join(split()[0][:8]))
    flags = [str(others) if flag == "OTHERS" else flag for flag in flags]
    looked = planned()
    assert main([*RUN, *flags, "--output_dir", str(begun), "--resume_from_checkpoint", "latest"]) == 2
    assert said in capsys.readouterr().err and not looked


def test_no_line_of_metrics_is_lost_with_a_checkpoint_of_a_look(tmp_path, planned):
    planned(0.5, 0.6, 0.5, 0.5)
    folder = tmp_path / "run"
    train(folder, "--log_every", "2")
    before = steps_logged(folder)
    for name in ("checkpoint-6", "summary.json"):
        delete(folder / name)
    assert {one.name for one in folder.glob("checkpoint-*")} == {"checkpoint-2"}
    planned(0.5, 0.5)
    train(folder, "--log_every", "2", "--resume_from_checkpoint", "latest")
    assert steps_logged(folder) == before == [1, 2, 4, 6]


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_score_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    class Broken:
        def score(self, images, prompts):
            return torch.full([len(prompts)], torch.nan)

    monkeypatch.setattr(watching, "load_scorer", lambda *names, **where: Broken())
    assert main([*RUN, "--output_dir", str(tmp_path / "run")]) == 2
    assert "step 0: quality gives an image of '" in capsys.readouterr().err


def test_the_best_checkpoint_is_not_deleted(tmp_path, planned):
    planned(0.5, 0.9, 0.8999, 0.8998)
    folder = tmp_path / "run"
    train(folder, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    assert {one.name for one in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert read_signed_json(folder / "summary.json", "")["looks"][0]["step"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval_every", "0"], "--eval_every (0) must be at least 1"),
        (["--eval_every_images", "1"], "--eval_every_images (1) must be at least 2"),
        (["--eval_prompts", "ONE"], "--eval_every needs at least 2 prompts"),
    ],
)
def test_what_is_refused(tmp_path, capsys, flags, said):
    one = tmp_path / "one.txt"
    one.write_text(split()[1][0] + "\n")
    flags = [str(one) if flag == "ONE" else flag for flag in flags]
    assert main([*RUN, *flags, "--output_dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()


def test_flags_that_need_another(tmp_path, capsys):
    model = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path / "run")]
    assert main([*model, "--eval_every", "5"]) == 2
    assert "--eval_every (5) needs a scorer" in capsys.readouterr().err
    assert main([*model, "--stop_when_worse"]) == 2
    assert "--stop_when_worse needs --eval_every N" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_look_as_one(tmp_path):
    """Each rank scores its share of the images, and both end with the same checkpoint."""
    one, two = tmp_path / "one", tmp_path / "two"
    # at this rate the scores fall at once
    flags = [*RUN, "--stop_when_worse", "--learning_rate", "0.1", "--eval_every_images", "9"]
    train(one, *flags[len(RUN) :], "--gradient_accumulation_steps", "2")
    process = start(*flags, "--output_dir", two, launcher=TORCHRUN)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert error.count("every 2 steps 9 images of 9 prompts are scored by quality") == 1
    alone, both = (json.loads((folder / "summary.json").read_text()) for folder in (one, two))
    assert both["ended_early"] == alone["ended_early"] is not None and len(both["looks"]) == len(alone["looks"])
    for look, other in zip(alone["looks"], both["looks"], strict=True):
        assert look["step"] == other["step"] and other["gain"] == pytest.approx(look["gain"], abs=1e-4)
    assert {path.name for path in one.glob("checkpoint-*")} == {path.name for path in two.glob("checkpoint-*")}
