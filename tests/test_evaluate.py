"""The evaluation command: from a run, a pipeline or anybody's images to scores, win rates and a page."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dpo_fast.evaluate import main
from dpo_fast.evaluation.image_names import file_stem
from dpo_fast.evaluation.prompts import read_prompts
from dpo_fast.generate import main as generate
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.scorers.clip_models import VIT_L
from dpo_fast.shapes import base as shapes_base
from tests.helpers import scorer_files
from tests.helpers.runs import start, train
from tests.runs.test_distributed import TORCHRUN

TABLE = "Prompt\tCategory\na cat on a mat\tAnimals\na <b>Dog</b>!\tAnimals\na red hat\tArtifacts\n"
TEXTS = ("a cat on a mat", "a <b>Dog</b>!", "a red hat")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    scorer_files.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def moved(sdxl_path, pairs, tmp_path_factory) -> Path:
    return train(sdxl_path, pairs, tmp_path_factory.mktemp("runs") / "moved", "--learning_rate", 1e-2)


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.tsv").write_text(TABLE)
    return tmp_path / "prompts.tsv"


@pytest.fixture
def evaluate(tmp_path, published, prompts):
    """Run the command into `tmp_path/out`, or into the folder that is named; returns the folder."""

    def run(
        policy: Path,
        *flags: object,
        out: str = "out",
        scorers=("pickscore", "clip"),
        status: int = 0,
        generated: bool = True,
    ) -> Path:
        argv = ["--policy", policy, "--scorers", *scorers, "--scorer_models", published, "--output_dir", tmp_path / out]
        argv += [] if "--prompts" in flags else ["--prompts", prompts]
        argv += ["--sampling_steps", 2, "--resolution", 64] if generated else []
        assert main([str(word) for word in (*argv, *flags)]) == status
        return tmp_path / out

    return run


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def images_for(texts: tuple[str, ...], folder: Path, number: int = 1, side: int = 48) -> Path:
    folder.mkdir(parents=True)
    for text in texts:
        for k in range(number):
            pixels = np.random.randint(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{file_stem(text)}-{k}.jpg")
    return folder


def test_from_a_run_to_the_page(moved, tmp_path, evaluate, capfd):
    out = evaluate(moved, "--seeds", 2)
    said = capfd.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluation.json", "images", "report.html", "scores", "scores.parquet", "summary.json"
    ]  # fmt: skip
    found, table = summary(out), pq.read_table(out / "scores.parquet").to_pydict()
    assert (found["scorer"], found["prompts"], found["images"]) == ("pickscore", 3, 6)
    assert list(found["scores"]) == ["pickscore", "clip"] and list(found["categories"]) == ["Animals", "Artifacts"]
    low, high = found["win_rate_ci95"]
    assert 0 <= low <= found["win_rate"] <= high <= 1
    assert table["model"] == ["base"] * 6 + ["policy"] * 6 and table["seed"] == [0, 1] * 6
    assert table["prompt"][:6] == [text for text in TEXTS for _ in range(2)]
    wins = [p > b for b, p in zip(table["pickscore"][:6], table["pickscore"][6:], strict=True)]
    assert found["win_rate"] == pytest.approx(np.mean(wins))
    assert list(found["models"]) == ["base", "policy"] and len(found["models"]["policy"]) == 2  # a LoRA on the base
    revisions = [of for files in found["models"].values() for of in files.values()]
    revisions += [of for made in found["scorers"].values() for of in made["revisions"].values()]
    assert len(revisions) == 6 and all(re.fullmatch("files [0-9a-f]{16}", of) for of in revisions)
    page = (out / "report.html").read_text()
    assert all(of in page for of in revisions)
    assert "a &lt;b&gt;Dog&lt;/b&gt;!" in page and "<b>Dog</b>!" not in page and "Animals" in page
    assert "moved against base\nprompts.tsv: 3 prompts, 6 images of each" in said and "pickscore" in said
    assert f"{out / 'report.html'}" in said

    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (out / "images").rglob("*.png")}
    before |= {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (out / "scores").rglob("*.json")}
    evaluate(moved, "--seeds", 2, scorers=("clip", "hpsv2.1"))  # a scorer more: nothing else is done again
    assert all((file.stat().st_mtime_ns, file.read_bytes()) == was for file, was in before.items())
    again = summary(out)
    assert (
        list(again["scores"]) == ["clip", "hpsv2.1"]
        and again["scores"]["clip"]["win_rate"] == found["scores"]["clip"]["win_rate"]
    )


@pytest.fixture(scope="module")
def begun(moved, tmp_path_factory) -> Path:
    """The checkpoint of a run that has no result yet."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    shutil.copytree(moved / "checkpoint-4", folder / "checkpoint-4")
    shutil.copy(moved / "config.yaml", folder)
    return folder / "checkpoint-4"


