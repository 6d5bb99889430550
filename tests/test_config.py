"""The command line: layers, other scripts' names, and what is refused."""

import dataclasses
import io
import sys

import pytest
import yaml

from dpo_fast.command_line import parse
from dpo_fast.config import TrainConfig, public, to_yaml
from dpo_fast.errors import BadInput
from dpo_fast.presets import PRESETS

NAMED = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d"]


def parsed(*flags: str) -> TrainConfig:
    return parse([*NAMED, *flags])[0]


def bare(*flags: str) -> TrainConfig:
    return parse(list(flags))[0]


def test_defaults_are_in_the_papers_unit():
    config = parsed()
    assert (config.beta_dpo, config.objective, config.tuning, config.mixed_precision) == (5000.0, "dpo", "lora", "no")
    assert parsed("--objective", "mapo").beta_dpo == 0.1


def test_dashes_underscores_and_the_last_of_a_repeated_flag():
    assert parsed("--train-batch-size", "3").train_batch_size == 3
    assert parsed("--train_batch_size=3").train_batch_size == 3
    assert parsed("--report_to", "wandb", "--report_to", "tensorboard").report_to == "tensorboard"
    assert parsed("--hflip", "--no_hflip").hflip is False


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset_name", ""],
        ["--dataset_name="],
        ["--pretrained_model_name_or_path", " "],
        ["--config", ""],
        ["--output_dir="],
        ["--latent_cache_dir", ""],
        ["--eval_prompts", ""],
        ["--validation_prompts", "a cat", ""],
        ["--init-lora", ""],
    ],
)
def test_an_empty_text_is_refused(flags):
    with pytest.raises(BadInput, match=rf"^{flags[0].rstrip('=')} is empty"):
        parsed(*flags)


def test_an_empty_text_in_a_recipe_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("dataset_name: ''\n")
    with pytest.raises(BadInput, match="--dataset_name is empty"):
        bare("--config", str(tmp_path / "r.yaml"))


def test_a_value_in_a_recipe_may_begin_with_a_dash(tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: -run\ndataset_name: --pairs\npretrained_model_name_or_path: m\n")
    config = bare("--config", str(tmp_path / "r.yaml"))
    assert (str(config.output_dir), config.dataset_name) == ("-run", "--pairs")


def test_names_of_the_public_scripts():
    config = parsed("--loss_type", "sigmoid", "--use_8bit_adam", "--enable_xformers_memory_efficient_attention")
    assert (config.objective, config.optimizer, config.attention) == ("dpo", "adamw8bit", "xformers")
    assert parsed("--loss_type", "hinge").objective == "hinge"
    notes = parse([*NAMED, "--local_rank", "0", "--prior_generation_precision", "fp16"])[1]
    assert len(notes) == 2 and all("does nothing" in note for note in notes)


def test_gradient_checkpointing_with_and_without_a_value(tmp_path):
    assert parsed().gradient_checkpointing == "none"
    assert parsed("--gradient_checkpointing").gradient_checkpointing == "full"
    assert parsed("--gradient-checkpointing", "--rank", "8").gradient_checkpointing == "full"
    assert parsed("--gradient_checkpointing", "selective").gradient_checkpointing == "selective"
    assert parsed("--gradient_checkpointing=selective").gradient_checkpointing == "selective"
    assert parse(["--preset", "sdxl", "--no-gradient-checkpointing"])[0].gradient_checkpointing == "none"
    with pytest.raises(BadInput, match="gradient"):
        parsed("--gradient_checkpointing", "some")
    for text, expected in (("true", "full"), ("false", "none"), ("selective", "selective")):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"gradient_checkpointing: {text}\n")
        assert parsed("--config", str(recipe)).gradient_checkpointing == expected


def test_a_dry_run_with_and_without_a_value(tmp_path):
    assert parsed().dry_run is None
    for flags in (
        ["--dry-run"],
        ["--dry_run"],
        ["--dry_run", "--rank", "8"],
        ["--dry-run=plan"],
        ["--dry-run", "plan"],
    ):
        assert parsed(*flags).dry_run == "plan"
    for flags in (["--dry-run", "timed"], ["--dry_run=timed"], ["--dry-run", "--dry-run", "timed"]):
        assert parsed(*flags).dry_run == "timed"
    assert parsed("--dry-run", "--no-dry-run").dry_run is None and parsed("--no_dry_run").dry_run is None
    with pytest.raises(BadInput, match="dry"):
        parsed("--dry-run", "soon")
    recipe = tmp_path / "recipe.yaml"
    for text, expected in (("true", "plan"), ("false", None), ("timed", "timed"), ("null", None)):
        recipe.write_text(f"dry_run: {text}\n")
        assert parsed("--config", str(recipe)).dry_run == expected
    assert "dry_run" not in to_yaml(parsed("--dry-run", "timed"))


