"""Load a Family from a hub id, a diffusers folder or a single .safetensors file.

The pipeline's own files decide which family it is, never its path. Only safetensors are loaded.
"""

import inspect
import re
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from packaging.version import Version
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dpo_fast.errors import BadInput
from dpo_fast.files import exists, regular_files
from dpo_fast.hub_revisions import public_names, revision_of
from dpo_fast.models.attention import set_attention
from dpo_fast.models.family import Family
from dpo_fast.models.kinds import (
    absent_parts,
    check_scheduler,
    header,
    index,
    is_sd2,
    kind_of,
    kind_of_file,
    kind_of_folder,
)
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.marks import Marks, marks_of_file, marks_of_scheduler, reconcile
from dpo_fast.models.memory_order import format_of
from dpo_fast.models.source import ModelSource
from dpo_fast.models.text_chunks import check_chunks
from dpo_fast.models.trained import weights_file
from dpo_fast.models.untrusted import check_part, check_pipeline, check_weights
from dpo_fast.quiet import no_loading_bars
from dpo_fast.schedule import NoiseSchedule, noise_schedule, turbo_grid, usable_timesteps

_PICKLED = "check its files; pickled weights are not loaded, convert them with save_pretrained(folder)"
_OTHER_CONFIG = "name the folder or hub id of a pipeline with this architecture as single_file_config"
# The files that diffusers would fetch from a VAE's repository.
_WEIGHTS = "diffusion_pytorch_model"
_FILES_OF_VAE = [
    f"{folder}{name}"
    for folder in ("", "vae/")
    for name in (
        "config.json",
        f"{_WEIGHTS}.safetensors",
        f"{_WEIGHTS}.safetensors.index.json",
        f"{_WEIGHTS}-*.safetensors",
    )
]
ALIGNMENT = 64  # bytes: PyTorch aligns its CPU allocations to this
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_OF_VARIANT = re.compile(r"\.([A-Za-z]\w*)(-\d+-of-\d+)?\.safetensors$")  # model.fp16.safetensors
# diffusers' converter to single files leaves this matrix under its transformers name, not transposed like the original
# `text_projection`, and diffusers' loader does not look for it.
_CONVERTERS_PROJECTION = "conditioner.embedders.1.model.text_projection.weight"
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"  # the argument's name


def load_family(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    unet_dtype: torch.dtype | None = None,
) -> Family:
    """Load a model with every component on `device`, frozen and in eval mode; `source.adapter` is not applied.

    source.path: a hub id, a folder with model_index.json, or a .safetensors file of a complete Stable Diffusion or SDXL
    model. source.turbo: treat the pipeline as SDXL-Turbo or SD-Turbo; nothing in the files tells the two apart.
    dtype: the compute dtype. Text encoders are held in it, the VAE only if its config says force_upcast is false (else
    in fp32: SDXL's VAE overflows in fp16).
    unet_dtype: the UNet's initial dtype (fp32 if master weights will be copied from it); None: `dtype`.
    source.prediction_type: "epsilon" or "v_prediction"; None: as the marks of a single file say
    (`dpo_fast.models.marks`), else the scheduler's config.
    source.zero_terminal_snr: "on", "off", or "auto": on for Turbo and where a mark or the scheduler's config says so.
    source.single_file_config: for a single file, a hub id or folder with the pipeline's configuration; None: the
    family's usual one from the hub.

    Raises BadInput, with a one-line message, for anything that cannot be found, read or trained.
    """
    path, unet_dtype, hub = source.path, unet_dtype or dtype, source.hub()
    refuse_pickle(path)
    kind, marks = kind_of(path, hub), Marks()
    prediction_type, vae_path = source.prediction_type, source.vae_path
    elsewhere = {"cache_dir": source.cache_dir, "token": source.token}  # for repositories other than the model's
    if path.endswith(".safetensors"):
        check_supplied(source)
        named = source.single_file_config
        config = None if named is None else _config_folder(named, hub)
        scheduler = check_scheduler(config_source(path, config), {**elsewhere, "revision": None})
        marks = marks_of_file(path, *header(path), prediction_type)
        if prediction_type is None and marks.prediction_type is None:
            _check_sd2(path, scheduler)
        where = {"config": config, **elsewhere}
        others = _absent_parts(path, kind, dtype, named, vae_path is not None, where)
        pipeline = _load_file(path, kind, dtype, unet_dtype, others, where)
    else:
        if vae_path is None and (part := index(path, hub).get("vae")):
            _check_vae({"_class_name": part[1]})
        pipeline = _load_folder(path, kind, dtype, unet_dtype, source.variant, hub, vae_path is None)
    if None in (pipeline.tokenizer, *(getattr(pipeline, part) for part in kind.text_encoders)):
        raise BadInput(f"{path} has no text encoder (the SDXL refiner?): use a pipeline with all of them")
    if vae_path is not None:
        pipeline.vae = _load_vae(vae_path, pipeline.vae, elsewhere)
    _check_complete(path, pipeline)
    encoders = (getattr(pipeline, part).config.to_dict() for part in kind.text_encoders)
    check_chunks(source.max_token_length, encoders, path)
    _check_vae({"_class_name": type(pipeline.vae).__name__})
    if pipeline.vae.config.force_upcast is False:
        pipeline.vae.to(dtype)
    scheduler = marks_of_scheduler(pipeline.scheduler.config)
    prediction_type, zero_terminal_snr = reconcile(path, marks, scheduler, prediction_type, source.zero_terminal_snr)
    family = (kind.few_steps if source.turbo else kind)(
        pipeline,
        dtype=dtype,
        device=torch.device(device),
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        max_token_length=source.max_token_length,
    )
    set_attention(family.unet, source.attention)
    family.unet.to(memory_format=format_of(source.memory_order))
    align_weights(pipeline)
    return family