def test_a_checkpoint_is_a_policy_like_any_other(moved, begun, evaluate, pairs, tmp_path, capfd):
    """The last one gives, but for rounding, what the result gives."""
    flags = ["--dataset_name", pairs, "--draws", 1]
    found, of_result = (summary(evaluate(one, *flags, out=one.name)) for one in (begun, moved))
    assert list(found["models"]) == ["base", "policy"] and (found["step"], found["strength"]) == (4, 1.0)
    assert "step" not in of_result and found["run"] == of_result["run"]
    assert found["score_base"] == of_result["score_base"] != found["score_policy"]
    assert found["score_policy"] == pytest.approx(of_result["score_policy"], rel=1e-3)
    accuracies = [one["implicit"]["implicit_accuracy_one_draw"] for one in (found, of_result)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)
    page = (tmp_path / begun.name / "report.html").read_text()
    assert "run-checkpoint-4" in page and "of step 4" in page


def test_a_checkpoint_against_another_model(moved, begun, evaluate):
    found = summary(evaluate(moved, "--baseline", f"{begun}/", scorers=("clip",)))
    assert found["score_policy"] == pytest.approx(found["score_base"], rel=1e-3)


def test_checkpoints_that_cannot_be_used(begun, evaluate, tmp_path, capfd):
    copy = tmp_path / "run" / begun.name
    shutil.copytree(begun.parent, copy.parent)
    (copy / "weights.safetensors").write_bytes(b"x")
    evaluate(copy, status=2)
    assert f"{copy} cannot be used: weights.safetensors is damaged" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    evaluate(copy.parent, status=2, out="other")
    said = capfd.readouterr().err
    assert f"has no result yet ({WEIGHT_NAME}): let it finish, or name one of its checkpoints, such as {copy}" in said


def test_medians_of_several_images(moved, evaluate):
    out = evaluate(moved, "--seeds", 3, "--compare", "medians", scorers=("clip",))
    table, found = pq.read_table(out / "scores.parquet").to_pydict(), summary(out)
    base, policy = np.reshape(table["clip"], (2, 3, 3))
    wins = np.median(policy, 1) > np.median(base, 1)
    assert found["win_rate"] == pytest.approx(wins.mean()) and found["medians_compared"]


def test_anybodys_images_are_a_baseline(moved, tmp_path, evaluate, capfd):
    theirs = images_for(TEXTS[:2], tmp_path / "theirs", number=1)
    (theirs / "a boat.png").write_bytes((theirs / f"{file_stem(TEXTS[0])}-0.jpg").read_bytes())
    out = evaluate(moved, "--seeds", 2, "--baseline", theirs, scorers=("clip",))
    found, said = summary(out), capfd.readouterr().out
    assert (found["prompts"], found["images"]) == (2, 4) and found["about"]["base"] == "theirs"
    for line in (
        "1 of 3 prompts have no image in theirs and are left out",
        "2 prompts have fewer images in theirs than seeds",
        "1 images in theirs are of none of these prompts",
        "how the images of theirs were made is not known",
    ):
        assert line in said
    assert not (out / "images" / "theirs").exists()


def test_scores_by_other_weights_are_not_taken(tmp_path, published, prompts):
    models, out = Path(shutil.copytree(published, tmp_path / "models")), tmp_path / "out"
    sides = [images_for(TEXTS, tmp_path / name) for name in ("one", "two")]
    argv = ["--policy", sides[0], "--baseline", sides[1], "--prompts", prompts, "--scorers", "clip"]
    argv = [str(word) for word in (*argv, "--scorer_models", models, "--output_dir", out)]
    assert main(argv) == 0
    first = summary(out)["scores"]["clip"]
    assert main(argv) == 0 and summary(out)["scores"]["clip"] == first
    weights = models / VIT_L / "model.safetensors"
    save_file({k: t.flip(0) if t.ndim else t for k, t in load_file(weights).items()}, weights, {"format": "pt"})
    assert main(argv) == 0
    second = summary(out)["scores"]["clip"]
    assert second["base"] != first["base"]
    shutil.move(models, tmp_path / "moved")  # the same files elsewhere are the same scorer
    records = {file: file.stat().st_mtime_ns for file in (out / "scores").glob("clip-*/shard-*")}
    assert len(records) == 4  # two files a scorer
    argv[argv.index(str(models))] = str(tmp_path / "moved")
    assert main(argv) == 0
    after = {file: file.stat().st_mtime_ns for file in (out / "scores").glob("clip-*/shard-*")}
    assert after == records and summary(out)["scores"]["clip"] == second


