"""The bare command: the built-in world trained and compared, wherever it is started, by one process or two."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from dpo_fast.train import main
from tests.helpers.runs import command, environment, lines, start

SHORT = ["--max_train_steps", "3", "--log_every", "1", "--seed", "7", "--sampling_steps", "2"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.exhaustive
def test_the_bare_command_trains_and_compares(tmp_path):
    """From an empty folder; only lengths are cut."""
    ran = subprocess.run(
        command(*SHORT, "--eval_images", "80"), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("shapes-")
    summary = summary_of(folder)
    assert summary["steps"] == 3 and summary["scorer"] == "quality" and summary["images"] == 80
    assert lines(folder)[0]["loss"] == summary["loss_first"] == np.float32(np.log(2))
    assert 0.3 < summary["score_base"] < 1 and set(summary["scores"]) == {"quality", "faithfulness", "right", "appeal"}
    assert "quality" in ran.stdout and "win rate [95%]" in ran.stdout and "diversity" in ran.stdout
    picture = np.asarray(Image.open(folder / "samples.png"))
    assert picture.shape[1] > picture.shape[0] > 100 and np.ptp(picture) > 200


@pytest.mark.exhaustive
def test_two_processes_compare_as_one(tmp_path):
    """An odd number of images, so that their shares differ."""
    flags = [*SHORT, "--train_batch_size", "6", "--pairs_per_step", "12", "--eval_images", "5", "--output_dir"]
    two = start(*flags, tmp_path / "two", launcher=TORCHRUN)
    assert main([*map(str, flags), str(tmp_path / "one")]) == 0
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert out.count("before over after") == 1  # told once
    alone, shared = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    for name, scores in alone["scores"].items():
        assert abs(scores["base"] - shared["scores"][name]["base"]) < 1e-6, name
        assert abs(scores["policy"] - shared["scores"][name]["policy"]) < 1e-3, name
    one, other = (np.asarray(Image.open(tmp_path / run / "samples.png")).astype(int) for run in ("one", "two"))
    assert abs(one - other).max() <= 8
