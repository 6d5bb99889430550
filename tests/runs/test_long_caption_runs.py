"""Runs with long captions: samples, generation, held-out pairs and picking encode them as training does."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel

from dpo_fast.cache import main as cache
from dpo_fast.evaluate import main as evaluate
from dpo_fast.evaluation import picking
from dpo_fast.evaluation.pick_options import parse as parse_pick
from dpo_fast.evaluation.sides import model_sources
from dpo_fast.generate import main as generate
from dpo_fast.train import main as train_main
from tests.helpers.pairs import write_pickapic
from tests.helpers.pipelines import load_model
from tests.helpers.runs import flags_for, lines, train

CAPTION = "a picture of " + " ".join(letter * 11 for letter in "abcdefghijk")  # 132 tokens: a letter is one
LONG = ("--max_token_length", 150)


@pytest.fixture(scope="module")
def long_pairs(tmp_path_factory) -> Path:
    captions = [CAPTION[: 100 + 2 * n] for n in range(11)] + [CAPTION * 2]
    return write_pickapic(tmp_path_factory.mktemp("pairs") / "long.parquet", n=12, captions=captions)


class Seen:
    """The text that UNets are given: [N,T,D] of each call."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []

    def lengths(self) -> set[int]:
        return {text.shape[1] for text in self.calls}

    def __contains__(self, expected: torch.Tensor) -> bool:  # [T,D]
        rows = [row.float() for text in self.calls for row in text]
        return any(row.shape == expected.shape and torch.allclose(row, expected.float(), 2e-3, 1e-4) for row in rows)


