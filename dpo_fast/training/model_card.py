"""The model card of a run: what was trained on what, by which command, and how to load it.

Names of models, data sets and files come from outside. The card shows them as plain text, so they cannot add lines,
markup or YAML, and of a local path it shows only the last part.
"""

import html
import os
import platform
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dpo_fast import __version__
from dpo_fast.files import read_text
from dpo_fast.hub_revisions import public_name
from dpo_fast.objectives import FROM_PYTHON

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
# As stated on the model cards of the published base models.
_LICENCES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
    "stabilityai/stable-diffusion-2-1": {"license": "openrail++"},
    "stabilityai/stable-diffusion-xl-base-1.0": {"license": "openrail++"},
    "stabilityai/sdxl-turbo": {
        "license": "other",
        "license_name": "sai-nc-community",
        "license_link": "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md",
    },
}
_LONG = "up to {} tokens, encoded in chunks of 75; a diffusers pipeline by itself cuts a prompt at 75"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_WORD = re.compile(r"[\w.+:/-]{1,200}")  # what a field of a licence may contain
_MARKUP = re.compile(r"[\\`*\[\]|~!#$]|^[-+=>]|(?<!\w)_|_(?!\w)")
_LINKS = re.compile(r":(?=//)|(?<=www)\.|@", re.IGNORECASE)  # what GitHub and the hub turn into links


def model_card(
    config: dict[str, object],
    summary: dict[str, object],
    counts: dict[str, object],
    pipeline: str,
    argv: list[str],
    scheduler: tuple[str, dict[str, object]] | None = None,
    home: str = "diffusers",
) -> str:
    """Return the README.md text of an output folder, with the hub's metadata block.

    `counts` are the data set's row counts, `argv` the flags the run was started with. pipeline: the class that loads
    the model, which is imported from `home`. scheduler: the class with the schedule used in training, and its settings
    that differ from the base model's; None: the base model's scheduler is right.
    """
    lora = config["tuning"] == "lora"
    base, pairs = (public_name(config[name]) for name in ("pretrained_model_name_or_path", "dataset_name"))
    here = config["hub_model_id"] or "FOLDER"
    from_base = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    load = (
        f"pipeline = {pipeline}.{from_base}({base!r})\npipeline.load_lora_weights({here!r})"
        if lora
        else f"pipeline = {pipeline}.from_pretrained({here!r})"
    )
    if lora and scheduler is not None:  # a full pipeline is saved with its scheduler
        kind, settings = scheduler
        imports = f"from diffusers import {kind}, {pipeline}"
        if home != "diffusers":
            imports = f"from diffusers import {kind}\n\nfrom {home} import {pipeline}"
        changed = "".join(f", {name}={value!r}" for name, value in settings.items())
        load += f"\npipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{changed})"
    else:
        imports = f"from {home} import {pipeline}"
    merged = f" with the LoRA {_text(public_name(config['init_lora']))} merged: load that first"
    rows = {
        "base model": _text(base) + merged * bool(config["init_lora"]),
        "tuning": f"LoRA, rank {config['rank']}, alpha {config['lora_alpha'] or config['rank']}"
        if lora
        else "full UNet",
        "objective": f"{config['objective']}, beta {config['beta_dpo']:g}",
        "pairs": f"{_text(pairs)}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()),
        **({} if config["max_token_length"] == 75 else {"captions": _LONG.format(config["max_token_length"])}),
        "steps": f"{summary['steps']} of {config['pairs_per_step']} pairs",
        "learning rate": f"{config['learning_rate']:g}" + (" x pairs a step" if config["scale_lr"] else ""),
        "compute dtype": {"no": "fp32"}.get(config["mixed_precision"], config["mixed_precision"]) + ", masters fp32",
        "loss": f"{_number(summary['loss_first'])} at first, {_number(summary['loss_last'])} at last",
        "implicit accuracy": _number(summary["implicit_accuracy"]),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    given = "The objective is a function that was given in Python (`dpo_fast.train(..., objective=...)`).\n\n"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    body = (
        f"# {_text(base)} aligned by Diffusion-DPO\n\n"
        "Trained with dpo_fast by [Diffusion-DPO](https://arxiv.org/abs/2311.12908).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{imports}\n\n{load}\n```\n\n"
        f"## Made by\n\n```bash\npython -m dpo_fast.train {' '.join(map(_word, shown_command(argv)))}\n```\n\n"
        f"{given * str(config['objective']).startswith(FROM_PYTHON)}"
        f"dpo_fast {__version__}, Python {platform.python_version()}, {versions}. All settings are in config.yaml.\n"
    )
    metadata = _metadata(config, summary, lora).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n{body}").content


def shown_command(argv: list[str]) -> list[str]:
    """Return a command line fit for publication: no hub token, and only the last part of absolute paths."""
    shown, skip = [], False
    for word in argv:
        name = word.split("=", 1)[0].replace("-", "_")
        if not skip and name != "__hub_token":
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            shown.append(flag + equals + public_name(value))
        skip = name == "__hub_token" and "=" not in word
    return shown


def _metadata(config: dict[str, object], summary: dict[str, object], lora: bool) -> ModelCardData:
    """The metadata block for the hub, which rejects local paths as models and data sets."""
    base, pairs = config["pretrained_model_name_or_path"], config["dataset_name"]
    data: dict[str, object] = {**_licence(base)}
    if _on_hub(base):
        data |= {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"}
    if _on_hub(pairs):
        data["datasets"] = [pairs]
    results = []
    if (accuracy := summary.get("validation_accuracy")) is not None:
        results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type=pairs if _on_hub(pairs) else "local",
                dataset_name=_line(public_name(pairs)),
                metric_type="accuracy",
                metric_name="Implicit accuracy on pairs held out",
                metric_value=round(accuracy, 4),
            )
        ]
    name = config["hub_model_id"] or f"{public_name(base)} aligned by Diffusion-DPO"
    return ModelCardData(
        **data,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "diffusion-dpo", *(["lora"] if lora else [])],
        **({"model_name": _line(name), "eval_results": results} if results else {}),
    )


