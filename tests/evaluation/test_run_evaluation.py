"""A whole run that is compared with its base at the end: numbers, picture, page, scores, what is refused."""

import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dpo_fast.api import training
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.evaluate import main as evaluate
from dpo_fast.evaluation import comparison, run_evaluation, sides
from dpo_fast.evaluation.findings import Findings
from dpo_fast.evaluation.generation import ImageRequest
from dpo_fast.evaluation.pairing import ImagePairs
from dpo_fast.evaluation.prompts import Prompt
from dpo_fast.evaluation.scored import Scored
from dpo_fast.files import delete
from dpo_fast.parallel import Ranks
from dpo_fast.pictures import before_after
from dpo_fast.scorers import MODULE_OF, Scorer, load_scorer
from dpo_fast.shapes import score
from dpo_fast.shapes.render import SCENES, render
from dpo_fast.train import main
from tests.helpers.runs import flags_for, start
from tests.runs.test_distributed import TORCHRUN

BATCHES: list[int] = []  # what `redness` was given since the fixture


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    assert len(images) == len(prompts)
    BATCHES.append(len(images))
    return images[:, 0].double().mean((1, 2)) - images[:, 1:].double().mean((1, 2, 3))


@pytest.fixture
def red(monkeypatch):
    """A scorer that knows any prompt, in the place of all."""
    BATCHES.clear()
    for module in (run_evaluation, sides):
        monkeypatch.setattr(module, "check_names", lambda names: None)
    monkeypatch.setattr(comparison, "load_scorer", lambda name, device, **_: Scorer(redness))
    monkeypatch.setattr(comparison, "facts", lambda name, device, **_: {"scorer": name})
    monkeypatch.setattr(comparison, "provenance", lambda name, device, **_: {"dtype": "float64", "revisions": {}})


@pytest.mark.usefixtures("red")
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_is_compared_with_its_base(sd15_path, pairs, tmp_path, tuning, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \na <b>hat</b>\n")
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--tuning", tuning, "--learning_rate", 1e-2)
    flags += ["--eval_scorers", "red", "--eval_prompts", str(tmp_path / "prompts.txt"), "--eval_images", "5"]
    flags += ["--eval_batch_size", "2", "--sampling_steps", "2"]
    assert main(flags) == 0
    assert BATCHES and max(BATCHES) == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["prompts"], summary["images"], summary["scorer"]) == (3, 5, "red")
    assert 0 <= summary["win_rate_ci95"][0] <= summary["win_rate"] <= summary["win_rate_ci95"][1] <= 1
    assert summary["score_base"] != summary["score_policy"]  # what was exported was loaded, and it differs
    assert list(summary["models"]["base"]) == [sd15_path.name] and set(summary["scorers"]) == {"red"}
    assert summary["models"]["policy"] != summary["models"]["base"]
    assert all(re.fullmatch("files [0-9a-f]{16}", of) for files in summary["models"].values() for of in files.values())
    assert summary["steps"] == 4 and summary["loss_first"] == pytest.approx(0.6931472)
    picture = np.asarray(Image.open(tmp_path / "run" / "samples.png"))
    assert picture.shape[2] == 3 and np.ptp(picture) > 50
    out = capsys.readouterr().out
    assert "run against base\nprompts.txt: 3 prompts, 5 images of each" in out
    assert " ".join(f"verdict: {summary['verdict']['sentence']}".split()) in " ".join(out.split())
    assert f"{summary['win_rate']:.3f} [" in out and "samples.png" in out and "report.html" in out
    assert max(map(len, out.split("loss ")[0].splitlines())) <= 110
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "scores.parquet", "samples.png"} <= written and not any(".tmp" in name for name in written)


