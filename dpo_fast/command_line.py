"""Parse a command line, a YAML recipe it names, or settings from Python into a checked training configuration.

Layers, later ones win: the defaults of `TrainConfig`, a preset, the recipe (`--config`), the flags. Recipes and
settings become flags, so that one parser checks names and types.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml

from dpo_fast.cli import did_you_mean, one_line_errors
from dpo_fast.config import TrainConfig, preset_values, public, resolve
from dpo_fast.errors import BadInput
from dpo_fast.files import regular_file
from dpo_fast.help_text import Page, asks_help, show_help, without_help
from dpo_fast.presets import DEFAULT_BETA, PRESETS

PROG = "python -m dpo_fast.train"
ABOUT = """Any flag overrides its preset, and --config FILE.yaml reads flags from a file. Dashes may stand for
underscores, and of a repeated flag the last one counts. Several GPUs or hosts: accelerate launch --num_processes N
-m dpo_fast.train FLAGS, with the flags of one process; --train_batch_size is of each process, --pairs_per_step of all.

The defaults below are those of the preset that is named; shapes is meant where neither model nor data is named.
`--preset NAME --help` shows another's."""


def parse(argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Parse a command line into a checked configuration and notes for the user; `--help` prints and exits.

    Raises BadInput for an unknown flag (naming the nearest), an unreadable recipe or a refused value.
    """
    if asks_help(argv):
        show_help(Page(PROG, TrainConfig, ABOUT), *defaults_of(argv))
    return _resolved(argv)


def parse_settings(settings: Mapping[str, object]) -> tuple[TrainConfig, list[str]]:
    """Parse settings from Python, flags by name with Python values, like a command line. Raises BadInput."""
    return _resolved(flags_of(settings, TrainConfig))


def defaults_of(argv: list[str]) -> tuple[TrainConfig, dict[str, str]]:
    """Return the values of the flags that a command line leaves out, and name -> where a value is from, which is the
    preset or the recipe that it names.
    """
    argv = without_help(argv)
    recipe, _, defaults = _layers(argv)
    filled = _parsed(recipe, defaults)
    of_preset = [name for name, value in PRESETS.get(filled.preset, {}).items() if getattr(filled, name) == value]
    origins = dict.fromkeys(of_preset, f"--preset {filled.preset}")
    if recipe:
        named = {word.split("=")[0].removeprefix("--") for word in recipe if word.startswith("--")}
        origins |= dict.fromkeys(named | {name.removeprefix("no_") for name in named}, "--config")
    return filled, origins


def command_of(config: TrainConfig) -> list[str]:
    """Return the flags that make the resolved `config` again: its preset, and what differs from that."""
    named = ("preset", "objective", "pretrained_model_name_or_path", "dataset_name")
    values = {field.name: field.default for field in dataclasses.fields(config)}
    values |= preset_values({name: getattr(config, name) for name in named}) | {"preset": None}
    values["mixed_precision"] = values["mixed_precision"] or "no"
    if values["beta_dpo"] is None:
        values["beta_dpo"] = DEFAULT_BETA.get(config.objective, DEFAULT_BETA["dpo"])
    plain = public(dataclasses.replace(config, **values))
    flags = flags_of({name: value for name, value in public(config).items() if value != plain[name]}, TrainConfig)
    words: list[str] = []
    for flag in flags:
        name, _, value = flag.partition("=")
        words += [name, value] if flag.startswith("--") and value and not value.startswith("-") else [flag]
    return words


def flags_of(settings: Mapping[str, object], flags: type, source: str = "") -> list[str]:
    """Return the command-line flags for these names and values: None, a number, a text, a path, or a list of these.

    flags: the dataclass of the flags. source: where the settings are from, for errors. Raises BadInput for an unknown
    name, naming the nearest, and for a value that no flag takes.
    """
    prefix = f"{source}: " if source else ""
    names = [field.name for field in dataclasses.fields(flags)]
    words: list[str] = []
    for key, value in settings.items():
        name = _word(prefix, "a flag's name", key).replace("-", "_")
        if name not in names:
            raise BadInput(f"{prefix}unknown flag {name!r:.200}{did_you_mean(name, flags)}")
        if isinstance(value, bool) and name in ("compile", "zero_terminal_snr"):  # YAML reads on and off as booleans
            words += [f"--{name}", "on" if value else "off"]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *(_word(prefix, name, one) for one in value)]
        else:
            words.append(f"--{name}={_word(prefix, name, value)}")  # one word: the value may begin with a dash
    return words


def _resolved(argv: list[str]) -> tuple[TrainConfig, list[str]]:
    _, flags, defaults = _layers(argv)
    return resolve(_parsed(flags, defaults))


def _parsed(flags: list[str], defaults: TrainConfig) -> TrainConfig:
    with one_line_errors(TrainConfig):
        return tyro.cli(TrainConfig, args=flags, default=defaults, prog=PROG)


def _layers(argv: list[str]) -> tuple[list[str], list[str], TrainConfig]:
    """Return the flags of the recipe that a command line names, those with its own, and the defaults of all others."""
    refuse_empty(argv)
    own = _with_values(argv)
    early = _early(own)
    recipe = _with_values(_recipe_flags(early.config)) if early.config else []
    flags = [*recipe, *own]
    if recipe:
        refuse_empty(flags)
        early = _early(flags)
    named = {name: value for name, value in vars(early).items() if value is not None and name != "config"}
    return recipe, flags, TrainConfig(**named)


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
    with one_line_errors(TrainConfig):
        return tyro.cli(_Early, args=flags, return_unknown_args=True)[0]


# What PyYAML raises besides its own errors for values that do not fit their tags: dates, numbers, empty values.
_OF_YAML = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


def read_recipe(path: Path, flag: str = "") -> dict[object, object]:
    """Return the mapping in a YAML file, `config.yaml` of a run for one; its names and values are not checked.

    Raises BadInput, whose message begins with `flag`, for a file that is no such mapping or cannot be read.
    """
    what = f"{flag} {path}".strip()
    try:
        text = regular_file(path, flag).read_bytes().decode()
    except OSError as error:
        raise BadInput(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not text in UTF-8 ({error}): save it as UTF-8") from error
    try:
        recipe = yaml.safe_load(text) or {}
    except RecursionError:
        raise BadInput(f"{what} is nested too deeply: write `flag: value` lines") from None
    except (yaml.YAMLError, *_OF_YAML) as error:
        raise BadInput(f"{what} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(recipe, dict):
        raise BadInput(f"{what} must hold `flag: value` lines, not a {type(recipe).__name__}")
    return recipe


def _recipe_flags(path: Path) -> list[str]:
    """Return the command-line flags that a YAML recipe stands for. Raises BadInput."""
    recipe = read_recipe(path, "--config")
    if any(isinstance(key, str) and key.replace("-", "_") == "config" for key in recipe):
        raise BadInput(f"--config {path} names a further config; put everything into one file")
    return flags_of(recipe, TrainConfig, f"--config {path}")


def _word(prefix: str, name: str, value: object) -> str:
    """Return a value as it would be written on the command line."""
    if isinstance(value, (dict, list, set, tuple)):  # with aliases, a few lines of YAML can stand for gigabytes
        raise BadInput(f"{prefix}{name} holds a {type(value).__name__}; give it one value, or a list of values")
    try:
        return str(value)
    except ValueError as error:  # an integer of thousands of digits
        raise BadInput(f"{prefix}{name} is a number that is too long ({error}); write a shorter one") from error