def check_supplied(source: ModelSource) -> None:
    """Raise BadInput, naming what is missing and what supplies it, for a single file without VAE or text encoders for
    which no others are named."""
    path, other_vae = source.path, source.vae_path is not None
    if not path.endswith(".safetensors") or source.single_file_config is not None:
        return
    absent = absent_parts(path)
    if "text encoders" in absent:
        raise BadInput(
            f"{path} has no text encoders{' and no VAE' * ('vae' in absent and not other_vae)}: name a whole pipeline"
            " that has them (a folder or hub id) with --single_file_config"
        )
    if "vae" in absent and not other_vae:
        raise BadInput(
            f"{path} has no VAE: name one with --pretrained_vae_model_name_or_path, or a whole pipeline that has it"
            " with --single_file_config"
        )


def refuse_pickle(path: str) -> None:
    """Raise BadInput for a model file that could run code."""
    if path.endswith(_PICKLES):
        raise BadInput(f"{path} is a pickle, which could run code: convert it to .safetensors or to a diffusers folder")


def revisions(source: ModelSource) -> dict[str, str]:
    """Map the `public_name` of each repository, folder or file that a model is read from to its `revision_of`."""
    found = {source.path: revision_of(source.path, revision=source.revision, cache_dir=source.cache_dir)}
    trained = source.trained and str(weights_file(Path(source.trained)))
    for place in filter(None, (source.vae_path, source.merged, source.adapter, trained, source.single_file_config)):
        lora = Path(place, WEIGHT_NAME)  # an output folder holds other files too
        found[place] = revision_of(lora if lora.is_file() else place, cache_dir=source.cache_dir)
    return public_names(found.items())


def align_weights(pipeline: DiffusionPipeline) -> None:
    """Copy misaligned CPU weights to memory that is aligned as PyTorch's own allocations are.

    Libraries leave weights where they read them, at addresses that differ between processes, and the last bit of a
    matrix product depends on the alignment.
    """
    for module in pipeline.components.values():
        for tensor in (*module.parameters(), *module.buffers()) if isinstance(module, nn.Module) else ():
            if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()


def family_of(source: ModelSource) -> type[Family]:
    """Return the class that `load_family` would instantiate, without loading any weights. Raises BadInput likewise."""
    kind = kind_of(source.path, source.hub())
    return kind.few_steps if source.turbo else kind


