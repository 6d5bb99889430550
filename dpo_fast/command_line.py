"""Parse a command line, and a YAML recipe it names, into a checked training configuration.

Layers, later ones win: the defaults of `TrainConfig`, a preset, the recipe (`--config`), the flags.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml

from dpo_fast.cli import did_you_mean, one_line_errors
from dpo_fast.config import TrainConfig, resolve
from dpo_fast.errors import BadInput
from dpo_fast.files import regular_file
from dpo_fast.presets import DEFAULT_BETA, PRESETS


def parse(argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Parse a command line into a checked configuration and notes for the user.

    Raises BadInput for an unknown flag (naming the nearest), an unreadable recipe or a refused value.
    """
    refuse_empty(argv)
    recipe = _early(_with_values(argv)).config
    flags = _with_values([*(_recipe_flags(recipe) if recipe else []), *argv])
    refuse_empty(flags)
    early = _early(flags)
    preset = early.preset
    if preset is None and early.pretrained_model_name_or_path is None and early.dataset_name is None:
        preset, flags = "shapes", ["--preset", "shapes", *flags]
    values = dict(PRESETS.get(preset, {}))
    if DEFAULT_BETA.get(early.objective, DEFAULT_BETA["dpo"]) != DEFAULT_BETA["dpo"]:
        values.pop("beta_dpo", None)  # a preset's is on the scale of dpo
    defaults = TrainConfig(**values)
    with one_line_errors(TrainConfig):
        config = tyro.cli(TrainConfig, args=flags, default=defaults, prog="python -m dpo_fast.train")
    return resolve(config)


def refuse_empty(argv: Sequence[str]) -> None:
    """Raise BadInput for a flag's value that is empty, which as a path means the current folder, or not UTF-8.

    Most empty values come from an unset shell variable. Text that is not UTF-8 could not be written to config.yaml.
    """
    flag = ""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:  # bytes that the locale's encoding cannot decode
            locale = sys.getfilesystemencoding()
            advice = "rename it in UTF-8" if locale == "utf-8" else "set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            raise BadInput(f"{word[:300]!a} is no text in this locale, whose encoding is {locale}: {advice}") from error
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            empty = bool(equals) and not value.strip()
        else:
            empty = flag != "" and not word.strip()
        if empty:
            raise BadInput(f"{flag} is empty: give it a value, or leave it out, or leave the flag out")


# Flags that may stand alone, and the values that they and their --no_... then stand for.
_ALONE = {"gradient_checkpointing": ("full", "none"), "dry_run": ("plan", "None")}


def _with_values(flags: list[str]) -> list[str]:
    """Return the flags with the values that flags of `_ALONE` stand for where they stand alone."""
    given = []
    for flag, following in itertools.pairwise([*flags, "--"]):
        name = flag.removeprefix("--").replace("-", "_")
        on, off = _ALONE.get(name.removeprefix("no_"), ("", ""))
        if flag.startswith("--") and off and name.startswith("no_"):
            given += [f"--{name.removeprefix('no_')}", off]
        elif flag.startswith("--") and on and following.startswith("-"):
            given += [flag, on]
        else:
            given.append(flag)
    return given


@dataclass
class _Early:
    """The flags that decide the defaults of all others."""

    preset: str | None = None
    config: Path | None = None
    objective: str | None = None
    pretrained_model_name_or_path: str | None = None
    dataset_name: str | None = None


def _early(flags: list[str]) -> _Early:
    wanted = [flag for flag in flags if flag not in ("-h", "--help")]
    with one_line_errors(TrainConfig):
        return tyro.cli(_Early, args=wanted, return_unknown_args=True)[0]


# What PyYAML raises besides its own errors for values that do not fit their tags: dates, numbers, empty values.
_OF_YAML = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


def _recipe_flags(path: Path) -> list[str]:
    """Convert a YAML mapping to command-line flags, so that one parser checks names and types."""
    try:
        text = regular_file(path, "--config").read_bytes().decode()
    except OSError as error:
        raise BadInput(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"--config {path} is not text in UTF-8 ({error}): save it as UTF-8") from error
    try:
        recipe = yaml.safe_load(text) or {}
    except RecursionError:
        raise BadInput(f"--config {path} is nested too deeply: write `flag: value` lines") from None
    except (yaml.YAMLError, *_OF_YAML) as error:
        raise BadInput(f"--config {path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(recipe, dict):
        raise BadInput(f"--config {path} must hold `flag: value` lines, not a {type(recipe).__name__}")
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    flags: list[str] = []
    for key, value in recipe.items():
        name = _word(path, "a flag's name", key).replace("-", "_")
        if name not in names:
            raise BadInput(f"--config {path}: unknown flag {name!r:.200}{did_you_mean(name, TrainConfig)}")
        if name == "config":
            raise BadInput(f"--config {path} names a further config; put everything into one file")
        if isinstance(value, bool) and name in ("compile", "zero_terminal_snr"):  # YAML reads on and off as booleans
            flags += [f"--{name}", "on" if value else "off"]
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *(_word(path, name, one) for one in value)]
        else:
            flags.append(f"--{name}={_word(path, name, value)}")  # one word: the value may begin with a dash
    return flags


def _word(path: Path, name: str, value: object) -> str:
    """Return a value of a recipe as it would be written on the command line."""
    if isinstance(value, (dict, list, set, tuple)):  # with aliases, a few lines can stand for gigabytes
        raise BadInput(
            f"--config {path}: {name} holds a {type(value).__name__}; give it one value, or a list of values"
        )
    try:
        return str(value)
    except ValueError as error:  # an integer of thousands of digits
        raise BadInput(
            f"--config {path}: {name} is a number that is too long ({error}); write a shorter one"
        ) from error
