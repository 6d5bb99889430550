"""`dpo_fast.pick`: what is made, what is written, what is refused; and that no prompt both picks and judges."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.evaluate import main as evaluate
from dpo_fast.evaluation import picking
from dpo_fast.evaluation.pick_options import parse
from dpo_fast.evaluation.sides import is_run
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.trained import read_trained
from dpo_fast.pick import main as pick
from dpo_fast.train import main as train

SMALL = ["--images", "8", "--judge_images", "6", "--sampling_steps", "2", "--strengths", "0.5", "1", "2"]
TRAINING = (
    "--preset shapes --no-prove --seed 1 --max_train_steps 6 --checkpointing_steps 2 --train_batch_size 4"
    " --eval_images 4 --sampling_steps 2 --learning_rate 1e-3"
)


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.exhaustive)])
def run(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert train([*TRAINING.split(), "--tuning", request.param, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def picked(run) -> Path:
    """The folder of a pick; made once."""
    if not (run / "pick" / "pick.json").is_file():
        assert pick([str(run), *SMALL]) == 0
    return run / "pick"


def read(folder: Path) -> dict:
    return json.loads((folder / "pick.json").read_text())


def test_what_is_written(run, picked):
    found = read(picked)
    points = {(point["step"], point["strength"]): point for point in found["points"]}
    assert set(points) == {(step, strength) for step in (2, 4, 6) for strength in (0.5, 1.0, 2.0)}
    best = points[found["pick"]["step"], found["pick"]["strength"]]
    last = [point for point in points.values() if point["dropped_in_round"] is None]
    assert best in last and best["gain"]["value"] == max(point["gain"]["value"] for point in last)
    assert f"step {best['step']} at strength {best['strength']:g}" in found["why"] and found["scorer"] == "quality"
    assert found["judged"]["images"] == 6 and 0 <= found["judged"]["win_rate"]["low"] <= 1
    made = [*picked.glob("rounds/*/*/*.png")]
    assert len(made) == found["images"]["to_pick"] <= found["images"]["of_the_whole_grid"]
    assert (
        len([*picked.glob("judged/**/*.png")]) - len([*picked.glob("judged/**/grid.png")])
        == found["images"]["to_judge"]
    )
    with Image.open(picked / "surface.png") as sheet:
        assert sheet.width > 300 and len(sheet.convert("RGB").getcolors(1 << 20)) > 20
    assert "<html" in (picked / "report.html").read_text() and (picked / "scores.parquet").is_file()


def test_no_prompt_both_picks_and_judges(picked):
    rounds = {
        row["prompt"] for file in picked.glob("rounds/*/images.json") for row in json.loads(file.read_text())["images"]
    }
    listings = [*picked.glob("judged/images/images.json"), *picked.glob("judged/as-trained/images.json")]
    judged = {row["prompt"] for file in listings for row in json.loads(file.read_text())["images"]}
    assert rounds and judged and not rounds & judged


def test_the_result_has_the_picked_strength(run, picked):
    at = read(picked)["pick"]
    trained = read_trained(run / f"checkpoint-{at['step']}").weights
    if (run / WEIGHT_NAME).is_file():
        result = load_file(picked / WEIGHT_NAME)
        for name, value in trained.items():
            expected = value * (at["strength"] if ".lora_B." in name else 1)
            torch.testing.assert_close(result["unet." + name.replace(".default.", ".")], expected, rtol=1e-6, atol=0)
    else:
        result, base = (
            load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")
            for folder in (picked, picking.read_run(str(run)).pretrained_model_name_or_path)
        )
        for name, value in trained.items():
            torch.testing.assert_close(
                result[name], torch.lerp(base[name].float(), value, at["strength"]), rtol=0, atol=0
            )


def test_it_is_a_run_for_evaluate(picked, tmp_path):
    assert is_run(str(picked))
    flags = ["--policy", str(picked), "--seeds", "1", "--max_prompts", "2", "--output_dir", str(tmp_path / "out")]
    assert evaluate([*flags, "--prompts", "shapes"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["scores"]["quality"]["policy"] > 0


def test_the_same_command_makes_nothing_again_and_another_is_refused(run, picked, capsys):
    before = {
        file: file.stat().st_mtime_ns for file in picked.rglob("*.png") if file.name not in ("surface.png", "grid.png")
    }
    first = read(picked)
    assert pick([str(run), *SMALL]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before and read(picked) == first
    capsys.readouterr()
    assert pick([str(run), *SMALL, "--by", "win_rate"]) == 2
    assert "of other settings (by: gain before, win_rate now)" in capsys.readouterr().err


def test_what_it_costs_is_told_first(run, picked, capsys):
    capsys.readouterr()
    assert pick([str(run), *SMALL]) == 0
    told = capsys.readouterr()
    assert "9 points: 3 checkpoints x 3 strengths; rounds of 8 images a point; 80 images to pick" in told.err
    assert "on " in told.out and "prompts that did not pick (6 images)" in told.out and "surface.png" in told.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no run is named"),
        (["nowhere"], "nowhere is no output folder of dpo_fast.train"),
        (["RUN", "--strengths", "0"], "--strengths (0) must be above 0 and at most 4"),
        (["RUN", "--strengths", "nan"], "--strengths (nan) must be above 0"),
        (["RUN", "--strengths", "1", "1"], "--strengths (1 1) must name each value once"),
        (["RUN", "--checkpoints", "3"], "--checkpoints 3:"),
        (["RUN", "--images", "0"], "--images (0) must be at least 1"),
        (["RUN", "--scorers", "beauty"], "there is no scorer 'beauty'"),
        (["RUN", "--prompts", "one prompt"], "1 prompts are too few"),
        (
            ["RUN", "--scorers", "faithfulness", "--prompts", "a dog", "a cat", "a cow", "a hen"],
            "' is none of the shapes world's",
        ),
        (["RUN", "--sampling_guidance", "-1"], "--sampling_guidance (-1.0) must be 0 or more"),
        (["RUN", "--imags", "3"], "did you mean --images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_before_anything_is_made(run, tmp_path, capsys, flags, said):
    capsys.readouterr()
    out = ["--output_dir", str(tmp_path / "out")] if flags else []
    assert pick([*(str(run) if flag == "RUN" else flag for flag in flags), *out]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in line and not [*(tmp_path / "out").rglob("*.png")]


def test_a_run_without_checkpoints_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-*", "pick", "evaluation"))
    assert pick([str(copy), *SMALL]) == 2
    assert "holds no checkpoint: train with --checkpointing_steps" in capsys.readouterr().err


def test_the_result_of_a_run_that_was_ended_early_is_its_best_checkpoint(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("pick", "evaluation"))
    assert picking.plan(parse([str(copy)])).result == (6, 1.0)
    summary = read_signed_json(copy / "summary.json", "")
    write_signed_json(copy / "summary.json", summary | {"ended_early": {"at": 6, "result_of": 4}})
    assert picking.plan(parse([str(copy)])).result == (4, 1.0)


def test_of_many_checkpoints_some_are_tried_with_the_last():
    assert picking._spread(range(1, 101), 8)[-1] == 100 and len(picking._spread(range(1, 101), 8)) == 8
    assert picking._spread([5, 10], 8) == [5, 10]


def test_flags(run):
    config = parse([str(run), "--strengths", "1", "0.5", "--prompts", "shapes", "--scorers", "right"])
    assert config.strengths == (1.0, 0.5) and config.by == "gain" and config.scorers == ("right",)
