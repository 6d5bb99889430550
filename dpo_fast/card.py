"""The model card of a run: what was trained on what, by which command, and how to load it."""

import platform
import shlex
from importlib.metadata import version
from pathlib import Path

import yaml

from dpo_fast import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")


def model_card(
    config: dict[str, object],
    summary: dict[str, object],
    counts: dict[str, object],
    family: str,
    argv: list[str],
    scheduler: tuple[str, dict[str, object]] | None = None,
) -> str:
    """README.md of an output folder, with the hub's metadata block.

    `counts` are the numbers of the data set, `argv` the flags the run was started with. scheduler: the class that has
    the schedule which was trained, and the settings in which it differs from the base's own; None: the base's will do.
    """
    lora = config["tuning"] == "lora"
    base = config["pretrained_model_name_or_path"]
    pipeline = "StableDiffusionPipeline" if family == "sd15" else "StableDiffusionXLPipeline"
    on_hub = {"base_model": base, "datasets": [config["dataset_name"]]}  # the hub refuses local paths here
    metadata = {
        **{k: v for k, v in on_hub.items() if not Path(v[0] if k == "datasets" else v).exists()},
        "library_name": "diffusers",
        "tags": ["text-to-image", "diffusers", "diffusion-dpo", *(["lora"] if lora else [])],
    }
    here = config["hub_model_id"] or "FOLDER"
    from_base = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    load = (
        f"pipeline = {pipeline}.{from_base}({base!r})\npipeline.load_lora_weights({here!r})"
        if lora
        else f"pipeline = {pipeline}.from_pretrained({here!r})"
    )
    if lora and scheduler is not None:  # a pipeline is saved with it
        kind, settings = scheduler
        imports = f"from diffusers import {kind}, {pipeline}"
        changed = "".join(f", {name}={value!r}" for name, value in settings.items())
        load += f"\npipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{changed})"
    else:
        imports = f"from diffusers import {pipeline}"
    rows = {
        "base model": base
        + (f" with the LoRA {config['init_lora']} merged: load that first" if config["init_lora"] else ""),
        "tuning": f"LoRA, rank {config['rank']}, alpha {config['lora_alpha'] or config['rank']}"
        if lora
        else "full UNet",
        "objective": f"{config['objective']}, beta {config['beta_dpo']:g}",
        "pairs": f"{config['dataset_name']}: "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()),
        "steps": f"{summary['steps']} of {config['pairs_per_step']} pairs",
        "learning rate": f"{config['learning_rate']:g}" + (" x pairs a step" if config["scale_lr"] else ""),
        "compute dtype": {"no": "fp32"}.get(config["mixed_precision"], config["mixed_precision"]) + ", masters fp32",
        "loss": f"{_number(summary['loss_first'])} at first, {_number(summary['loss_last'])} at last",
        "implicit accuracy": _number(summary["implicit_accuracy"]),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {base} aligned by Diffusion-DPO\n\n"
        "Trained with dpo_fast by [Diffusion-DPO](https://arxiv.org/abs/2311.12908).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{imports}\n\n{load}\n```\n\n"
        f"## Made by\n\n```bash\npython -m dpo_fast.train {shlex.join(_without_token(argv))}\n```\n\n"
        f"dpo_fast {__version__}, Python {platform.python_version()}, {versions}. All settings are in config.yaml.\n"
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _without_token(argv: list[str]) -> list[str]:
    """The command line with the hub token's value left out."""
    shown, skip = [], False
    for word in argv:
        name = word.split("=", 1)[0].replace("-", "_")
        if not skip and name != "__hub_token":
            shown.append(word)
        skip = name == "__hub_token" and "=" not in word
    return shown
