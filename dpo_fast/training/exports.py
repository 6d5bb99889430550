"""A result in the formats that a run asks for: diffusers' own, always; kohya's keys and one single file beside it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from dpo_fast import __version__
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.hub_revisions import public_name
from dpo_fast.models.exporting import (
    DTYPES,
    KOHYA,
    SINGLE_FILE,
    merged_state,
    sha256_of,
    write_kohya,
    write_single_file,
)
from dpo_fast.models.family import Family
from dpo_fast.models.lora import save_lora
from dpo_fast.models.original_layout import unet_places

_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # of the layout, as kohya's scripts name it


def write_result(
    family: Family,
    folder: Path,
    config: TrainConfig,
    weights: Mapping[str, torch.Tensor],  # parameter name in the UNet -> fp32: the adapters', or the whole UNet's
    counts: Mapping[str, object],  # for the metadata: pairs_seen, base_sha256 (of that function), and others
) -> None:
    """Write the result of a run to `folder`, in every format of `--export`.

    The family's VAE and text encoders must be there if a whole model is written.
    """
    lora = config.tuning == "lora"
    if lora:
        save_lora(family, folder, weights)
    else:
        family.save_full(folder, weights)
    formats = formats_of(config)
    if config.export is None and not _has_layout(family):
        formats = ("diffusers",)
    if "kohya" in formats or "single_file" in formats:
        about = _metadata(family, config, counts)
    if "kohya" in formats:
        of_lora = {
            "modelspec.architecture": about["modelspec.architecture"] + "/lora",
            "ss_network_module": "networks.lora",
        }
        write_kohya(family, folder / KOHYA, weights, about | of_lora, DTYPES[config.export_dtype or "fp32"])
    if "single_file" in formats:
        state = merged_state(family, weights) if lora else weights
        dtype = DTYPES[config.export_dtype or "fp16"]
        write_single_file(family, folder / SINGLE_FILE, state, about, dtype, _untouched(config))


def formats_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the formats that a run writes: those of --export, or diffusers' and, for a LoRA, kohya's."""
    if config.export is not None:
        return tuple(dict.fromkeys(("diffusers", *config.export)))
    return ("diffusers", "kohya") if config.tuning == "lora" else ("diffusers",)


def check_formats(config: TrainConfig, family: Family) -> None:
    """Raise BadInput for a format that was asked for and in which this model cannot be written."""
    if set(config.export or ()) - {"diffusers"}:
        unet_places(family.unet.config)
    if "single_file" in formats_of(config):
        for name in family.text_encoders:
            kind = type(getattr(family.pipeline, name)).__name__
            if not kind.startswith("CLIPText"):
                raise BadInput(
                    f"--export single_file: the {name} is a {kind}, which has no place in such a file: leave that out"
                )


def _has_layout(family: Family) -> bool:
    try:
        unet_places(family.unet.config)
    except BadInput:
        return False
    return True


def needs_encoders(config: TrainConfig) -> bool:
    """Whether the result holds the VAE and the text encoders."""
    return config.tuning == "full" or "single_file" in formats_of(config)


def bytes_of_result(config: TrainConfig, trained: float, unet: float, others: float) -> float:
    """Return the size of the result. trained, unet, others: numbers of parameters that are trained, of the UNet, and of
    the VAE and the text encoders."""
    width = DTYPES[config.export_dtype].itemsize if config.export_dtype else None
    total = 4 * (trained if config.tuning == "lora" else unet + others)
    if "kohya" in formats_of(config):
        total += (width or 4) * trained
    if "single_file" in formats_of(config):
        total += (width or 2) * (unet + others)
    return total


def base_sha256(config: TrainConfig) -> str | None:
    """Return the SHA-256 of the single file that a run begins with, if its result will name it."""
    path = config.pretrained_model_name_or_path
    needed = set(formats_of(config)) - {"diffusers"}
    return sha256_of(Path(path)) if needed and path.endswith(".safetensors") else None


def _untouched(config: TrainConfig) -> Path | None:
    """Return the single file whose VAE and text encoders the run used as they are, if there is one."""
    path = config.pretrained_model_name_or_path
    own = config.pretrained_vae_model_name_or_path is None and config.init_lora is None
    return Path(path) if own and path.endswith(".safetensors") and Path(path).is_file() else None


def _metadata(family: Family, config: TrainConfig, counts: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata of kohya's scripts and of Stability AI's model specification, with what DPO adds.

    Nothing of it depends on the time, so that equal results are equal files.
    """
    base = config.pretrained_model_name_or_path
    v_prediction = family.schedule.prediction_type == "v_prediction"
    if family.needs_time_ids:
        architecture, version = "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
    elif family.unet.config.use_linear_projection:  # Stable Diffusion 2.x
        architecture = f"stable-diffusion-v2-{'768-v' if v_prediction else '512'}"
        version = "sd_v2_v" if v_prediction else "sd_v2"
    else:
        architecture, version = "stable-diffusion-v1", "sd_v1"
    resolution = config.resolution or family.default_resolution
    about = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": config.output_dir.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_zero_terminal_snr": str(family.schedule.rescaled),
        "ss_sd_model_name": public_name(base),
        "ss_output_name": config.output_dir.name,
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": str(config.lr_scheduler),
        "ss_optimizer": str(config.optimizer),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_mixed_precision": str(config.mixed_precision),
        "ss_seed": str(config.seed),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_training_comment": f"preference alignment ({config.objective}), not captioning",
        "dpo_fast.version": __version__,
        "dpo_fast.objective": str(config.objective),
        "dpo_fast.beta": str(config.beta_dpo),
        "dpo_fast.pairs": str(public_name(config.dataset_name)),
        **{f"dpo_fast.{name}": str(value) for name, value in counts.items() if name != "base_sha256"},
    }
    if digest := counts.get("base_sha256"):
        about["ss_new_sd_model_hash"] = str(digest)
    return about