def component_config(source: ModelSource, component: str) -> dict:
    """Return the configuration of a component (its subfolder's name, such as "unet"), without loading any weights.

    What the configuration of a UNet or VAE leaves out has its default. Raises BadInput as `load_family` does.
    """
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.get(component)
    defaults = {} if kind is None else _defaults(kind)
    # a VAE in a single file has the configuration of the one that it replaces
    if component == "vae" and source.vae_path is not None and not source.vae_path.endswith(".safetensors"):
        return defaults | _config_of_vae(source)
    path, hub = source.path, source.hub()
    refuse_pickle(path)
    advice = "name a whole diffusers pipeline"
    if path.endswith(".safetensors"):
        advice = _OTHER_CONFIG
        path, hub["revision"] = config_source(path, source.single_file_config), None
    else:
        kind_of_folder(path, hub)
    with bad_input(f"the {component} configuration of {path} cannot be read", advice):
        return defaults | UNet2DConditionModel.load_config(path, subfolder=component, **hub)


def _config_of_vae(source: ModelSource) -> dict:
    """Return the configuration of `source.vae_path`, a hub id or folder of a pipeline or of a VAE alone."""
    path, hub = source.vae_path, {"cache_dir": source.cache_dir, "token": source.token}
    with bad_input(f"{path} cannot be loaded as a VAE", _PICKLED):
        if exists(Path(path)):
            path = Path(path, "vae") if Path(path, "vae").is_dir() else Path(path)
        else:
            path = Path(snapshot_download(path, allow_patterns=["vae/config.json", "config.json"], **hub))
            path = path / "vae" if (path / "vae" / "config.json").is_file() else path
        return AutoencoderKL.load_config(path)


def prediction_type_of(source: ModelSource) -> str:
    """Return what the UNet predicts ("epsilon" or another), without loading any weights. Raises BadInput likewise."""
    if source.prediction_type is not None:
        return source.prediction_type
    marks, scheduler = _marks_and_scheduler(source)
    return marks.prediction_type or marks_of_scheduler(scheduler).prediction_type


def timesteps_of(source: ModelSource) -> tuple[torch.Tensor, NoiseSchedule] | None:
    """Return the `timesteps` (int64 [n]) and the `schedule` of the family that `load_family` would load, without any
    weights; None if the scheduler's config cannot be read, which loading will report. Raises BadInput likewise."""
    marks, scheduler = _marks_and_scheduler(source)
    if not scheduler:
        return None
    flags = source.prediction_type, source.zero_terminal_snr
    prediction_type, zero_terminal_snr = reconcile(source.path, marks, marks_of_scheduler(scheduler), *flags)
    schedule = noise_schedule(
        scheduler, zero_terminal_snr=zero_terminal_snr, turbo=source.turbo, prediction_type=prediction_type
    )
    grid = turbo_grid(schedule.num_train_timesteps) if family_of(source).timestep_grid else None
    return usable_timesteps(schedule, grid), schedule


def _marks_and_scheduler(source: ModelSource) -> tuple[Marks, dict]:
    """Return the marks of a single file (none for others), and the scheduler's config, {} if it cannot be read."""
    path, hub, marks = source.path, source.hub(), Marks()
    if path.endswith(".safetensors"):
        marks = marks_of_file(path, *header(path), source.prediction_type)
        path, hub["revision"] = config_source(path, source.single_file_config), None
    return marks, check_scheduler(path, hub)


