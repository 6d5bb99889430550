"""Check what a model's files name before a library loads anything, so that a model's files run no code.

The JSON files of a model name classes, modules, kernels and further files, and diffusers and transformers follow them.
How far depends on the version: diffusers 0.39 imports any importable module that model_index.json names, newer versions
only those they know, and both run a .py file from the model's own folder when asked to trust it. We do not rely on
them: a pipeline must have parts of known classes, its folders must hold no Python, and its files must not name a
module, a kernel, a quantization method or a file in another folder. Weights must be safetensors; the loaders refuse
pickles.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import diffusers
from diffusers import SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin

from dpo_fast.errors import BadInput
from dpo_fast.files import read_json, regular_files
from dpo_fast.models.load_errors import bad_input

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last: old safety checkers, which are not loaded
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# Part of a pipeline -> its library and the allowed classes; for schedulers and VAEs see `_allowed`.
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ()),
    "scheduler": ("diffusers", ()),
    "text_encoder": ("transformers", _TEXT_ENCODERS),
    "text_encoder_2": ("transformers", _TEXT_ENCODERS),
    "tokenizer": ("transformers", CLIP_TOKENIZERS[:2]),
    "tokenizer_2": ("transformers", CLIP_TOKENIZERS[:2]),
}
WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_BASES = {"vae": ModelMixin, "scheduler": SchedulerMixin}
_CLIP = ("clip", "clip_text_model")  # model_type of the text encoders
_VOCABULARIES = ("vocab.json", "tokenizer.json", "added_tokens.json")  # their keys are tokens, which may be any text
# Settings with which a configuration can name code or files -> the values that are allowed if they are present.
_SETTINGS: dict[str, tuple[object, ...]] = {
    "auto_map": (),
    "custom_pipeline": (),
    "custom_pipelines": (),
    "quantization_config": (),
    "transformers_weights": (),
    "fast_tokenizer_files": (),
    "trust_remote_code": (False,),
    **dict.fromkeys(
        (
            f"{before}{name}{after}"
            for name in ("attn_implementation", "experts_implementation", "attention_backend")
            for before in ("", "_")
            for after in ("", "_internal")
        ),
        ("eager", "sdpa"),  # "owner/name", and flash_attention_N if no package has it, are fetched from the hub
    ),
}
_DEEPEST = 20  # nesting levels of a configuration
_LONGEST = 16 << 20  # bytes of a configuration


def read_index(path: str | Path, index: Path) -> dict[str, object]:
    """Read `index`, the model_index.json of the pipeline at `path`.

    Raises BadInput if it is not an index, if it names code, and if a part's class is not allowed.
    """
    try:
        content = _object(index)
        name = content["_class_name"]
    except (ValueError, KeyError) as error:
        raise BadInput(f"{path}: {INDEX} names no pipeline class; load and save the pipeline again") from error
    if not isinstance(name, str):
        raise BadInput(f"{path}: {INDEX} names the class {name!r}, which is code of its own: {_ADVICE}")
    check_settings(index, content)
    for part, value in content.items():
        if part.startswith("_"):
            continue
        if not part.isidentifier():
            raise BadInput(f"{path}: {INDEX} has the part {part!r}, which is no name: {_ADVICE}")
        if part in _PARTS or isinstance(value, list):
            _check_part(path, part, value)
    return content


def check_pipeline(folder: Path, *, weights: bool = False) -> None:
    """Raise BadInput if a file in a pipeline's folder names code, or a file outside its own part.

    weights: also if a part that needs weights has none as safetensors.
    """
    folder = Path(folder)
    index = read_index(folder, folder / INDEX)
    _refuse_python(folder, "none.py")  # where diffusers looks for the code of a pipeline that names none
    for part in _PARTS.keys() & index.keys():
        if (folder / part).is_dir() and index[part] != [None, None]:
            check_part(folder / part, part)
            if weights and part in WITH_WEIGHTS:
                check_weights(folder / part)


def check_part(folder: Path, part: str = "") -> None:
    """Raise BadInput if a file in the folder of one part (a VAE, a CLIP model, a tokenizer) names code, or a file
    outside it.

    part: its name in the pipeline's index; "" if it belongs to no pipeline.
    """
    folder = Path(folder)
    regular_files(folder)
    _refuse_python(folder)
    if (folder / "adapter_config.json").exists():  # transformers would follow it to another model, and peft to a module
        raise BadInput(f"{folder} holds an adapter (adapter_config.json): delete it, or merge it into the weights")
    for file in sorted(folder.glob("*.json")):
        if file.name in _VOCABULARIES:
            continue
        with bad_input(f"{file} cannot be read", "take the published files"):
            content = _object(file)
        if file.name.endswith(".index.json"):
            _check_shards(file, content)
            continue
        check_settings(file, content)
        said = content.get("_class_name")
        if part and said is not None and not (isinstance(said, str) and _allowed(part, "diffusers", said)):
            raise BadInput(f"{file} names the class {said!r:.80}, which is not loaded as {part}: {_ADVICE}")
        if part.startswith("text_encoder") and content.get("model_type", _CLIP[0]) not in _CLIP:
            raise BadInput(f"{file} is of the kind {content['model_type']!r}, not {' or '.join(_CLIP)}: {_ADVICE}")
        if file.name == "tokenizer_config.json" and part.startswith("tokenizer"):
            check_tokenizer_class(file, content, CLIP_TOKENIZERS)


def check_weights(folder: Path) -> None:
    """Raise BadInput if a part's folder holds no safetensors."""
    if not any(Path(folder).glob("*.safetensors")):
        raise BadInput(
            f"{folder} cannot be loaded: it holds no .safetensors, and pickled weights are not loaded; convert them"
            " with save_pretrained(folder)"
        )


