"""Find a model's family from its own files: a hub id, a diffusers folder or a single .safetensors file."""

from pathlib import Path

from diffusers import DDPMScheduler
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from dpo_fast.errors import BadInput
from dpo_fast.files import exists
from dpo_fast.models.family import Family
from dpo_fast.models.hub_errors import hub_errors
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.marks import refuse_edm
from dpo_fast.models.sd15 import SD15
from dpo_fast.models.sdxl import SDXL
from dpo_fast.models.untrusted import INDEX, check_pipeline, read_index
from dpo_fast.schedule import check_discrete

# Keyed by the name of the pipeline class, as in model_index.json.
FAMILIES: dict[str, type[Family]] = {kind.pipeline_class.__name__: kind for kind in (SD15, SDXL)}


def kind_of(path: str, hub: dict) -> type[Family]:
    """Return the family of the model at `path`. Raises BadInput for a model of no supported family."""
    if path.endswith(".safetensors"):
        return kind_of_file(path)
    kind = kind_of_folder(path, hub)
    check_scheduler(path, hub)
    return kind


def kind_of_folder(path: str, hub: dict) -> type[Family]:
    """Return the family by the pipeline class in model_index.json, the only file that is fetched for a hub id.

    Raises BadInput for an unsupported class, and for a local pipeline whose files name code.
    """
    class_name = index(path, hub)["_class_name"]
    if class_name not in FAMILIES:
        raise BadInput(f"{path} is a {class_name}; supported are {' and '.join(FAMILIES)}: use such a base model")
    if exists(Path(path)) and Path(path).is_dir():
        check_pipeline(Path(path))
    return FAMILIES[class_name]


def index(path: str, hub: dict) -> dict[str, object]:
    """Read the model_index.json of a folder or hub id. Raises BadInput if it is missing or names unknown classes."""
    index = Path(path, INDEX)
    if not exists(index) or not index.is_file():
        if exists(Path(path)) and Path(path).is_dir():
            raise BadInput(f"{path} has no {INDEX}: name the folder of a whole diffusers pipeline")
        index = Path(_index_from_hub(path, hub))
    return read_index(path, index)


def _index_from_hub(path: str, hub: dict) -> str:
    with hub_errors(path, hub["revision"], INDEX, "name a whole diffusers pipeline"):
        return hf_hub_download(path, INDEX, **hub)


def kind_of_file(path: str) -> type[Family]:
    """Return SD15 or SDXL, judging by the tensors in the header of a .safetensors file.

    The file must hold the UNet; `absent_parts` says what else it lacks. Raises BadInput for a missing file and for
    anything but a base model of these.
    """
    if not exists(Path(path)) or not Path(path).is_file():
        raise BadInput(f"{path} is no file: check the path")
    names, _ = header(path)
    first_layer, sizes = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"
    with bad_input(f"{path} cannot be loaded", "copy it again"), safe_open(path, framework="pt") as file:
        channels = file.get_slice(first_layer).get_shape()[1] if first_layer in names else None
    refuse_edm(path, names)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if any("lora" in name for name in names):
        raise BadInput(f"{path} is a LoRA, not a model: name the base model, and this file as init_lora")
    if channels not in (None, 4):
        raise BadInput(f"{path} has a UNet of {channels} input channels, inpainting or editing: use its base model")
    if channels and has("conditioner.embedders.0.transformer.") and has("conditioner.embedders.1.model."):
        return SDXL
    if channels and has("cond_stage_model."):
        return SD15
    if channels and not has("conditioner."):  # no text encoder at all
        return SDXL if sizes in names else SD15
    raise BadInput(
        f"{path} is not a whole Stable Diffusion 1.x, 2.x or SDXL base model (its first tensor is "
        f"{min(names, default='missing')}): name such a file, or a diffusers folder"
    )


def absent_parts(path: str) -> tuple[str, ...]:
    """Return which of "vae" and "text encoders" a single file lacks. Raises BadInput if it cannot be read."""
    names = header(path)[0]
    prefixes = {"vae": ("first_stage_model.",), "text encoders": ("cond_stage_model.", "conditioner.")}
    return tuple(part for part, of in prefixes.items() if not any(name.startswith(of) for name in names))


def header(path: str) -> tuple[list[str], dict[str, str]]:
    """Return the tensor names and the metadata of a .safetensors file. Raises BadInput if it cannot be read."""
    with bad_input(f"{path} cannot be loaded", "copy it again"), safe_open(path, framework="pt") as file:
        return list(file.keys()), file.metadata() or {}


def is_sd2(names: list[str]) -> bool:
    return any(name.startswith("cond_stage_model.model.") for name in names)  # OpenCLIP


def check_scheduler(path: str, hub: dict) -> dict:
    """Return the scheduler config of a folder or hub id; empty if it cannot be read, which loading will report.

    Raises BadInput for a scheduler of another kind of training, before any weights are fetched or read.
    """
    try:
        config = DDPMScheduler.load_config(path, subfolder="scheduler", **hub)
    except (OSError, ValueError, RecursionError):  # the last: JSON that is nested too deeply
        return {}
    check_discrete(config)
    return config