def test_off_in_a_recipe_is_a_word(tmp_path):
    """YAML reads it as false."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compile: off\nzero_terminal_snr: on\n")
    config = parsed("--config", str(recipe))
    assert (config.compile, config.zero_terminal_snr) == ("off", "on")
    recipe.write_text("compile: regional\n")
    assert parsed("--config", str(recipe)).compile == "regional"


def test_a_preset_is_only_defaults():
    config = parse(["--preset", "sdxl", "--beta_dpo", "2000"])[0]
    assert config.beta_dpo == 2000 and config.learning_rate == 1e-8 and config.pairs_per_step == 2048
    for name, row in PRESETS.items():
        config = parse(["--preset", name])[0]
        for key, value in row.items():
            assert getattr(config, key) == value, (name, key)
    assert parse(["--preset", "turbo"])[0].is_turbo


def test_a_recipe_is_between_preset_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: turbo\nbeta_dpo: 300\nlora_targets: [to_q, to_k]\nhflip: true\nseed: null\nrank: 16\n")
    config = parse(["--config", str(recipe), "--rank", "2"])[0]
    assert config.beta_dpo == 300 and config.lora_targets == ("to_q", "to_k") and config.hflip and config.is_turbo
    assert config.rank == 2 and config.seed is None


def test_the_saved_configuration_reads_back(tmp_path):
    config = parsed("--validation_prompts", "a cat", "no: yes", "--image_columns", "a", "b", "--hub_token", "secret")
    text = to_yaml(config)
    assert "secret" not in text
    (tmp_path / "config.yaml").write_text(text)
    again = parse(["--config", str(tmp_path / "config.yaml")])[0]
    assert public(again) == public(config)
    assert yaml.safe_load(text)["validation_prompts"] == ["a cat", "no: yes"]


def test_mixed_precision_follows_the_launcher_unless_given(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parsed().mixed_precision == "bf16"
    assert parsed("--mixed_precision", "no").mixed_precision == "no"


def test_a_precision_of_the_launcher_that_is_not_supported_is_refused(monkeypatch):
    """It became fp32 without a word."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(BadInput, match="accelerate launch --mixed_precision fp8 is not supported: give"):
        parsed()
    assert parsed("--mixed_precision", "bf16").mixed_precision == "bf16"


REFUSED = [
    (["--learning_rate", "nan"], "learning_rate (nan)"),
    (["--learning_rate", "-1e-5"], "learning_rate (-1e-05)"),
    (["--learning_rate", "100"], "learning_rate (100.0)"),
    (["--beta_dpo", "inf"], "beta_dpo (inf)"),
    (["--beta_dpo", "0"], "beta_dpo (0.0)"),
    (["--train_batch_size", "0"], "train_batch_size (0)"),
    (["--rank", "0"], "rank (0)"),
    (["--seed", "-1"], "seed (-1)"),
    (["--proportion_empty_prompts", "1.5"], "proportion_empty_prompts (1.5)"),
    (["--label_smoothing", "0.1"], "label_smoothing (0.1)"),
    (["--streaming"], "--max_train_steps"),
    (["--streaming", "--max_train_steps", "9", "--run_validation"], "needs --validation_prompts"),
    (["--overwrite", "--resume_from_checkpoint", "latest"], "exclude each other"),
    (["--beta_dopo", "3"], "did you mean --beta_dpo?"),
    (["--beta_dpo", "many"], "many"),
    (["--mixed_precision", "fp8"], "fp8"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_refused_in_one_line_that_carries_the_value(flags, said):
    with pytest.raises(BadInput) as refusal:
        parsed(*flags)
    message = str(refusal.value)
    assert said in message and "\n" not in message and "│" not in message


@pytest.mark.parametrize("flags", [["--beta_dopo", "3"], ["--beta_dpo", "many"]], ids=" ".join)
def test_a_terminal_without_unicode_gets_the_same_line(flags, monkeypatch):
    """There the command line's library draws its box otherwise."""

    def said() -> str:
        with pytest.raises(BadInput) as refusal:
            parsed(*flags)
        return str(refusal.value)

    before = said()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert said() == before


def test_recipes_that_are_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, said in (("beta_dop: 3", "did you mean --beta_dpo?"), ("- 1", "list"), ("a: [", "not YAML")):
        recipe.write_text(text)
        with pytest.raises(BadInput, match=said.replace("?", r"\?")):
            parsed("--config", str(recipe))


def test_model_and_pairs_must_be_named():
    with pytest.raises(BadInput, match=r"no model is named.*--preset"):
        parse(["--dataset_name", "d"])
    with pytest.raises(BadInput, match="no preference pairs"):
        parse(["--pretrained_model_name_or_path", "m"])


def test_where_neither_is_named_the_built_in_world_is_meant(tmp_path):
    config = bare()
    assert config.preset == "shapes" and bare("--preset", "shapes") == config
    assert {name: getattr(config, name) for name in PRESETS["shapes"]} == PRESETS["shapes"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    assert bare("--config", str(recipe)) == config
    assert bare("--preset", "sd15").preset == "sd15"


def test_a_preference_is_a_label_and_the_first_scorer():
    config = bare("--preference", "appeal")
    assert config.label_column == "label_appeal"
    assert config.eval_scorers == ("appeal", "quality", "faithfulness", "right")
    elsewhere = parsed("--preference", "appeal")
    assert (elsewhere.label_column, elsewhere.eval_scorers) == ("label_appeal", ())


def test_help_documents_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"\n  --{field.name}" in shown
    assert "(default" in shown and "hub id" in shown
    assert "--dry_run {plan,timed}" in shown and "--dry-run timed" in shown


@pytest.mark.parametrize("preset", [[], ["--preset", "sdxl"]])
def test_a_presets_beta_is_not_that_of_an_objective_on_another_scale(preset):
    words = ["--objective", "mapo"]
    assert parse([*preset, *words])[0].beta_dpo == 0.1
    assert parse([*preset, *words, "--beta_dpo", "3"])[0].beta_dpo == 3.0
    assert parse([*preset, "--objective", "ipo"])[0].beta_dpo == parse(preset)[0].beta_dpo
