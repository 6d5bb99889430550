"""Which images are compared: evaluations, generated images, plain folders, and the prompts that tools write."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from dpo_fast.checksums import write_signed_json
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.scored import Scored, write_scores
from dpo_fast.voting.folders import is_own_set, read_folders
from dpo_fast.voting.prompt_texts import prompt_image
from tests.helpers.vote_sessions import image_folder, png

PROMPTS = ["a red fox", "a blue bird"]


def generated(
    home: Path, models=("base", "policy"), prompts=PROMPTS, seeds=(0, 1), categories=("Animals", None)
) -> Path:
    """A folder as dpo_fast.generate leaves it."""
    rows = []
    for model in models:
        for prompt, category in zip(PROMPTS, ("Animals", None), strict=True):
            for seed in seeds:
                file = f"{model}/{prompt.replace(' ', '-')}-{seed}.png"
                png(home / file, {"prompt": prompt, "noise_seed": "1", "seed": str(seed)}, seed=seed)
                row = {"model": model, "prompt": prompt, "source": "text", "category": category, "seed": seed}
                rows.append({**row, "challenge": None, "noise_seed": 1, "layout": None, "file": file})
    empty = {"settings": {}, "weights": {}, "stamps": {}}
    write_signed_json(home / "images.json", {**empty, "complete": True, "images": rows})
    return home


def evaluated(home: Path, *, folder: Path | None = None, seeds: object = (0, 1)) -> Path:
    """A folder as dpo_fast.evaluate leaves it; of a policy and a base, or a folder of images in the base's place."""
    generated(home / "images", ("policy",) if folder else ("base", "policy"), seeds=(0, 1))
    base = {"name": "shots", "of": str(folder)} if folder else {"name": "base", "of": "model"}
    seeds = seeds if isinstance(seeds, str) else list(seeds)
    record = {"baseline": base, "policy": {"name": "policy", "of": "run"}, "prompts": "2", "seeds": seeds}
    write_signed_json(home / "evaluation.json", record)
    number = len(PROMPTS) * 2
    texts = [prompt for prompt in PROMPTS for _ in range(2)]
    scores = {"beauty": torch.zeros(number, dtype=torch.float64)}
    write_scores(
        home / "scores.parquet", Scored(texts, [0, 1] * 2, scores, scores, ["Animals"] * 2 + ["no category"] * 2)
    )
    return home


def found(*folders: Path, **options) -> list[tuple]:
    """What is compared, in short."""
    return [
        (one.group, one.prompt, one.category, one.seed, one.models, *(file.parent.name for file in one.files))
        for one in read_folders(folders, **options).comparisons
    ]


def test_an_evaluation(tmp_path):
    home = evaluated(tmp_path / "eval")
    pair = (("base", "policy"), "base", "policy")
    assert found(home) == [
        ("eval", "a red fox", "Animals", 0, *pair),
        ("eval", "a red fox", "Animals", 1, *pair),
        ("eval", "a blue bird", None, 0, *pair),
        ("eval", "a blue bird", None, 1, *pair),
    ]
    for one in read_folders([home]).comparisons:
        assert [file.name for file in one.files] == [f"{one.prompt.replace(' ', '-')}-{one.seed}.png"] * 2
    assert is_own_set(home) and read_folders([home]).folders == {"eval": str(home)}


def test_a_run_that_was_evaluated_and_a_folder_of_evaluations(tmp_path):
    evaluated(tmp_path / "runs" / "one" / "evaluation").joinpath("scores.parquet").rename(
        tmp_path / "runs" / "one" / "scores.parquet"
    )
    evaluated(tmp_path / "runs" / "two")
    assert len(found(tmp_path / "runs" / "one")) == 4 and is_own_set(tmp_path / "runs" / "one")
    assert Counter(group for group, *_ in found(tmp_path / "runs")) == {"one": 4, "two": 4}


def test_an_evaluation_against_a_folder_of_images(tmp_path):
    shots = image_folder(tmp_path / "shots", [f"{prompt}-{k}" for prompt in PROMPTS for k in range(2)], seed=1)
    home = evaluated(tmp_path / "eval", folder=shots)
    rows = found(home)
    assert len(rows) == 4 and {row[4:] for row in rows} == {(("shots", "policy"), "shots", "policy")}
    for file in shots.iterdir():
        file.unlink()
    shots.rmdir()
    with pytest.raises(BadInput, match=r"the images of shots are not in .* any more"):
        read_folders([home])