def _defaults(kind: type) -> dict[str, object]:
    """Return the default settings of one of diffusers' models."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def config_source(path: str, single_file_config: str | Path | None) -> str:
    """Return the hub id or folder that provides the configuration for a single file.

    Raises BadInput for SD 2.x if none is given: epsilon (2-base) and v-prediction (768-v) have the same tensors.
    """
    if single_file_config is not None:
        return str(single_file_config)
    kind = kind_of_file(path)
    if is_sd2(header(path)[0]):
        raise BadInput(
            f"{path} is a Stable Diffusion 2.x model, whose file does not say its prediction type and size: name the"
            " folder or hub id of its diffusers pipeline as single_file_config"
        )
    return kind.usual_config


def _config_folder(path: str, hub: dict) -> str:
    """Return a local folder with the configuration of the pipeline at `path`, fetched if `path` is a hub id.

    Raises BadInput if it cannot be found or fetched, or if its files name code.
    """
    hub = {**hub, "revision": None}
    kind_of_folder(path, hub)
    if not Path(path).is_dir():
        with bad_input(f"the configuration of {path} cannot be fetched", "name a downloaded folder"):
            path = snapshot_download(path, allow_patterns=["*.json", "*.txt"], **hub)
        check_pipeline(Path(path))
    return path


def _check_sd2(path: str, scheduler: dict) -> None:
    """Raise BadInput if the weights of an SD 2.x file contradict the scheduler config that it is read with.

    Finetuning to v-prediction at 768 pixels spread the biases of the last norms further than in 2-base, to a standard
    deviation of 0.09 and more. ComfyUI tells the two apart in the same way.
    """
    names, name = header(path)[0], "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if not is_sd2(names) or name not in names or not scheduler:
        return
    with bad_input(f"{path} cannot be loaded", "copy it again"), safe_open(path, framework="pt") as file:
        looks = "v_prediction" if file.get_tensor(name).float().std(correction=0) > 0.09 else "epsilon"
    says = scheduler.get("prediction_type", "epsilon")
    if looks != says:
        raise BadInput(
            f"{path} looks as if it was trained with {looks}, but the scheduler of its configuration says {says}: say"
            " which with --prediction_type"
        )


def _load_folder(
    path: str,
    kind: type[Family],
    dtype: torch.dtype,
    unet_dtype: torch.dtype,
    variant: str | None,
    hub: dict,
    own_vae: bool,  # whether the folder's own VAE will be used
) -> DiffusionPipeline:
    with bad_input(f"{path} cannot be loaded", _advice(Path(path), variant)):
        regular_files(Path(path))
        if not Path(path).is_dir():  # outside no_loading_bars: downloads show their progress
            path = kind.pipeline_class.download(path, variant=variant, use_safetensors=True, **hub)
        check_pipeline(Path(path), weights=True)
        if own_vae:
            _check_vae(AutoencoderKL.load_config(path, subfolder="vae"))
        dtypes = {"unet": unet_dtype, "vae": torch.float32, "default": dtype}
        with no_loading_bars():
            pipeline = kind.pipeline_class.from_pretrained(
                path, variant=variant, use_safetensors=True, **{_DTYPE: dtypes}, **kind.unused_parts
            )
        for part in kind.text_encoders:
            _check_names(Path(path, part), getattr(pipeline, part, None))
        return pipeline


def _check_names(folder: Path, text_encoder: nn.Module | None) -> None:
    """Raise BadInput if the text encoder was saved by transformers 5.6 or newer but loaded by an older version.

    The older version knows none of the tensor names and silently leaves the weights random.
    """
    prefix, names = "text_model.", []
    if not hasattr(text_encoder, "text_model"):
        return
    for file in folder.glob("*.safetensors"):
        names += header(str(file))[0]
    if not any(name.startswith(prefix) for name in names):
        raise BadInput(
            f"{folder} was saved by transformers 5.6 or newer, and {transformers.__version__} does not know its tensors"
            ": pip install --upgrade transformers"
        )


def _advice(folder: Path, variant: str | None) -> str:
    """Return what to do about a folder that cannot be loaded."""
    there = _variants(folder)
    if variant is None and there:
        return f"if its weights are of a variant only, add --variant {' or '.join(there)}; {_PICKLED}"
    if variant is not None and folder.is_dir() and variant not in there:
        return f"it holds {' and '.join(there) or 'no variants'}, not {variant}: leave --variant out; {_PICKLED}"
    return _PICKLED


def _variants(folder: Path) -> list[str]:
    """Return the variants (such as fp16 for model.fp16.safetensors) of the weights in a folder and its subfolders."""
    names = (file.name for file in (*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")))
    return sorted({match[1] for name in names if (match := _OF_VARIANT.search(name))})


def _check_complete(path: str, pipeline: DiffusionPipeline) -> None:
    """Raise BadInput if a library left weights on the meta device because it did not find their values."""
    for name, module in pipeline.components.items():
        named = (*module.named_parameters(), *module.named_buffers()) if isinstance(module, nn.Module) else ()
        missing = [tensor_name for tensor_name, tensor in named if tensor.is_meta]
        if missing:
            raise BadInput(
                f"{path} lacks {len(missing)} of the tensors of the {name}, first {missing[0]}: copy it again, or name"
                " a diffusers folder"
            )


def _absent_parts(
    path: str,
    kind: type[Family],
    dtype: torch.dtype,
    named: str | None,  # single_file_config
    other_vae: bool,  # whether another VAE is named, which will replace this one
    where: dict,
) -> dict[str, nn.Module]:
    """Return what a single file lacks (component name -> module), from the pipeline that its configuration is of.

    Raises BadInput if it cannot be read.
    """
    absent, parts, subfolders = absent_parts(path), {}, {}
    if "text encoders" in absent:
        subfolders |= {
            name: CLIPTextModelWithProjection if "2" in name else CLIPTextModel for name in kind.text_encoders
        }
    if "vae" in absent and not other_vae:
        subfolders["vae"] = AutoencoderKL
    if subfolders:
        with bad_input(f"{named} cannot supply what {path} lacks", "name a whole pipeline"), no_loading_bars():
            folder = Path(named)
            if not folder.is_dir():
                hub = {"cache_dir": where["cache_dir"], "token": where["token"]}
                files = [f"{name}/*.{end}" for name in subfolders for end in ("json", "safetensors")]
                folder = Path(snapshot_download(named, allow_patterns=files, **hub))
            for name, model in subfolders.items():
                check_part(folder / name, name)
                check_weights(folder / name)
                width = {_DTYPE: torch.float32} if name == "vae" else {"dtype": dtype}
                parts[name] = model.from_pretrained(folder / name, use_safetensors=True, **width)
    if "vae" in absent and other_vae:  # replaced later; its configuration is needed
        config = AutoencoderKL.load_config(config_source(path, where["config"]), subfolder="vae")
        parts["vae"] = AutoencoderKL.from_config(config)
    return parts


def _load_file(
    path: str,
    kind: type[Family],
    dtype: torch.dtype,
    unet_dtype: torch.dtype,
    others: dict[str, nn.Module],  # components from elsewhere
    where: dict,
) -> DiffusionPipeline:
    with bad_input(f"{path} cannot be loaded", _OTHER_CONFIG), no_loading_bars():
        # from_single_file takes one dtype only, so components with another are loaded separately
        if "vae" not in others:
            vae = AutoencoderKL.from_single_file(path, subfolder="vae", **{_DTYPE: torch.float32}, **where)
            others = {**others, "vae": vae}
        unet = UNet2DConditionModel.from_single_file(path, subfolder="unet", **{_DTYPE: unet_dtype}, **where)
        pipeline = kind.pipeline_class.from_single_file(
            path, unet=unet, **others, **{_DTYPE: dtype}, **kind.unused_parts, **where
        )
        if len(kind.text_encoders) > 1 and _CONVERTERS_PROJECTION in header(path)[0]:
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor(_CONVERTERS_PROJECTION).to(dtype)
            if weight.shape != pipeline.text_encoder_2.text_projection.weight.shape:
                raise ValueError(f"{_CONVERTERS_PROJECTION} is of shape {[*weight.shape]}")
            pipeline.text_encoder_2.text_projection.weight = nn.Parameter(weight)
        return pipeline


def _check_vae(config: dict) -> None:
    """Raise BadInput for a VAE config of another class, from which diffusers would load whatever fits."""
    name = config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise BadInput(
            f"the VAE is of class {name}, whose latents have no posterior mean; name an AutoencoderKL, for example with"
            " pretrained_vae_model_name_or_path"
        )


def _load_vae(path: str, replaced: AutoencoderKL, hub: dict) -> AutoencoderKL:
    """Load the VAE at `path` in fp32; a single file is read with the configuration of the VAE that it replaces."""
    with bad_input(f"{path} cannot be loaded as a VAE", _PICKLED), no_loading_bars():
        regular_files(Path(path))
        if path.endswith(".safetensors"):
            with tempfile.TemporaryDirectory() as config:  # diffusers would guess SD1.5's scaling factor
                replaced.save_config(config)
                return AutoencoderKL.from_single_file(path, config=config, **{_DTYPE: torch.float32})
        if not (exists(Path(path)) and Path(path).is_dir()):
            path = snapshot_download(path, allow_patterns=_FILES_OF_VAE, **hub)
        folder = Path(path, "vae") if Path(path, "vae").is_dir() else Path(path)  # of a pipeline, or a VAE alone
        check_part(folder, "vae")
        check_weights(folder)
        _check_vae(AutoencoderKL.load_config(folder))
        plain = any(not _OF_VARIANT.search(file.name) for file in folder.glob("*.safetensors"))
        variants = [] if plain else _variants(folder)
        return AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            variant=variants[0] if len(variants) == 1 else None,
            **{_DTYPE: torch.float32},
        )