@pytest.mark.usefixtures("red")
def test_what_a_run_keeps_of_its_comparison(sd15_path, pairs, tmp_path):
    texts = ["a cat", 'a <b>hat</b> & "more"', "ein Hündchen"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--learning_rate", 1e-2, "--sampling_steps", 2, "--seed", 3)
    flags += ["--eval_scorers", "red", "blue", "red", "--eval_prompts", str(tmp_path / "prompts.txt")]
    assert main([*flags, "--eval_images", "7"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())

    rows = pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist()
    of = {model: [row for row in rows if row["model"] == model] for model in ("base", "policy")}
    assert len(rows) == 2 * 7 and len(of["base"]) == 7
    for side in of.values():
        assert [row["prompt"] for row in side] == [texts[k] for k in (0, 0, 0, 1, 1, 2, 2)]  # taken in turn
        assert [row["seed"] for row in side] == [0, 1, 2, 0, 1, 0, 1]
    won = [(b["red"] < p["red"]) + (b["red"] == p["red"]) / 2 for b, p in zip(of["base"], of["policy"], strict=True)]
    assert summary["win_rate"] == pytest.approx(sum(won) / 7)
    for model, side in of.items():
        mean = sum(row["red"] for row in side) / 7
        assert summary[f"score_{model}"] == summary["scores"]["red"][model] == pytest.approx(mean)
    assert list(summary["scores"]) == ["red", "blue"] and list(summary["scores"]["red"]["win_rate"]) == [
        *("rate", "low", "high", "wins", "ties", "losses")
    ]
    assert summary["evaluation_seconds"] > 0 and {"saturation", "distance"} <= set(summary["signals"])
    assert "about" not in summary and isinstance(summary["warnings"], list)
    verdict, decides = summary["verdict"], "as red decides (the first of 2 scorers): win rate"
    assert verdict["scorer"] == "red"
    assert verdict["sentence"].startswith(f"{verdict['outcome']}, {decides} {summary['win_rate']:.3f} [")

    still = [*flags, "--eval_images", "7", "--learning_rate", "1e-30", "--output_dir", str(tmp_path / "still")]
    assert main(still) == 0  # what did not move says which side is the base's
    unmoved = pq.read_table(tmp_path / "still" / "scores.parquet").to_pylist()
    assert [row["red"] for row in unmoved] == 2 * [row["red"] for row in of["base"]]

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "a cat" in page and "ein Hündchen" in page and "a &lt;b&gt;hat&lt;/b&gt; &amp; &quot;more&quot;" in page
    assert (
        "<b>hat" not in page
        and f"{summary['win_rate']:.1%}" in page
        and sd15_path.name in page
        and "4 steps of 2 pairs, seed 3" in page
        and str(sd15_path) not in page
    )
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,20})|url\(([^)]{0,20})""", page)
    assert loaded and all("".join(one).startswith("data:image/") for one in loaded)


@pytest.mark.parametrize("gained", [0, 2, 12])
def test_the_sheet_shows_the_largest_gains_beside_pairs_drawn_at_random(gained, monkeypatch):
    rows = 24  # row k is of colour k, two of each prompt
    images = [torch.full((3, 16, 16), 10 * k, dtype=torch.uint8) for k in range(rows)]
    gain = torch.arange(rows).double() - (rows - gained) + 0.5
    pairs = ImagePairs([f"prompt {k // 2}" for k in range(rows)], [*range(rows)], None, images, images, [])
    of = Scored(pairs.prompts, pairs.seeds, {"first": torch.zeros(rows), "x": -gain}, {"first": gain, "x": gain})
    said = {}

    def drawn(before, after, captions, groups):
        said.update(rows=[image.getpixel((0, 0))[0] // 10 for image in before], captions=captions, groups=groups)
        assert [image.tobytes() for image in before] == [image.tobytes() for image in after]
        return before_after(before, after, captions, groups)

    monkeypatch.setattr(run_evaluation, "before_after", drawn)
    run_evaluation._samples(pairs, of)
    best = min(gained // 2, 4)  # one of a prompt
    assert said["rows"][:best] == [23, 21, 19, 17][:best]
    assert said["captions"] == [pairs.prompts[row] for row in said["rows"]]
    assert len(said["rows"]) == len(set(said["rows"])) == 8 == sum(said["groups"].values())
    assert said["groups"] == ({"largest gains by first, of 24 pairs": best} if best else {}) | {
        "drawn at random": 8 - best
    }


def test_scorers_are_opened_before_training_and_held_one_at_a_time(sd15_path, pairs, tmp_path, monkeypatch):
    loaded, events = [], []

    def load(name: str, device: object, **where: object) -> Scorer:
        assert [one() for one in loaded] == [None] * len(loaded), "an earlier scorer is still held"
        events.append((name, torch.device(device).type, where, (tmp_path / "run" / "summary.json").exists()))
        scorer = Scorer(redness, lambda prompts: events.append((name, prompts)))
        loaded.append(weakref.ref(scorer))
        return scorer

    monkeypatch.setattr(comparison, "load_scorer", load)
    monkeypatch.setattr(comparison, "facts", lambda name, device, **_: {"scorer": name})
    monkeypatch.setattr(comparison, "provenance", lambda name, device, **_: {"dtype": "float64", "revisions": {}})
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    where = {"where": tmp_path / "models", "cache_dir": str(tmp_path / "hub"), "token": "secret"}
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--sampling_steps", 2, "--eval_images", 3)
    flags += ["--scorer_models", str(where["where"]), "--cache_dir", where["cache_dir"], "--hub_token", where["token"]]
    flags += ["--eval_scorers", "clip", "pickscore", "--eval_prompts", str(tmp_path / "prompts.txt")]
    assert main(flags) == 0
    lines, late = ["a cat", "a dog"], "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("clip", "pickscore"):
        assert [events.pop(0) for _ in range(2)] == [(name, "cpu", where, False), (name, lines)]
    for name in ("clip", "pickscore"):
        assert events.pop(0) == (name, late, where, True)
        assert events.pop(0)[0] == name
    assert not events


def test_a_scorer_without_its_files_is_told_before_training(sdxl_path, pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--cache_dir", tmp_path / "empty")
    assert main([*flags, "--eval_scorers", "clip", "--eval_prompts", str(tmp_path / "prompts.txt")]) == 2
    error = capsys.readouterr().err.strip()
    assert "openai/clip-vit-large-patch14" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def evaluated(sd15_path: Path, pairs: Path, run: Path, *flags: object) -> list[str]:
    """A run's flags with its evaluation: 5 images of 2 prompts."""
    prompts = run.parent / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    words = ["--sampling_steps", 2, "--eval_images", 5, "--eval_scorers", "red", "--eval_prompts", prompts, *flags]
    return flags_for(sd15_path, pairs, run, "--learning_rate", 1e-2, *words)


