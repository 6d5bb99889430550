"""What `--help` prints: every flag once, by section, with the values that hold; and of each command what is true."""

import dataclasses
import re
import sys

import pytest

from dpo_fast import cache, parallel, sweep
from dpo_fast.command_line import parse
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.evaluation import evaluate_options, generate_options
from dpo_fast.help_text import Page, text_of, titles
from dpo_fast.presets import PRESETS
from dpo_fast.relabeling import options as relabel_options
from dpo_fast.training import run
from tests.helpers.runs import flags_for

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def shown(capsys, work, *argv: object) -> str:
    """What is printed for a command line that asks for help."""
    with pytest.raises(SystemExit) as end:
        work([*map(str, argv), "--help"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def entry(text: str, flag: str) -> str:
    """A flag's lines, as one."""
    found = re.search(rf"^  --{flag}\b.*?(?=^  -|^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[0].split())


def test_training_s_flags_are_grouped(capsys):
    text = shown(capsys, parse)
    assert flags_in(text) == FIELDS
    sections = [
        *("preset", "model", "data", "objective", "LoRA", "training", "memory and speed", "cache"),
        *("output and checkpoints", "result", "logging", "samples and evaluation", "upload", "names of other scripts"),
    ]
    assert titles(TrainConfig) == sections
    assert [line for line in text.splitlines() if line in sections] == sections
    before = {name: text[: text.index(f"  --{name} ")].splitlines() for name in ("rank", "seed", "eval_images")}
    last = {name: next(line for line in reversed(lines) if line in sections) for name, lines in before.items()}
    assert last == {"rank": "LoRA", "seed": "training", "eval_images": "samples and evaluation"}
    assert "accelerate launch --num_processes N" in " ".join(text.split())


@pytest.mark.parametrize(
    ("of", "kind"),
    [
        (generate_options, generate_options.GenerateConfig),
        (evaluate_options, evaluate_options.EvaluateConfig),
        (relabel_options, relabel_options.RelabelConfig),
    ],
)
def test_other_commands_show_every_flag_once(capsys, of, kind):
    text = shown(capsys, of.parse)
    assert flags_in(text) == [field.name for field in dataclasses.fields(kind)]
    assert len(titles(kind)) >= 3 and "flags" not in titles(kind)
    for field in dataclasses.fields(kind):
        assert len(entry(text, field.name)) > len(field.name) + 30  # a sentence


@pytest.mark.parametrize("preset", PRESETS)
def test_the_values_of_the_preset_are_shown(capsys, preset):
    text = shown(capsys, parse, "--preset", preset)
    config = parse(["--preset", preset])[0]
    assert f"(default: {config.learning_rate}, from --preset {preset})" in entry(text, "learning_rate")
    assert f"(default: {config.max_train_steps}, from --preset {preset})" in entry(text, "max_train_steps")
    for name in FIELDS:
        of_preset = name in PRESETS[preset]
        assert (f", from --preset {preset})" in entry(text, name)) == of_preset, name
    assert entry(text, "hub_model_id").endswith("(default: None)") and entry(text, "cache").endswith("(default: on)")
    assert entry(text, "lora_targets").endswith("(default: to_q to_k to_v to_out.0)")


def test_without_a_preset_the_values_are_those_of_a_run(capsys):
    assert entry(shown(capsys, parse), "tuning").endswith("(default: full, from --preset shapes)")
    named = shown(capsys, parse, "--dataset_name", "d", "--pretrained_model_name_or_path", "m")
    assert entry(named, "tuning").endswith("(default: lora)") and "from --preset" not in named


def test_a_preset_s_beta_is_not_shown_for_an_objective_on_another_scale(capsys):
    text = shown(capsys, parse, "--preset", "sdxl", "--objective", "mapo")
    assert entry(text, "beta_dpo").endswith("None: 5000, mapo 0.1. (default: None)")


def test_the_values_of_a_recipe_are_shown_and_a_bad_one_is_refused(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("preset: sdxl-lora\nrank: 64\nhflip: true\ncache: false\n")
    text = shown(capsys, parse, "--config", recipe)
    assert entry(text, "rank").endswith("(default: 64, from --config)")
    assert entry(text, "cache").endswith("(default: off, from --config)")
    assert entry(text, "hflip").endswith("(default: on, from --config)")
    assert entry(text, "train_batch_size").endswith("(default: 4, from --preset sdxl-lora)")
    recipe.write_text("rnak: 64\n")
    with pytest.raises(BadInput, match="did you mean --rank"):
        parse(["--config", str(recipe), "--help"])


@pytest.mark.parametrize("columns", [40, 60, 100, 300])
def test_lines_fit_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys, parse).splitlines()
    unbreakable = max(len(word) for line in lines for word in line.split())
    assert max(map(len, lines)) <= max(60, min(columns, 110), unbreakable + 6)
    assert any(len(line) > 0.9 * min(max(columns, 60), 110) for line in lines)


def test_kinds_of_values(capsys):
    text = shown(capsys, parse)
    for head in (
        "--rank INT ", "--learning_rate FLOAT ", "--output_dir PATH ", "--dataset_name TEXT ",
        "--image_columns TEXT TEXT ",
        "--validation_prompts TEXT ... ", "--tuning {lora,full} ", "--hflip, --no_hflip ",
        "--objective {dpo,ipo,hinge,cdpo,kto,mapo,sft}|TEXT ",
    ):  # fmt: skip
        assert entry(text, head.split()[0].strip("-,")).startswith(head)
    assert entry(shown(capsys, relabel_options.parse), "scorer").startswith("--scorer TEXT NAME, or NAME:WEIGHT")


def test_a_dataclass_without_sections_or_texts():
    @dataclasses.dataclass
    class Flags:
        """Does a thing."""

        one: int = 3
        two: str = "a\x1b[2Jb"

    text = text_of(Page("it", Flags))
    assert text.startswith("usage: it [--FLAG VALUE ...]\n\nDoes a thing.\n\nflags\n  --one INT\n")
    assert r"a\x1b[2Jb" in text and text.endswith("\n  -h, --help, --version")


# ---- sweep -----------------------------------------------------------------------------------------------------


def test_a_sweep_s_help_is_what_it_takes(capsys):
    text = shown(capsys, sweep.main)
    refused = ("overwrite", "resume_from_checkpoint", "dry_run", "push_to_hub")
    assert flags_in(text) == [*sweep.OWN, *(name for name in FIELDS if name not in (*refused, "hub_model_id"))]
    listed = {name for name in FIELDS if name in flags_in(text) and ",..." in entry(text, name)}
    for name in FIELDS:
        swept, _ = sweep._split([f"--{name}", "1,2"])
        assert (name in listed) == (bool(swept) and name in flags_in(text)), name
    for name in refused:
        with pytest.raises(BadInput, match=f"--{name} belongs to a single run"):
            sweep._run(["--rank", "1,2", f"--{name}", *(["latest"] if name.startswith("resume") else [])])
        assert f"--{name}" in text
    assert "None: runs/sweep-<time>" in entry(text, "output_dir") and "the same for all runs" in entry(text, "seed")
    assert "--beta_dpo FLOAT[,...]\n" in text and "usage: python -m dpo_fast.sweep" in text


def test_a_sweep_s_help_shows_its_preset(capsys):
    text = shown(capsys, sweep.main, "--preset", "sdxl", "--learning_rate", "1e-8,2e-8")
    assert "(default: 2048, from --preset sdxl)" in entry(text, "pairs_per_step")
    assert "from --preset shapes" in shown(capsys, sweep.main, "--preset", "sd15,sdxl")  # which of them is not known


# ---- cache build, cache reference ------------------------------------------------------------------------------


class Recording(TrainConfig):
    """A configuration that notes which fields are read, except by dataclasses.replace."""

    read: set[str] = set()  # noqa: RUF012

    def __getattribute__(self, name: str) -> object:
        if name in FIELDS and sys._getframe(1).f_globals["__name__"] != "dataclasses":
            Recording.read.add(name)
        return super().__getattribute__(name)


VARIANTS = {
    "build_cache": [
        [],
        ["--seed=None"],
        ["--streaming"],
        ["--init_lora=None", "--validation_fraction", "0.3", "--run_validation", "--max_train_steps=None"],
    ],
    "build_reference": [
        ["--cached_reference", "1"],
        ["--cached_reference", "1", "--validation_fraction", "0.3", "--run_validation", "--max_train_steps=None"],
    ],
}
# Read by both, to describe the model and to refuse what no run can use; nothing that is kept depends on them.
IDLE = {"output_dir", "cache", "sampling_steps", "sampling_guidance"}
# Only to load the UNet, which encodes nothing, and to check the timesteps.
IDLE_IN_BUILD = {
    *("tuning", "attention", "memory_order", "prediction_type", "zero_terminal_snr", "min_timestep", "max_timestep"),
    *("time_ids", "proportion_empty_prompts"),
}
# To say which choices are to be proven, and for how long a run; the margins and labels of training.
IDLE_IN_REFERENCE = {
    *("beta_dpo", "label_smoothing", "lora_targets", "gradient_checkpointing", "num_train_epochs", "random_crop"),
    *("compile", "cached_reference"),
}


@pytest.mark.parametrize("command", ["build", "reference"])
def test_the_flags_that_are_shown_are_those_that_are_read(sdxl_path, pairs, tmp_path, command):
    work = {"build": "build_cache", "reference": "build_reference"}[command]
    Recording.read.clear()
    ranks = parallel.start("none")
    for more in VARIANTS[work]:
        flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", tmp_path / "cache", *more)
        config = parse(flags)[0]
        recorded = Recording(**{name: getattr(config, name) for name in FIELDS})
        getattr(run, work)(recorded, ranks)
    ranks.close()
    listed = {"build": cache.OF_BUILD, "reference": cache.OF_REFERENCE}[command]
    early = {"preset", "config", "preference"}  # folded into others when they are parsed
    assert listed - early <= Recording.read
    idle = IDLE | (IDLE_IN_BUILD if command == "build" else IDLE_IN_REFERENCE)
    assert Recording.read - listed == idle


@pytest.mark.parametrize("command", ["build", "reference"])
def test_the_cache_s_help(capsys, command):
    text = shown(capsys, cache.main, command, "--preset", "sdxl")
    listed = {"build": cache.OF_BUILD, "reference": cache.OF_REFERENCE}[command]
    own = ["draws"] if command == "reference" else []
    assert flags_in(text) == own + [name for name in FIELDS if name in listed]
    assert text.startswith(f"usage: python -m dpo_fast.cache {command} ") and "learning_rate" not in flags_in(text)
    assert entry(text, "resolution").endswith("(default: 1024, from --preset sdxl)")
    assert ("--draws K --seed N" in text) == (command == "reference")
    again = shown(capsys, cache.main, command, "--draws", 5, "--preset", "sdxl")
    assert again == text


def test_what_the_help_calls_required_is(sdxl_path, pairs, tmp_path, capfd):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--latent_cache_dir", tmp_path / "cache")
    assert cache.main(["reference", *flags]) == 2
    assert "reference needs --draws K" in capfd.readouterr().err
    assert cache.main(["reference", *flags, "--draws", "1", "--seed=None"]) == 2
    assert "reference needs --seed" in capfd.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
