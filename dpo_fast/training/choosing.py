"""How a run computes: its choices from flags, a file, the checkpoint that it resumes, or proofs on this machine."""

from dataclasses import asdict, replace
from typing import get_args, get_type_hints

import yaml

from dpo_fast.caching.settings import CacheSettings
from dpo_fast.choices.choose import AUTO, Choices, Chosen, choose
from dpo_fast.choices.workload import Workload
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.files import read_text, user_path
from dpo_fast.kernels import dispatch
from dpo_fast.models import COMPUTE_DTYPES, check_compiler, compiles, usable_attention
from dpo_fast.models.family import check_resolution, check_unet
from dpo_fast.models.load import component_config, family_of, prediction_type_of
from dpo_fast.models.source import base_of
from dpo_fast.models.text_chunks import check_chunks, positions_of
from dpo_fast.objectives import find_objective
from dpo_fast.parallel import Ranks
from dpo_fast.training.batches import RunPairs, steps_of

FLAGS = tuple(vars(Choices()))  # the flags that are choices


def choices_of(config: TrainConfig) -> Choices:
    """Return the flags of a run that are choices."""
    return Choices(**{name: getattr(config, name) for name in FLAGS})


def with_file(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Fill the choices that are "auto" from the file of `--choices`, which the main rank reads. Raises BadInput."""
    if config.choices is None:
        return config
    return _filled(config, ranks.from_main(lambda: _read(config)))


def _read(config: TrainConfig) -> dict[str, str]:
    file = user_path(config.choices)
    try:
        written = yaml.safe_load(read_text(file))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise BadInput(f"--choices {file} cannot be read ({reason}): name the config.yaml of a run") from error
    found = {name: written[name] for name in FLAGS if name in written} if isinstance(written, dict) else {}
    found = {name: "off" if value is False else value for name, value in found.items()}  # YAML's reading of off
    if not found:
        raise BadInput(f"--choices {file} names none of {', '.join(FLAGS)}: name the config.yaml of a run")
    hints = get_type_hints(TrainConfig)
    for name, value in found.items():
        if value not in (allowed := get_args(hints[name])):
            raise BadInput(f"--choices {file}: {name} ({value!r:.80}) must be one of {', '.join(allowed)}")
    return found


def resumed(config: TrainConfig, saved: dict[str, object]) -> TrainConfig:
    """Fill the choices that are "auto" from a checkpoint's configuration: a run goes on as it began."""
    return _filled(config, {name: saved.get(name, AUTO) for name in FLAGS})


def _filled(config: TrainConfig, values: dict[str, object]) -> TrainConfig:
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) == AUTO})


def check(config: TrainConfig, ranks: Ranks) -> None:
    """Raise BadInput for a choice that cannot be used on this machine."""
    try:
        dispatch.name_for(config.backend, ranks.device.type)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"--backend {config.backend}: {error}") from error
    if compiles(config.compile):
        check_compiler(ranks.device)
    if reason := usable_attention().get(config.attention):
        raise BadInput(f"--attention {config.attention} cannot be used here ({reason}): sdpa can")


def chosen_for(
    config: TrainConfig, ranks: Ranks, pairs: RunPairs, *, resuming: bool, only_known: bool = False
) -> tuple[TrainConfig, Chosen]:
    """Return the configuration with its choices made, and what they rest on. Every rank calls this, before the weights
    are loaded: a proof needs their memory.

    A resumed run keeps its choices; `--no-prove` makes none. only_known: nothing is proven now.
    """
    chosen = Chosen(choices_of(config))
    if config.prove and not resuming and AUTO in asdict(chosen.choices).values():
        passes = steps_of(config, pairs) * config.gradient_accumulation_steps
        root = CacheSettings.of(config).root
        workload = workload_of(config, ranks)
        chosen = choose(workload, ranks, chosen.choices, passes, root, only_known=only_known)
    values = asdict(chosen.choices)
    if values["compile"] == AUTO:
        values["compile"] = "off"
    return replace(config, **values), chosen


def workload_of(config: TrainConfig, ranks: Ranks) -> Workload:
    """Return a training pass of a run, from the configuration of its model. Raises BadInput."""
    source = base_of(config)
    unet = component_config(source, "unet")
    vae = component_config(source, "vae")
    check_unet(unet, vae)
    sides = family_of(source).sides(unet, vae)
    resolution = config.resolution or sides.default_resolution
    check_resolution(resolution, sides.resolution_multiple, source.path)
    encoders = (component_config(source, part) for part in family_of(source).text_encoders)
    check_chunks(config.max_token_length, encoders, source.path)
    reference = "none"
    if find_objective(config.objective).needs_reference:
        reference = "cached" if config.cached_reference else "online"
    return Workload(
        str(ranks.device),
        str(COMPUTE_DTYPES[config.mixed_precision]).removeprefix("torch."),
        config.train_batch_size,
        resolution // sides.vae_factor,
        unet,
        positions_of(config.max_token_length, component_config(source, "text_encoder")),
        config.tuning,
        config.lora_targets if config.tuning == "lora" else (),
        config.gradient_checkpointing,
        reference,
        prediction_type_of(source),
        config.soft_labels or bool(config.label_smoothing),
        config.allow_tf32,
    )
