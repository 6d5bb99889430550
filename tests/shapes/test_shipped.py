"""What the package ships: a base that follows captions about half of the time, and pairs that its scorers labelled."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from dpo_fast import shapes
from dpo_fast.evaluation.prompts import read_lines
from dpo_fast.presets import PRESETS
from dpo_fast.shapes import pairs, pretrain
from dpo_fast.shapes.render import SCENES

FOLDER = Path(shapes.__file__).parent
PRESET = PRESETS["shapes"]


@pytest.fixture(scope="module")
def base():
    return DiffusionPipeline.from_pretrained(FOLDER / "pipeline")


@pytest.fixture(scope="module")
def table():
    return pq.read_table(FOLDER / "pairs.parquet").to_pydict()


def pixels(column: list[bytes]) -> torch.Tensor:
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in column]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def test_the_preset_is_what_was_measured():
    assert PRESET["pretrained_model_name_or_path"] == str(FOLDER / "pipeline")
    assert (PRESET["sampling_steps"], PRESET["sampling_guidance"]) == (pretrain.SAMPLING_STEPS, pretrain.GUIDANCE)


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in (FOLDER / "pipeline").rglob("*.safetensors")) <= 8 * 2**20


@pytest.mark.exhaustive
def test_the_base_follows_captions_as_often_as_it_says(base):
    assert isinstance(base, StableDiffusionPipeline)
    said = json.loads((FOLDER / "pipeline" / "pretraining.json").read_text())
    assert 0.4 < said["right"] < 0.9
    base.set_progress_bar_config(disable=True)
    seen = pretrain.measure(base, prompts=128, seed=99)
    error = (said["right"] * (1 - said["right"]) / 128) ** 0.5
    assert abs(seen["right"] - said["right"]) < 4 * error
    assert abs(seen["faithfulness"] - said["faithfulness"]) < 0.05


def test_no_pair_has_a_held_out_caption(table):
    train, held_out = pairs.split()
    assert read_lines(FOLDER / "held_out.txt", "--eval_prompts") == held_out and len(held_out) == pairs.HELD_OUT
    assert set(table["caption"]) == set(train) and not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(SCENES)


@pytest.mark.parametrize("name", list(pairs.PREFERENCES))
def test_the_labels_are_the_scorers(table, name):
    score, captions = pairs.PREFERENCES[name], table["caption"]
    gap = score(pixels(table["jpg_0"]), captions) - score(pixels(table["jpg_1"]), captions)
    expected = torch.where(gap.abs() < pairs.TIE[name], 0.5, (gap > 0).double())
    assert table[f"label_{name}"] == expected.tolist()
    assert (expected == 0.5).double().mean() < (0.75 if pairs.TIE[name] else 1e-9)
    assert 0.4 < expected.mean() < 0.6  # the first image is not the better one by its place


def test_the_best_of_some_generations_are_paired_with_the_worst(base):
    captions = [SCENES[0].caption, SCENES[200].caption]
    made = pairs.make_pairs(base, captions, [5, 6], images=3, pairs=2)
    assert made.equals(pairs.make_pairs(base, captions, [5, 6], images=3, pairs=2))
    assert not made.equals(pairs.make_pairs(base, captions, [5, 7], images=3, pairs=2))
    rows = made.to_pydict()
    named = [caption for caption in captions for _ in range(2)]
    assert rows["caption"] == named and len({*rows["jpg_0"], *rows["jpg_1"]}) == 8  # of 12 images
    one, other = (pairs.quality(pixels(rows[side]), named) for side in ("jpg_0", "jpg_1"))
    gaps = (one - other).abs().view(2, 2)
    assert (gaps[:, 0] > gaps[:, 1]).all()  # best and worst, then the next
    for name, score in pairs.PREFERENCES.items():
        gap = score(pixels(rows["jpg_0"]), named) - score(pixels(rows["jpg_1"]), named)
        assert rows[f"label_{name}"] == torch.where(gap.abs() < pairs.TIE[name], 0.5, (gap > 0).double()).tolist()


def test_more_pairs_than_images_are_refused(monkeypatch, capsys, tmp_path):
    argv = "pairs --seeds 1 --images_per_seed 4 --pairs_per_caption 3 --output_dir"
    monkeypatch.setattr("sys.argv", [*argv.split(), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        pairs.main()
    assert "--pairs_per_caption (3) must be 1 to 2, half of the images" in capsys.readouterr().err


def test_pairs_are_not_made_by_a_pipeline_that_names_code(tmp_path, monkeypatch, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "Mine", "unet": ["mine", "UNet"]}')
    argv = ["pairs", "--pipeline", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="2"):
        pairs.main()
    assert "names mine.UNet for unet" in capsys.readouterr().err and not (tmp_path / "out").exists()