def test_generated_images_of_three_models(tmp_path):
    home = generated(tmp_path / "made", ("one", "two", "three"))
    rows = found(home)
    assert Counter(row[4] for row in rows) == {("one", "two"): 4, ("one", "three"): 4, ("two", "three"): 4}
    assert Counter(row[4] for row in found(home, against="two")) == {("one", "two"): 4, ("two", "three"): 4}
    with pytest.raises(BadInput, match="--against four is none of the models: one, two, three"):
        read_folders([home], against="four")
    few = found(home, most=6)
    assert few == rows[::2]


def test_images_that_are_missing_are_not_compared(tmp_path):
    home = generated(tmp_path / "made")
    (home / "base" / "a-red-fox-1.png").unlink()
    assert {(row[1], row[3]) for row in found(home)} >= {("a red fox", 0), ("a blue bird", 0), ("a blue bird", 1)}


def test_plain_folders_by_name(tmp_path):
    one = image_folder(tmp_path / "one", ["a red fox", "a_blue-bird (2)", "only here"], seed=1)
    two = image_folder(tmp_path / "two", ["A red fox", "a blue bird-1", "something else"], seed=2)
    assert [(row[1], row[4]) for row in found(one, two)] == [
        ("a red fox", ("one", "two")),
        ("a blue bird", ("one", "two")),
    ]
    remarks = read_folders([one, two]).remarks
    assert any("have no image in two" in remark for remark in remarks)


def test_plain_folders_join_an_evaluation(tmp_path):
    home = evaluated(tmp_path / "eval")
    shots = image_folder(tmp_path / "shots", PROMPTS, seed=1)
    rows = found(home, shots)
    number = Counter(row[4] for row in rows)
    assert number[("base", "policy")] == 4 and number[("base", "shots")] == number[("policy", "shots")] == 2
    assert {row[2] for row in rows if row[1] == "a red fox"} == {"Animals"}


def test_a_generated_set_of_one_model_is_a_model(tmp_path):
    one, two = generated(tmp_path / "x" / "made", ("m",)), generated(tmp_path / "y" / "made2", ("m",))
    assert {row[4] for row in found(one, two)} == {("m", "made2")}
    assert len(found(one, two)) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda home: [home], "holds neither an evaluation nor an image"),
        (lambda home: [image_folder(home / "a", ["x y"], seed=1)] * 2, "is named twice"),
        (lambda home: [image_folder(home / "a", ["x y"], seed=1)], "there is nothing to compare"),
        (lambda home: [image_folder(home / one, [f"of {one}"], seed=1) for one in "ab"], "no prompt has an image in"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, make, said):
    with pytest.raises(BadInput, match=said) as caught:
        read_folders(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda row: row | {"file": "../../../etc/passwd"}, "which is not in its folder"),
        (lambda row: row | {"file": "/etc/passwd"}, "which is not in its folder"),
        (lambda row: row | {"seed": "x"}, "lists no images"),
        (lambda row: None, "lists no images"),
    ],
)
def test_a_hostile_listing_is_refused(tmp_path, spoil, said):
    home = generated(tmp_path / "made")
    listing = json.loads((home / "images.json").read_text())
    listing.pop("digest")
    listing["images"][1] = spoil(listing["images"][1])
    write_signed_json(home / "images.json", listing)
    with pytest.raises(BadInput, match=said):
        read_folders([home])


# ---- what tools write into their images --------------------------------------------------------------------------

