"""A whole run that is compared with its base at the end: the numbers, the picture, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast.evaluation import compare
from dpo_fast.evaluation.compare import Comparison, Judged
from dpo_fast.evaluation.scorers import MODULE_OF, Scorer, load_scorer
from dpo_fast.evaluation.statistics import WinRate
from dpo_fast.shapes import score
from dpo_fast.shapes.render import SCENES, render
from dpo_fast.train import main
from tests.helpers.runs import flags_for


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].double().mean((1, 2)) - images[:, 1:].double().mean((1, 2, 3))


@pytest.fixture
def red(monkeypatch):
    """A scorer that knows any prompt, in the place of all."""
    monkeypatch.setattr(compare, "load_scorer", lambda name: Scorer(redness))


@pytest.mark.usefixtures("red")
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_is_compared_with_its_base(sd15_path, pairs, tmp_path, tuning, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \na hat\n")
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--tuning", tuning, "--learning_rate", 1e-2)
    flags += ["--eval_scorers", "red", "--eval_prompts", str(tmp_path / "prompts.txt"), "--eval_images", "5"]
    flags += ["--eval_batch_size", "2", "--sampling_steps", "2"]
    assert main(flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["prompts"], summary["images"], summary["scorer"]) == (3, 5, "red")
    assert 0 <= summary["win_rate_ci95"][0] <= summary["win_rate"] <= summary["win_rate_ci95"][1] <= 1
    assert summary["score_base"] != summary["score_policy"]  # what was exported was loaded, and it differs
    assert summary["steps"] == 4 and summary["loss_first"] == pytest.approx(0.6931472)
    picture = np.asarray(Image.open(tmp_path / "run" / "samples.png"))
    assert picture.shape[2] == 3 and np.ptp(picture) > 50
    out = capsys.readouterr().out
    assert "5 images of 3 prompts" in out and f"{summary['win_rate']:.3f} [" in out and "samples.png" in out


@pytest.mark.usefixtures("red")
def test_a_policy_that_did_not_move_ties(sd15_path, pairs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--learning_rate", 1e-30, "--sampling_steps", 2)
    flags += ["--eval_scorers", "red", "--eval_prompts", str(tmp_path / "prompts.txt"), "--eval_images", "3"]
    assert main(flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["win_rate"] == 0.5 and summary["scores"]["red"]["win_rate"]["ties"] == 3
    assert summary["diversity_base"] == summary["diversity_policy"] > 0


def test_bad_input_is_found_before_anything_is_opened(tmp_path, capsys):
    def refused(*flags: object) -> str:
        assert main(flags_for(tmp_path / "none", tmp_path / "none", tmp_path / "run", *flags)) == 2
        return capsys.readouterr().err

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    assert "belong together" in refused("--eval_scorers", "right")
    assert "no scorer 'beauty'; choose from faithfulness" in refused(
        "--eval_scorers", "beauty", "--eval_prompts", prompts
    )
    assert "'a dog' is none of" in refused("--eval_scorers", "faithfulness", "--eval_prompts", prompts)
    assert "cannot be read" in refused("--eval_scorers", "right", "--eval_prompts", tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_the_built_in_scorers_are_the_exact_scores():
    images = (render(SCENES[:6], torch.zeros(6, dtype=torch.int64)) * 255).round().to(torch.uint8)
    captions = [scene.caption for scene in SCENES[:6]]
    expected = {
        "faithfulness": score.faithfulness(images / 255, captions),
        "right": torch.ones(6).double(),
        "appeal": score.appeal(images / 255),
    }
    assert {name for name, module in MODULE_OF.items() if module == "shapes"} == set(expected)
    for name, values in expected.items():
        assert torch.equal(load_scorer(name).score(images, captions), values)


def _judged(name: str, low: float, high: float) -> Judged:
    return Judged(name, 0.5, 0.5, WinRate((low + high) / 2, low, high, 1, 0, 1))


def test_over_optimisation_is_not_hidden():
    fine, lost = _judged("a", 0.5, 0.7), _judged("b", 0.2, 0.4)
    rest = dict(images=9, prompts=3, seconds=1.0)
    assert Comparison([fine, _judged("b", 0.4, 0.6)], 0.2, 0.19, **rest).warnings() == []
    (paid,) = Comparison([fine, lost], 0.2, 0.2, **rest).warnings()
    assert "paid for with b" in paid
    over, narrow = Comparison([lost, fine], 0.2, 0.1, **rest).warnings()
    assert over.startswith("over-optimisation: the policy loses on b") and "50%" in narrow
    assert "diversity" not in str(Comparison([fine], None, None, **rest))