def _licence(base: str) -> dict[str, str]:
    """The base model's licence, which its derivatives inherit: as published, or from the card in its folder.

    Empty if it is not known.
    """
    if base in _LICENCES and not os.path.exists(base):
        return dict(_LICENCES[base])
    try:
        block = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*\n", read_text(Path(base, "README.md")), re.DOTALL)
        said = yaml.safe_load(block[1]) if block else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(said, dict):
        return {}
    found = {key: said[key] for key in _LICENCE_KEYS if isinstance(said.get(key), str) and _WORD.fullmatch(said[key])}
    return found if "license" in found else {}


def _on_hub(name: str) -> bool:
    """Whether `name` is a repository of the hub rather than a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not os.path.exists(name)


def _line(text: str) -> str:
    """Return `text` on one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _text(name: str) -> str:
    """Escape a name for Markdown so that it renders literally: no markup, HTML, links or table cells."""
    escaped = html.escape(_line(name), quote=False)
    escaped = re.sub(_MARKUP, lambda found: "".join("\\" + c for c in found[0]), escaped)
    return re.sub(_LINKS, lambda found: f"&#{ord(found[0])};", escaped)


def _word(word: str) -> str:
    """Quote a word of a command line for bash, on one line."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(_ESCAPES.get(c) or (c if c.isprintable() else _code(c)) for c in word)
    return f"$'{escaped}'"


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _code(character: str) -> str:
    """Escape an unprintable character for bash's $'...'; a byte that is not UTF-8 stays that byte."""
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # surrogateescape
        return f"\\x{number - 0xDC00:02x}"
    return f"\\U{number:08x}" if number > 0xFF else f"\\u{number:04x}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
