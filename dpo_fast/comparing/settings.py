"""The settings of runs: read from config.yaml, those in which runs differ, and those that all have in common."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dpo_fast.checksums import check_text
from dpo_fast.command_line import read_recipe
from dpo_fast.comparing.untrusted import COUNT_LIMIT, REMEDY, check_size
from dpo_fast.config import TrainConfig
from dpo_fast.hub_revisions import public_name

Setting = bool | int | float | str | tuple[bool | int | float | str, ...] | None
Settings = Mapping[str, Setting]  # flag -> value, of every flag that is shown

SEED = "seed"
# Flags that say where, when and how often something is written, or that stand for others: the result is the same.
_ADMINISTRATIVE = frozenset(
    "preset config dry_run output_dir overwrite resume_from_checkpoint report_to logging_dir tracker_name log_every"
    " checkpointing_steps checkpointing_minutes checkpoints_total_limit run_validation validation_steps"
    " validation_prompts push_to_hub hub_model_id hub_token cache_dir cache latent_cache_dir dataloader_num_workers"
    " vae_encode_batch_size max_skipped_updates max_bad_fraction prove choices num_train_epochs local_rank"
    " prior_generation_precision loss_type preference use_8bit_adam enable_xformers_memory_efficient_attention"
    " eval_scorers eval_prompts eval_images eval_batch_size eval_every eval_every_images scorer_models"
    " sampling_steps sampling_guidance".split()
)
# Flags that change a run's time and memory, and its result by rounding only.
_ROUNDING = frozenset(
    "train_batch_size gradient_accumulation_steps backend attention memory_order compile gradient_checkpointing".split()
)
OF_LORA = ("rank", "lora_alpha", "lora_targets")
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name not in _ADMINISTRATIVE}
# What is said of all runs even where it is the default.
_ALWAYS = (
    "objective beta_dpo learning_rate tuning pairs_per_step max_train_steps mixed_precision"
    " pretrained_model_name_or_path dataset_name seed".split()
)
_LONGEST, _LONGEST_WHOLE = 60, 200  # characters of a value that is shown


def read_settings(path: Path) -> Settings:
    """The settings in a run's config.yaml. Raises Damaged, and BadInput for a file that is no configuration."""
    check_size(path)
    check_text(path, REMEDY)
    return settings_of(read_recipe(path))


def settings_of(values: Mapping[object, object]) -> Settings:
    """The settings among `values`; a flag that is missing, or has no plain value, has its default.

    Those of LoRA are None where nothing is trained with LoRA.
    """
    found: dict[str, Setting] = {}
    for name, default in DEFAULTS.items():
        value = values.get(name, default)
        if isinstance(value, (list, tuple)) and all(_is_plain(one) for one in value):
            value = tuple(value)
        elif isinstance(value, Path):
            value = str(value)
        elif not _is_plain(value):
            value = default
        found[name] = value
    return found if found["tuning"] == "lora" else {**found, **dict.fromkeys(OF_LORA)}


def _is_plain(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < COUNT_LIMIT
    return value is None or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def differing(of_runs: Iterable[Settings]) -> list[str]:
    """The flags in which some of the runs differ, in the order of `--help`."""
    runs = list(of_runs)
    with_lora = [run for run in runs if run["tuning"] == "lora"]
    some = 0 < len(with_lora) < len(runs)

    def apart(name: str) -> bool:
        values = _distinct(run[name] for run in (with_lora if name in OF_LORA else runs))
        return len(values) > 1 or (some and name in OF_LORA and (name == "rank" or values != {DEFAULTS[name]}))

    return [name for name in DEFAULTS if apart(name)]


def _distinct(values: Iterable[Setting]) -> set[Setting]:
    """The different values; a path counts as its last part where that is among them, as evaluations record it."""
    found = set(values)
    return {public_name(value) if isinstance(value, str) and public_name(value) in found else value for value in found}


def common(of_runs: Iterable[Settings]) -> dict[str, Setting]:
    """The settings that all runs share, without those that nobody changed."""
    runs = list(of_runs)
    if not runs:
        return {}
    hidden, first = {*differing(runs), *_ROUNDING}, runs[0]
    changed = [name for name in DEFAULTS if name not in _ALWAYS and first[name] not in (None, DEFAULTS[name])]
    return {name: first[name] for name in (*_ALWAYS, *changed) if name not in hidden}


def alike_but_for_the_seed(settings: Settings) -> tuple[Setting, ...]:
    """A key that two runs share if they differ in the seed and in rounding at most."""
    return tuple(value for name, value in settings.items() if name != SEED and name not in _ROUNDING)


def shown(value: Setting) -> str:
    """A value as it would be given as a flag; of a local path the last part."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(shown(one) for one in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    text = public_name(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def shown_distinct(values: Sequence[Setting]) -> list[str]:
    """`shown` for values side by side; whole where different ones would look the same."""
    texts = [shown(value) for value in values]
    if len(set(texts)) == len(set(values)):
        return texts
    whole = (repr(value) if isinstance(value, float) else str(value) for value in values)
    return [text if len(text) <= _LONGEST_WHOLE else f"...{text[-_LONGEST_WHOLE:]}" for text in whole]