def check_tokenizer_class(file: Path, content: Mapping[str, object], classes: tuple[str, ...]) -> None:
    """Raise BadInput if `content`, of a tokenizer_config.json, names a class that is not one of `classes`."""
    kind = content.get("tokenizer_class")
    if kind is not None and kind not in classes:
        raise BadInput(f"{file} names the class {kind!r}, not {' or '.join(classes)}: {_ADVICE}")


def check_settings(file: Path | str, content: object) -> None:
    """Raise BadInput for a configuration that names code, kernels or files; `file` is its name in the message."""
    for name, value in _flat(file, content):
        if name not in _SETTINGS or value is None or value in _SETTINGS[name]:
            continue
        if isinstance(value, dict) and all(one is None or one in _SETTINGS[name] for one in value.values()) and value:
            continue  # one value per part of a model
        shown = json.dumps(value)
        raise BadInput(
            f"{file} has the setting {name} ({shown[:80]}{'...' * (len(shown) > 80)}), with which a library would load"
            " code or files that the model names: remove it, or take the published files"
        )


_ADVICE = "save the pipeline again with the published classes of diffusers and transformers"


def _check_part(path: str | Path, part: str, value: object) -> None:
    """Raise BadInput unless `value`, [library, class] or [None, None], is allowed for this part."""
    if not (isinstance(value, list) and len(value) == 2):
        raise BadInput(f"{path}: {INDEX} has {value!r:.80} for {part}, not [library, class]: {_ADVICE}")
    library, name = value
    if library is None and name is None:
        return
    if not (isinstance(library, str) and isinstance(name, str) and _allowed(part, library, name)):
        raise BadInput(
            f"{path}: {INDEX} names {library}.{name} for {part}, which is not a class that is loaded here (it may be"
            f" code of the model's own): {_ADVICE}"
        )


def _allowed(part: str, library: str, name: str) -> bool:
    if part not in _PARTS:  # not loaded
        return library in LIBRARIES and name.isidentifier()
    wanted, classes = _PARTS[part]
    if library != wanted or not name.isidentifier():
        return False
    if part not in _BASES:
        return name in classes
    kind = getattr(diffusers, name, None)
    return isinstance(kind, type) and issubclass(kind, _BASES[part]) and kind.__module__.startswith("diffusers.")


def _check_shards(file: Path, content: Mapping[str, object]) -> None:
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise BadInput(f"{file} has no weight_map: load and save the model again")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard or "\\" in shard:
            raise BadInput(f"{file} names the file {shard!r:.80}, not a .safetensors file beside it: save it again")


def _refuse_python(folder: Path, name: str | None = None) -> None:
    """Raise BadInput if `folder` holds Python code or, with `name` (lower case), a file of that name in any case."""
    for file in sorted(folder.iterdir()):
        lower = file.name.lower()
        if lower == name or (name is None and lower.endswith((".py", ".pyc", ".so", ".pyd"))):
            raise BadInput(f"{file} is code, which is not run: delete it if the model does without, else take another")


def _flat(file: Path | str, content: object, depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield every setting of a configuration, at any depth. Raises BadInput for one that is nested too deeply."""
    if depth > _DEEPEST:
        raise BadInput(f"{file} is nested more than {_DEEPEST} levels deep: take the published files")
    if isinstance(content, dict):
        yield from content.items()
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _flat(file, inner, depth + 1)


def _object(file: Path) -> dict[str, object]:
    """Return the JSON object in a file. Raises ValueError for anything else, and for files too long to be settings."""
    size = file.stat().st_size
    if size > _LONGEST:
        raise ValueError(f"{size} bytes are more than the {_LONGEST} of settings")
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not an object")
    return content