A1111 = (
    "a red fox, sharp <lora:x:1>\nin the snow\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a, Seed: 77, Size: 8x8"
)
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1, "positive": ["6", 0], "negative": ["7", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red fox", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
}
DEEP = {
    "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["2", 0], "guider": ["3", 0]}},
    "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
    "3": {"class_type": "BasicGuider", "inputs": {"model": ["9", 0], "conditioning": ["4", 0]}},
    "4": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["5", 0]}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": ["6", 0]}},
    "6": {"class_type": "PrimitiveString", "inputs": {"value": "a red fox"}},
}
LOOP = {
    "1": {"class_type": "K", "inputs": {"positive": ["2", 0]}},
    "2": {"class_type": "C", "inputs": {"text": ["2", 0]}},
}
WORKFLOW = {
    "nodes": [
        {"id": 3, "inputs": [{"name": "negative", "link": 1}, {"name": "positive", "link": 2}]},
        {"id": 6, "widgets_values": ["a red fox"]},
        {"id": 7, "widgets_values": ["ugly"]},
    ],
    "links": [[1, 7, 0, 3, 0, "CONDITIONING"], [2, 6, 0, 3, 1, "CONDITIONING"]],
}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"prompt": "a red fox"}, ("a red fox", None)),
        ({"prompt": " a red\n fox ", "seed": "3", "noise_seed": "99"}, ("a red fox", 3)),
        ({"parameters": A1111}, ("a red fox, sharp <lora:x:1> in the snow", 77)),
        ({"parameters": "a red fox"}, ("a red fox", None)),
        ({"prompt": json.dumps(COMFY), "workflow": "{}"}, ("a red fox", 2**64 - 1)),
        ({"prompt": json.dumps(DEEP)}, ("a red fox", 5)),
        ({"workflow": json.dumps(WORKFLOW)}, ("a red fox", None)),
        ({"prompt": json.dumps(LOOP)}, None),
        ({"prompt": "{" * 100_000}, None),
        ({"prompt": '{"1": 2, "3": {"inputs": []}, "4": {"inputs": {"positive": [[], 0]}}}'}, None),
        ({"prompt": '{"3": {"inputs": {"positive": ["9", 0], "seed": -1}}}'}, None),
        ({"workflow": '{"nodes": [{"id": 1, "inputs": [{"name": "positive", "link": 9}]}], "links": []}'}, None),
        ({"workflow": "[]"}, None),
        ({"parameters": ""}, None),
        ({"prompt": "  "}, None),
        ({}, None),
    ],
)
def test_prompts_of_tools(tmp_path, texts, expected):
    assert prompt_image(png(tmp_path / "a.png", texts)) == expected


def test_a_graph_that_links_to_itself_has_no_prompt(tmp_path):
    names = ("text", "text_g", "prompt", "string", "value", "t5xxl", "clip_l", "positive")
    graph = {str(k): {"inputs": {name: [str(1 - k), 0] for name in names}} for k in (0, 1)}  # it was 8^20 steps
    assert prompt_image(png(tmp_path / "a.png", {"prompt": json.dumps(graph)})) is None


def test_images_of_two_tools_meet(tmp_path):
    png(tmp_path / "comfy" / "ComfyUI_00001_.png", {"prompt": json.dumps(COMFY)})
    png(tmp_path / "comfy" / "ComfyUI_00002_.png", {"prompt": json.dumps(COMFY).replace("red fox", "blue bird")})
    png(tmp_path / "forge" / "00001-77.png", {"parameters": A1111.replace(", sharp <lora:x:1>\nin the snow", "")})
    image_folder(tmp_path / "shots", ["a-red-fox", "A blue bird"], seed=1)
    rows = found(*(tmp_path / name for name in ("comfy", "forge", "shots")))
    assert {(row[1], row[4]) for row in rows} == {
        ("a red fox", ("comfy", "forge")), ("a red fox", ("comfy", "shots")), ("a red fox", ("forge", "shots")),
        ("a blue bird", ("comfy", "shots")),
    }  # fmt: skip


def test_the_same_seeds_are_paired(tmp_path):
    for model, order in (("one", (1, 2, 3)), ("two", (3, 1, 2))):
        for k, seed in enumerate(order):
            png(tmp_path / model / f"{k}.png", {"parameters": f"a red fox\nSteps: 20, Seed: {seed}"}, seed=seed)
    for one in read_folders([tmp_path / "one", tmp_path / "two"]).comparisons:
        assert one.files[0].read_bytes() == one.files[1].read_bytes()  # drawn from the same seed
        assert prompt_image(one.files[0])[1] == one.seed


def test_a_broken_png_has_no_prompt(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 50)
    (tmp_path / "a.jpg").write_bytes(b"")
    assert prompt_image(tmp_path / "a.png") is None and prompt_image(tmp_path / "a.jpg") is None