def test_images_against_themselves_have_exactly_one_half(tmp_path, evaluate):
    one = images_for(TEXTS, tmp_path / "one", number=2)
    shutil.copytree(one, tmp_path / "two")
    out = evaluate(
        one, "--baseline", tmp_path / "two", scorers=("pickscore", "hpsv2", "clip", "aesthetic"), generated=False
    )
    for of in summary(out)["scores"].values():
        assert [of["win_rate"][key] for key in ("rate", "low", "high", "ties")] == [0.5, 0.5, 0.5, 6]


@pytest.mark.exhaustive
def test_a_model_against_its_copy_with_other_seeds(tmp_path):
    """The built-in base: whatever its images score, it is no better than itself."""
    model = Path(shapes_base.__file__).parent / "pipeline"
    made = ["--policy", model, "--baseline", "none", "--prompts", "shapes", "--sampling_steps", 10, "--batch_size", 64]
    for name, seeds in (("one", "0,"), ("two", "1,")):
        argv = [*made, "--sampling_guidance", 3, "--seeds", seeds, "--output_dir", tmp_path / name]
        assert generate([str(word) for word in argv]) == 0
    argv = ["--policy", tmp_path / "one" / "pipeline", "--baseline", tmp_path / "two" / "pipeline"]
    argv += ["--prompts", "shapes", "--scorers", "faithfulness", "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in argv]) == 0
    (of,) = summary(tmp_path / "out")["scores"].values()
    assert of["compared"] == len(read_prompts(["shapes"])) and of["win_rate"]["ties"] < of["compared"]
    assert of["win_rate"]["low"] < 0.5 < of["win_rate"]["high"]


def test_a_run_knows_its_own_evaluation(moved, prompts, published, tmp_path):
    """Prompts, scorers and the number of images are those of the training; the run's folder is enough."""
    run = shutil.copytree(moved, tmp_path / "run")
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    (tmp_path / "own.txt").write_text("\n".join(TEXTS))
    config |= {"eval_scorers": ["clip", "aesthetic"], "eval_prompts": str(tmp_path / "own.txt"), "eval_images": 7}
    file.write_text(yaml.safe_dump(config))
    flags = ["--policy", run, "--scorer_models", published, "--sampling_steps", 2, "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in flags]) == 0
    found = summary(tmp_path / "out")
    assert list(found["scores"]) == ["clip", "aesthetic"] and found["about"]["prompt_set"] == "own.txt"
    assert (found["prompts"], found["images"]) == (3, 7)
    more = ["--policy", run, "--scorer_models", published, "--sampling_steps", 2, "--max_prompts", 1]
    assert main([str(word) for word in (*more, "--output_dir", tmp_path / "one")]) == 0
    assert summary(tmp_path / "one")["images"] == 3  # as many of that prompt as before


def test_a_name_that_both_sides_have(moved, tmp_path, evaluate, pairs):
    theirs = images_for(TEXTS, tmp_path / "theirs" / "moved")
    for side in (["--policy", theirs, "--baseline", moved], ["--policy", moved, "--baseline", theirs]):
        out = evaluate(side[1], *side[2:], out=f"out-{side[1].parent.name}", scorers=("clip",))
        about = summary(out)["about"]
        assert {about["base"], about["policy"]} == {"moved", "moved-images"}
    base = shutil.copytree(moved, tmp_path / "base")  # a run in a folder of this name
    argv = ["--policy", base, "--dataset_name", pairs, "--draws", 2, "--output_dir", tmp_path / "implicit"]
    assert main([str(word) for word in argv]) == 0
    assert summary(tmp_path / "implicit")["implicit"]["ties"] == 0


def test_what_would_be_refused_later_is_refused_at_once(moved, pairs, tmp_path, evaluate, capfd):
    theirs = images_for(TEXTS[:2], tmp_path / "theirs")
    next(theirs.glob("a-cat*")).write_bytes(b"no image")
    others = images_for(("a boat",), tmp_path / "others")
    held_out = ["--dataset_name", pairs, "--draws", 1]
    for flags, message in (
        (["--baseline", theirs], "cannot be decoded"),
        (["--baseline", others], "no prompt has an image in both others and moved"),
        (["--scorer_models", "/nowhere", *held_out], "/nowhere/"),
    ):
        out = evaluate(moved, *flags, status=2, out=f"out-{message[:2]}")
        said = capfd.readouterr().err
        assert message in said and "Implicit rewards" not in said and not list(out.rglob("*.png"))


def test_only_prompts_that_their_images_are_of_are_generated(moved, tmp_path, evaluate):
    theirs = images_for(TEXTS[1:], tmp_path / "theirs")
    out = evaluate(moved, "--baseline", theirs, scorers=("clip",))
    assert len(list((out / "images" / "moved").iterdir())) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--baseline", "none"], "--baseline none leaves nothing to compare with"),
        (["--scorers", "beauty"], "there is no scorer 'beauty'; choose from"),
        (["--scorers", "faithfulness"], "is none of the shapes world's"),
        (["--label_column", "x"], "--label_column is of preference pairs: add --dataset_name"),
        (["--draws", "3"], "--draws is of preference pairs: add --dataset_name"),
        (["--seeds", "20000"], "--seeds (20000) must be 1 to 10000"),
        (["--draws", "0"], r"--draws (0) must be at least 1"),
        (["--seeds", "1,1"], "--seeds (1,1) must name each seed once"),
        (["--scorer_models", "/nowhere"], "/nowhere/yuvalkirstain/PickScore_v1 is no folder"),
        (["--baseline", "{none}"], "empty"),
        (["--compare", "means"], "--compare"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(moved, tmp_path, evaluate, capfd, flags, message):
    (tmp_path / "empty").mkdir()
    flags = [str(tmp_path / "empty") if flag == "{none}" else flag for flag in flags]
    out = evaluate(moved, *flags, status=2, scorers=() if "--scorers" in flags else ("pickscore",))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert message in line
    assert not list(out.rglob("*.png"))


def test_sides_that_are_refused(moved, tmp_path, evaluate, capfd):
    theirs = images_for(TEXTS, tmp_path / "theirs")
    several = tmp_path / "several"
    assert (
        generate(["--policy", str(moved), "--prompts", *TEXTS, "--sampling_steps", "1", "--output_dir", str(several)])
        == 0
    )
    cases = (
        ([theirs], "is a folder of images, so its base is not known: name a --baseline"),
        ([theirs, "--baseline", "base"], "is a folder of images, so its base is not known"),
        ([moved, "--baseline", several], "holds the images of several models: name one of the folders in it"),
        ([theirs, "--baseline", moved, "--dataset_name", "pairs.parquet"], "has no implicit reward"),
        ([theirs, "--baseline", theirs], "--sampling_steps is of generated images: leave it out"),
    )
    for flags, message in cases:
        capfd.readouterr()
        evaluate(*flags, status=2)
        assert message in capfd.readouterr().err


def test_a_folder_of_something_else_is_left_alone(moved, tmp_path, evaluate, capfd):
    before = {file: file.read_bytes() for file in moved.rglob("*") if file.is_file()}
    evaluate(moved, out=str(moved), status=2)
    assert "is not empty and holds no evaluation.json" in capfd.readouterr().err
    assert {file: file.read_bytes() for file in moved.rglob("*") if file.is_file()} == before
    theirs = images_for(TEXTS, tmp_path / "theirs")
    evaluate(moved, "--baseline", theirs, scorers=("clip",))
    evaluate(moved, scorers=("clip",), status=2)
    assert "holds an evaluation of other settings (baseline name: theirs before, base now" in capfd.readouterr().err


def test_the_implicit_reward_needs_no_images(moved, pairs, tmp_path, capfd):
    argv = ["--policy", moved, "--dataset_name", pairs, "--draws", 2, "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in argv]) == 0
    found = summary(tmp_path / "out")["implicit"]
    revisions = [found["files"]["pairs"][pairs.name], *found["files"]["reference"].values()]
    revisions += found["files"]["policy"].values()
    assert len(revisions) == 4 and all(re.fullmatch("files [0-9a-f]{16}", of) for of in revisions)
    assert found["pairs"] == 12 and found["draws"] == 2 and 0 <= found["implicit_accuracy"] <= 1
    assert not (tmp_path / "out" / "images").exists()
    assert main([str(word) for word in (*argv, "--scorers", "clip")]) == 2
    assert "--scorers is of images, and none are compared: add --prompts" in capfd.readouterr().err
    assert main([str(word) for word in argv]) == 0
    said = capfd.readouterr().out
    assert re.search(rf"implicit accuracy +{found['implicit_accuracy']:.3f} \[", said)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_find_what_one_finds(moved, tmp_path, prompts, published, evaluate):
    alone = evaluate(moved, "--seeds", 2)
    flags = ["--policy", moved, "--prompts", prompts, "--scorers", "pickscore", "clip", "--scorer_models", published]
    flags += ["--sampling_steps", 2, "--resolution", 64, "--seeds", 2, "--output_dir", tmp_path / "both"]
    process = start(*flags, launcher=TORCHRUN, program="evaluate")
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    tables = [pq.read_table(folder / "scores.parquet") for folder in (alone, tmp_path / "both")]
    assert tables[0].equals(tables[1])
    assert {**summary(alone), "about": None} == {**summary(tmp_path / "both"), "about": None}