@pytest.mark.usefixtures("red")
def test_evaluate_gives_the_numbers_of_the_training(sd15_path, pairs, tmp_path):
    run, later = tmp_path / "run", tmp_path / "later"
    assert main(evaluated(sd15_path, pairs, run)) == 0
    assert evaluate(["--policy", str(run), "--output_dir", str(later)]) == 0
    assert (later / "scores.parquet").read_bytes() == (run / "scores.parquet").read_bytes()
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, later))
    shared = ours.keys() & theirs.keys() - {"digest"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert theirs["run"]["seed"] == 0 and theirs["settings"] == theirs["about"]["settings"]
    assert theirs["win_rate"] == ours["win_rate"] and theirs["about"]["trained_towards_the_first"]
    assert len(list((later / "images").glob("*/*.png"))) == 2 * 5
    for image in (later / "images").glob("*/*.png"):
        assert image.read_bytes() == (run / "evaluation" / "images" / image.parent.name / image.name).read_bytes()


@pytest.mark.usefixtures("red")
def test_an_interrupted_evaluation_goes_on(sd15_path, pairs, tmp_path, monkeypatch):
    flags = [*evaluated(sd15_path, pairs, tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    with monkeypatch.context() as patched:
        patched.setattr(run_evaluation, "compare", interrupted(run_evaluation.compare))
        assert main(flags) == 130
    images = sorted((tmp_path / "run" / "evaluation" / "images").glob("*/*.png"))
    times = [image.stat().st_mtime_ns for image in images]
    delete(tmp_path / "run" / "evaluation" / "scores")  # as if it had been interrupted before
    assert len(images) == 10 and "win_rate" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert main(flags) == 0
    assert [image.stat().st_mtime_ns for image in images] == times
    assert "win_rate" in json.loads((tmp_path / "run" / "summary.json").read_text())


def interrupted(work: Callable) -> Callable:
    """`work`, interrupted once it is done."""

    def stop(*arguments: object, **named: object) -> None:
        work(*arguments, **named)
        raise KeyboardInterrupt

    return stop


@pytest.mark.usefixtures("red")
@pytest.mark.parametrize("name", ["evaluation.json", pytest.param("images/images.json", marks=pytest.mark.exhaustive)])
def test_a_damaged_record_is_made_again(sd15_path, pairs, tmp_path, monkeypatch, name, caplog):
    flags = [*evaluated(sd15_path, pairs, tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    with monkeypatch.context() as patched:
        patched.setattr(run_evaluation, "compare", interrupted(run_evaluation.compare))
        assert main(flags) == 130
    file = tmp_path / "run" / "evaluation" / name
    file.write_text(file.read_text()[:-20])
    assert main(flags) == 0
    assert f"{file.name} cannot be read" in caplog.text and "the evaluation is made again" in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == 5


@pytest.mark.usefixtures("red")
def test_prompts_are_those_read_before_the_training(sd15_path, pairs, tmp_path, monkeypatch, capsys):
    flags, file = evaluated(sd15_path, pairs, tmp_path / "run"), tmp_path / "prompts.txt"

    def edited(config: TrainConfig, prompts: list[Prompt], ranks: Ranks) -> Findings | None:
        file.unlink()
        return evaluate_run(config, prompts, ranks)

    evaluate_run = training.evaluate_run
    monkeypatch.setattr(training, "evaluate_run", edited)
    assert main(flags) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["prompts"] == 2
    capsys.readouterr()
    assert evaluate(["--policy", str(tmp_path / "run"), "--output_dir", str(tmp_path / "later")]) == 2
    said = capsys.readouterr().err
    assert f"--eval_prompts {file} cannot be read: it is no file and no set (partiprompts, " in said


@pytest.mark.usefixtures("red")
def test_prompts_of_a_table_have_categories(sd15_path, pairs, tmp_path, capsys):
    table = tmp_path / "prompts.tsv"
    table.write_text("Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\na hat\tThings\n")
    assert main([*evaluated(sd15_path, pairs, tmp_path / "run"), "--eval_prompts", str(table)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: found["red"]["compared"] for name, found in summary["categories"].items()} == {
        "Animals": 4,
        "Things": 1,
    }
    few = ["--policy", str(tmp_path / "run"), "--output_dir", str(tmp_path / "few"), "--max_prompts", "1"]
    assert evaluate(few) == 0
    assert json.loads((tmp_path / "few" / "summary.json").read_text())["images"] == 2  # a cat's
    table.write_text("a cat\n")
    flags = evaluated(sd15_path, pairs, tmp_path / "refused")
    assert main([*flags, "--eval_prompts", str(table)]) == 2
    assert f"--eval_prompts {table} is no table of prompts" in capsys.readouterr().err


@pytest.mark.usefixtures("red")
def test_a_run_that_is_trained_further_is_evaluated_anew(sd15_path, pairs, tmp_path):
    run = tmp_path / "run"
    assert main(evaluated(sd15_path, pairs, run, "--checkpointing_steps", 2)) == 0
    before = pq.read_table(run / "scores.parquet").to_pylist()
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", 6, "--checkpointing_steps", 2)
    assert main([*evaluated(sd15_path, pairs, run), *map(str, more), "--eval_images", "6"]) == 0
    after = pq.read_table(run / "scores.parquet").to_pylist()
    assert len(before) == 2 * 5 and len(after) == 2 * 6
    of = [
        {(row["prompt"], row["seed"]): row["red"] for row in rows if row["model"] == "policy"}
        for rows in (before, after)
    ]
    assert all(of[0][image] != of[1][image] for image in of[0])


@pytest.mark.usefixtures("red")
def test_another_evaluation_in_its_place_is_left_alone(sd15_path, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(flags_for(sd15_path, pairs, run)) == 0
    own = ["--prompts", "a cat on a mat", "--scorers", "red", "--sampling_steps", "2"]
    assert evaluate(["--policy", str(run), "--output_dir", str(run / "evaluation"), *own]) == 0
    before = (run / "evaluation" / "report.html").read_bytes()
    assert main([*evaluated(sd15_path, pairs, run), "--resume_from_checkpoint", "latest"]) == 2
    assert "is not of this run's evaluation, which is written there: move it away" in capsys.readouterr().err
    assert (run / "evaluation" / "report.html").read_bytes() == before


@pytest.mark.exhaustive
def test_two_processes_give_the_numbers_of_one(tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    few = ["--max_train_steps", "2", "--eval_images", "75", "--eval_batch_size", "4"]
    process = start("--preset", "shapes", *few, "--output_dir", run, launcher=TORCHRUN)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert evaluate(["--policy", str(run), "--batch_size", "4", "--output_dir", str(alone)]) == 0
    assert (alone / "scores.parquet").read_bytes() == (run / "scores.parquet").read_bytes()
    written = {path.name for path in (run / "evaluation" / "scores").glob("*/shard-*.bin")}
    assert written == {"shard-0-00000.bin", "shard-1-00000.bin"}  # each rank had its share


@pytest.mark.parametrize("images", [1, 4, 5, 10, 12, 23])
def test_images_are_shared_out_among_prompts_in_turn(images):
    prompts = [Prompt(f"prompt {k % 5}", "file") for k in range(7)]
    asked, seeds, without_last = sides.seeds_in_training(prompts, images)
    request = ImageRequest({"m": None}, [prompt for prompt in prompts[:5] if prompt.text in asked], seeds, without_last)
    expected = Counter(f"prompt {k % 5}" for k in range(images))
    assert Counter(row.prompt for row in request.rows()) == expected
    assert {(row.prompt, row.seed) for row in request.rows()} == {(f"prompt {k % 5}", k // 5) for k in range(images)}


@pytest.mark.usefixtures("red")
def test_a_policy_that_did_not_move_ties(sd15_path, pairs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--learning_rate", 1e-30, "--sampling_steps", 2)
    flags += ["--eval_scorers", "red", "--eval_prompts", str(tmp_path / "prompts.txt"), "--eval_images", "3"]
    assert main(flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["win_rate"] == 0.5 and summary["scores"]["red"]["win_rate"]["ties"] == 3
    assert summary["win_rate_ci95"] == [0.5, 0.5] and summary["warnings"] == []
    assert summary["signals"]["distance"]["policy"] == 0
    assert summary["diversity_base"] == summary["diversity_policy"] > 0


def test_bad_input_is_found_before_anything_is_opened(sdxl_path, tmp_path, capsys):
    def refused(*flags: object) -> str:
        assert main(flags_for(sdxl_path, tmp_path / "none", tmp_path / "run", *flags)) == 2
        return capsys.readouterr().err

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    assert "belong together" in refused("--eval_scorers", "right")
    assert "no scorer 'beauty'; choose from quality, faithfulness" in refused(
        "--eval_scorers", "beauty", "--eval_prompts", prompts
    )
    assert "'a dog' is none of" in refused("--eval_scorers", "faithfulness", "--eval_prompts", prompts)
    assert "--eval_prompts" in (said := refused("--eval_scorers", "right", "--eval_prompts", tmp_path / "nowhere"))
    assert "cannot be read" in said
    assert not (tmp_path / "run").exists()


def test_the_built_in_scorers_are_the_exact_scores():
    images = (render(SCENES[:6], torch.zeros(6, dtype=torch.int64)) * 255).round().to(torch.uint8)
    captions = [scene.caption for scene in SCENES[:6]]
    expected = {
        "quality": score.quality(images / 255, captions),
        "faithfulness": score.faithfulness(images / 255, captions),
        "right": torch.ones(6).double(),
        "appeal": score.appeal(images / 255),
    }
    assert {name for name, module in MODULE_OF.items() if module == "shapes"} == set(expected)
    for name, values in expected.items():
        assert torch.equal(load_scorer(name).score(images, captions), values)


@pytest.mark.parametrize("name", ["quality", "faithfulness", "right", "appeal"])
def test_the_built_in_scorers_refuse_another_world(name):
    scorer, caption = load_scorer(name), SCENES[0].caption
    for height, width in ((64, 64), (16, 8)):
        with pytest.raises(BadInput, match=rf"{name} judges .* 16 x 16 pixels, not {width} x {height}: choose another"):
            scorer.score(torch.zeros(2, 3, height, width, dtype=torch.uint8), [caption] * 2)
    with pytest.raises(BadInput, match="'a dog' is none of"):  # known from the prompts, before any training
        scorer.check([caption, "a dog"])