@pytest.fixture
def seen(monkeypatch) -> Seen:
    noted, forward = Seen(), UNet2DConditionModel.forward

    def spy(self, *arguments, encoder_hidden_states, **more):
        if not encoder_hidden_states.is_meta:  # only counted
            noted.calls.append(encoder_hidden_states.detach().clone())
        return forward(self, *arguments, encoder_hidden_states=encoder_hidden_states, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    return noted


def words(*flags: object) -> list[str]:
    return [str(flag) for flag in flags]


@pytest.mark.parametrize("name", [pytest.param("sd15", marks=pytest.mark.exhaustive), "sdxl"])
def test_every_command_encodes_as_the_run_does(request, long_pairs, tmp_path, seen, name):
    model = request.getfixturevalue(f"{name}_path")
    family = load_model(model, dtype=torch.float32, device="cpu", max_token_length=150)
    expected = family.encode_prompts([CAPTION, ""])["prompt_embeds"]
    more = [*LONG, "--run_validation", "--validation_fraction", 0.3, "--validation_prompts", CAPTION]
    more += ["--sampling_steps", 2, "--proportion_empty_prompts", 0.3, "--max_train_steps", 2]
    run = train(model, long_pairs, tmp_path / "run", *more)
    assert yaml.safe_load((run / "config.yaml").read_text())["max_token_length"] == 150
    assert (run / "samples").is_dir() and seen.lengths() == {152} and expected[0] in seen
    assert "| captions | up to 150 tokens, encoded in chunks of 75" in (run / "README.md").read_text()

    seen.calls.clear()
    asked = words("--policy", run, "--prompts", CAPTION, "--sampling_steps", 2, "--output_dir")
    assert generate([*asked, str(tmp_path / "images")]) == 0
    assert seen.lengths() == {152} and expected[0] in seen and (expected[1] in seen or name == "sdxl")
    listing = json.loads((tmp_path / "images" / "images.json").read_text())
    assert [of["max_token_length"] for of in listing["settings"]["models"].values()] == [150, 150]

    seen.calls.clear()
    argv = words("--policy", run, "--dataset_name", long_pairs, "--draws", 1, "--output_dir", tmp_path / "found")
    assert evaluate(argv) == 0
    assert seen.lengths() == {152}

    seen.calls.clear()
    assert generate([*asked, str(tmp_path / "short"), "--max_token_length", "75"]) == 0
    assert seen.lengths() == {77}
    listing = json.loads((tmp_path / "short" / "images.json").read_text())
    assert not any("max_token_length" in of for of in listing["settings"]["models"].values())  # as in older folders
    (policy,) = listing["settings"]["models"].keys() - {"base"}
    ours, short = (
        next(folder.glob(f"{policy}/*.png")).read_bytes() for folder in (tmp_path / "images", tmp_path / "short")
    )
    assert ours != short

    sources = model_sources(str(run))
    assert [source.max_token_length for source in sources.values()] == [150, 150]
    assert model_sources(str(model), str(run))[model.name].max_token_length == 75
    assert {one.max_token_length for one in model_sources(str(run), str(model)).values()} == {150}  # sampled alike
    prompts = ["--prompts", *(f"a picture of the number {n}" for n in range(8))]
    found = picking.plan(parse_pick([str(run), *prompts, "--scorers", "clip"]))
    assert found.base.max_token_length == 150


def test_pipelines_are_sampled_with_the_flag(sdxl_path, tmp_path, seen):
    argv = words("--policy", sdxl_path, "--prompts", CAPTION, "--sampling_steps", 2, "--output_dir", tmp_path / "out")
    assert generate([*argv, "--max_token_length", "225"]) == 0
    assert seen.lengths() == {227}
    assert generate(argv) == 2  # the folder's images are of other settings


@pytest.mark.parametrize("length, said", [pytest.param(75, 10, marks=pytest.mark.exhaustive), (150, 6), (225, 2)])
def test_what_is_cut_off_is_said(sd15_path, tmp_path, capsys, caplog, length, said):
    captions = ["a" * n for n in (75, 76, 150, 151, 225, 226)] * 2
    pairs = write_pickapic(tmp_path / "p.parquet", n=12, captions=captions)
    flags = [*flags_for(sd15_path, pairs, tmp_path / "run", "--max_token_length", length), "--max_train_steps", "1"]
    text = f"longer than {length} tokens and are cut off there, for example that of row {6 - said // 2}"
    assert train_main([*flags, "--dry-run"] if length == 150 else flags) == 0
    if length == 150:
        assert re.search(rf"^pairs +{said}  captions are {text}", shown := capsys.readouterr().out, re.MULTILINE)
    else:
        assert f"{said} of 12 captions are {text}" in (shown := caplog.text)
    assert ("--max_token_length encodes up to 225" in shown) is (length < 225)


def test_memory_and_flops_are_those_of_the_length(sd15_path, long_pairs, tmp_path, capsys):
    shown = []
    for length in (75, 225):
        more = ["--max_token_length", length, "--train_batch_size", 64, "--dry-run"]
        assert train_main(flags_for(sd15_path, long_pairs, tmp_path / "run", *more)) == 0
        shown.append(capsys.readouterr().out)

    def numbers(pattern: str) -> list[float]:
        return [float(re.search(pattern, text)[1].replace(",", "")) for text in shown]

    less, more = numbers(r"memory +([\d.]+) MiB  activations of 64 pairs")
    assert less * 1.02 < more
    less, more = numbers(r"([\d,]+) a caption's embeddings")
    assert (less, more) == (2 * 77 * 32, 2 * 227 * 32)
    less, more = numbers(r"step +([\d.]+)  TFLOP")
    assert less < more


@pytest.mark.parametrize("change", [("--max_token_length", "225"), ()], ids=["other", "usual"])
def test_a_run_is_not_resumed_with_another_length(sd15_path, long_pairs, tmp_path, capfd, change):
    flags = flags_for(sd15_path, long_pairs, tmp_path / "run")
    assert train_main([*flags, *words(*LONG), "--max_train_steps", "1"]) == 0
    assert train_main([*flags, *change, "--resume_from_checkpoint", "latest"]) == 2
    assert f"max_token_length: 150 -> {change[1] if change else 75}" in capfd.readouterr().err


REFUSED = "error: --max_token_length (100) must be 75, 150 or 225"


@pytest.mark.parametrize("command", ["train", "dry run", "cache", "generate", "evaluate"])
def test_other_lengths_are_refused_before_anything_is_loaded(sd15_path, pairs, tmp_path, capfd, command):
    long, flags = ["--max_token_length", "100"], flags_for(sd15_path, pairs, tmp_path / "run")
    status = {
        "train": lambda: train_main([*flags, *long]),
        "dry run": lambda: train_main([*flags, *long, "--dry-run"]),
        "cache": lambda: cache(["build", *flags, *long]),
        "generate": lambda: generate([*words("--policy", sd15_path, "--prompts", "a cat"), *long]),
        "evaluate": lambda: evaluate([*words("--policy", sd15_path, "--dataset_name", pairs), *long]),
    }[command]()
    assert status == 2 and REFUSED in capfd.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_the_built_in_model_takes_no_long_captions(tmp_path, capfd, more):
    flags = ["--preset", "shapes", "--max_train_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert train_main([*flags, *words(*LONG), *more]) == 2
    said = capfd.readouterr().err
    assert "--max_token_length (150) needs text encoders of 77 positions" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("length", [150, 225])
def test_compiled_the_first_margin_is_zero(sdxl_path, long_pairs, tmp_path, length):
    torch._dynamo.reset()
    more = ["--compile", "regional", "--max_token_length", length, "--learning_rate", 1e-3, "--run_validation"]
    more += ["--sampling_steps", 2, "--validation_prompts", CAPTION]
    run = train(sdxl_path, long_pairs, tmp_path / "run", *more)
    assert json.loads((run / "summary.json").read_text())["initial_margin_rms"] == 0.0
    assert lines(run)[0]["margin"] == 0.0 != lines(run)[-1]["margin"]
    torch._dynamo.reset()
