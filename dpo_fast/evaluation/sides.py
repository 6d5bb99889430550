"""Which models are compared: a run's result, its base, or any pipeline."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.config import TrainConfig, parse
from dpo_fast.errors import BadInput
from dpo_fast.files import exists
from dpo_fast.models.load import family_of
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.opened import settled
from dpo_fast.models.source import ModelSource, base_of, result_of
from dpo_fast.training.run_folder import check_result

if TYPE_CHECKING:
    from dpo_fast.evaluation.generate_options import GenerateConfig


def is_run(path: str) -> bool:
    """Whether `path` is an output folder of `python -m dpo_fast.train`."""
    return exists(Path(path, "config.yaml")) and Path(path, "config.yaml").is_file()


def read_run(folder: str) -> TrainConfig:
    """The configuration of a finished run. Raises BadInput where there is no result yet, and where it is damaged."""
    check_result(Path(folder))
    config, _ = parse(["--config", str(Path(folder, "config.yaml"))])
    result = Path(folder, WEIGHT_NAME if config.tuning == "lora" else "model_index.json")
    if not result.is_file():
        raise BadInput(f"the run {folder} has no result yet ({result.name}): let it finish, or name another")
    return config


def model_sources(
    policy: str,
    baseline: str | None = None,
    *,
    turbo: bool = False,
    **overriding: object,
) -> dict[str, ModelSource]:
    """Name -> model, settled: the baseline, where there is one, and then the policy.

    policy: a run's folder, or a pipeline (folder, hub id, .safetensors). baseline: the same, or `base` (what the run
    started from), or `none`; None: base for a run, else none. turbo: pipelines named here are SDXL-Turbo (a
    run knows). overriding: fields of ModelSource, for both models; None: as the run has it, or the model's usual.
    A baseline of the policy's family is sampled as the policy is, and both compute in one dtype (fp16 without a run).
    """
    config = read_run(policy) if is_run(policy) else None
    given = {name: value for name, value in overriding.items() if value is not None}
    precision = config.mixed_precision if config else "fp16"

    def source(path: str) -> ModelSource:
        if is_run(path):
            found = result_of(config if path == policy else read_run(path), Path(_tidy(path)))
            return replace(found, **{"mixed_precision": precision, **given})
        return ModelSource(**{"path": _tidy(path), "turbo": turbo, "mixed_precision": precision, **given})

    name, aligned = _folder_name(policy), settled(source(policy))
    if baseline is None:
        baseline = "none" if config is None else "base"
    if baseline == "none":
        return {name: aligned}
    if baseline == "base" and config is None:
        raise BadInput(f"--baseline base needs a run as --policy, but {policy} holds no config.yaml; name the baseline")
    if baseline == "base":
        other_name, other = "base", replace(base_of(config), **given)
    else:
        other_name, other = _folder_name(baseline), source(baseline)
        if family_of(other) is family_of(aligned):
            other = replace(other, steps=aligned.steps, guidance=aligned.guidance, resolution=aligned.resolution)
    if other_name.lower() == name.lower():
        other_name = f"baseline-{name}"
    return {other_name: settled(other), name: aligned}


def models_of(config: "GenerateConfig", policy: str, baseline: str | None) -> dict[str, ModelSource]:
    """`model_sources` with the flags of generation."""
    return model_sources(
        policy,
        baseline,
        turbo=config.is_turbo,
        mixed_precision=config.mixed_precision,
        steps=config.sampling_steps,
        guidance=config.sampling_guidance,
        resolution=config.resolution,
        cache_dir=config.cache_dir,
        token=config.hub_token,
    )


def _tidy(path: str) -> str:
    """A folder by one name, however it was written; a hub id as it is."""
    return os.path.normpath(path) if exists(Path(path)) else path


def _folder_name(path: str) -> str:
    """The last part of a path or hub id, in letters that every disk takes."""
    last = Path(path).resolve().name if exists(Path(path)) else path.rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last.removesuffix(".safetensors")) or "model"
