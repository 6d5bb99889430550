"""Models whose files try to have code run, or files of other places read, when they are loaded.

Every kind changes a good pipeline and carries code that creates the file `marker`; where a library may import it by
name it is the module `hostile_module` of `folder_of_modules`.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

MODULE = "hostile_module"
CLASSES = (
    "UNet2DConditionModel AutoencoderKL CLIPTextModel CLIPTokenizer DDIMScheduler Own Checker ColumnParallelLinear"
).split()
Kind = Callable[[Path, Path], None]  # the model's folder, the marker


def code(marker: Path) -> str:
    """A module that creates the marker and has whatever class is asked of it."""
    lines = [f"open({str(marker)!r}, 'w').close()", "class Own: pass"]
    return "\n".join([*lines, *(f"{name} = Own" for name in CLASSES), "def __getattr__(name): return Own\n"])


def folder_of_modules(folder: Path, marker: Path) -> Path:
    """A folder with the module, to be put on Python's path: `python -m` has the working folder there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{MODULE}.py").write_text(code(marker))
    return folder


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


def names(part: str, library: object, name: object) -> Kind:
    """model_index.json with that class for a part."""
    return lambda model, marker: edit(model / "model_index.json", **{part: [library, name]})


def index(**changes: object) -> Kind:
    return lambda model, marker: edit(model / "model_index.json", **changes)


def python(place: str) -> Kind:
    """A Python file."""
    return lambda model, marker: (model / place).write_text(code(marker)) and None


def says(file: str, **changes: object) -> Kind:
    """A configuration with those settings."""
    return lambda model, marker: edit(model / file, **changes)


def both(*kinds: Kind) -> Kind:
    def apply(model: Path, marker: Path) -> None:
        for kind in kinds:
            kind(model, marker)

    return apply


def pickled(part: str, name: str) -> Kind:
    """A pickle in the place of the part's safetensors."""

    def apply(model: Path, marker: Path) -> None:
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
        (model / part / name).write_bytes(pickle.dumps(Bomb(marker)))

    return apply


def sharded(part: str, stem: str, shard: str) -> Kind:
    """An index of shards that names `shard` for every tensor."""

    def apply(model: Path, marker: Path) -> None:
        weights = model / part / f"{stem}.safetensors"
        (model.parent / "outside.safetensors").write_bytes(weights.read_bytes())
        (model / part / "shard.bin").write_bytes(pickle.dumps(Bomb(marker)))
        weights.unlink()
        edit(model / part / f"{stem}.safetensors.index.json", metadata={}, weight_map={"conv_in.weight": shard})

    return apply


def nested(file: str, name: str, value: object) -> Kind:
    """A setting two levels down."""
    return says(file, text_config={"inner": [{name: value}]})


_LOCAL = {
    part: both(names(part, "own", name), python(f"{part}/own.py"))
    for part, name in (
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("text_encoder", "CLIPTextModel"),
        ("tokenizer", "CLIPTokenizer"),
        ("scheduler", "DDIMScheduler"),
    )
}
_REMOTE = {"AutoModel": "owner/name--modeling.Own", "AutoTokenizer": ["owner/name--tokenization.Own", None]}
_CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_WEIGHTS = "diffusion_pytorch_model"

# What changes a Stable Diffusion pipeline.
PIPELINES: dict[str, Kind] = {
    # modules and classes that model_index.json names
    **{f"own module for {part}": kind for part, kind in _LOCAL.items()},
    **{f"imported module for {part}": names(part, MODULE, "Own") for part in _LOCAL},
    "imported module for safety_checker": names("safety_checker", MODULE, "Checker"),
    "imported module for another part": names("controlnet", MODULE, "Own"),
    "module of the standard library": names("scheduler", "os", "system"),
    "module with dots": names("scheduler", f"{MODULE}.inner", "Own"),
    "own module beside known names, unet": python("unet/diffusers.py"),
    "own module beside known names, text_encoder": python("text_encoder/transformers.py"),
    "compiled module": lambda model, marker: (model / "unet" / "diffusers.so").write_bytes(b"\x7fELF") and None,
    "code for no name": python("None.py"),
    "class of a module": both(index(_class_name=["own", "Own"]), python("own.py")),
    "class of a module, nested": both(index(_class_name={"a": "Own"}), python("own.py")),
    "own class": both(index(_class_name="OwnPipeline"), python("OwnPipeline.py")),
    "custom_pipeline": both(index(custom_pipeline="own"), python("own.py"), python("pipeline.py")),
    "auto_map of the index": index(auto_map=_REMOTE),
    "model of any class": names("unet", "diffusers", "AutoModel"),
    "pipeline as a part": names("unet", "diffusers", "DiffusionPipeline"),
    "model as a scheduler": names("scheduler", "diffusers", "UNet2DConditionModel"),
    "text encoder of any class": names("text_encoder", "transformers", "AutoModel"),
    "text encoder of another class": names("text_encoder", "transformers", "RwkvModel"),
    "function as a text encoder": names("text_encoder", "transformers", "pipeline"),
    "tokenizer of any class": names("tokenizer", "transformers", "AutoTokenizer"),
    "flash-packed class": names("unet", "diffusers", "FlashPackUNet2DConditionModel"),
    "two letters": index(scheduler="os"),
    "three names": index(scheduler=["diffusers", "DDIMScheduler", MODULE]),
    "numbers": index(scheduler=[1, 2]),
    "part above the folder": index(**{"../outside": ["diffusers", "DDIMScheduler"]}),
    "part at the root": index(**{"/outside": ["diffusers", "DDIMScheduler"]}),
    # what the configurations of parts name
    **{f"auto_map of {part}": says(file, auto_map=_REMOTE) for part, file in _CONFIGS.items()},
    "auto_map with its module": both(
        says("text_encoder/config.json", auto_map={"AutoModel": "modeling.Own"}), python("text_encoder/modeling.py")
    ),
    "auto_map with its tokenizer": both(
        says("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Own", None]}),
        python("tokenizer/tokenization.py"),
    ),
    "trust_remote_code": says("text_encoder/config.json", trust_remote_code=True),
    "tokenizer_class": says("tokenizer/tokenizer_config.json", tokenizer_class="OwnTokenizer"),
    "fast_tokenizer_files": says("tokenizer/tokenizer_config.json", fast_tokenizer_files=["../../tokenizer.1.0.json"]),
    "transformers_weights": says("text_encoder/config.json", transformers_weights="../../outside.safetensors"),
    "model_type": says("text_encoder/config.json", model_type="own"),
    **{
        f"_class_name of {part}": says(_CONFIGS[part], _class_name=f"{MODULE}.Own")
        for part in ("unet", "vae", "scheduler")
    },
    "attention kernel": says("text_encoder/config.json", attn_implementation="owner/kernel"),
    "attention kernel, private": says("text_encoder/config.json", _attn_implementation="owner/kernel@main:forward"),
    "attention kernel, internal": says("text_encoder/config.json", _attn_implementation_internal="owner/kernel"),
    "attention kernel, nested": nested("text_encoder/config.json", "attn_implementation", "owner/kernel"),
    "attention kernel, by part": says("text_encoder/config.json", attn_implementation={"": "owner/kernel"}),
    "attention that is fetched": says("text_encoder/config.json", attn_implementation="flash_attention_3"),
    "attention backend": says("unet/config.json", attention_backend="_flash_3_hub"),
    "experts kernel": says("text_encoder/config.json", experts_implementation="owner/kernel"),
    "quantized text encoder": says("text_encoder/config.json", quantization_config={"quant_method": "mxfp4"}),
    "quantized unet": says("unet/config.json", quantization_config={"quant_method": "gguf"}),
    "adapter of the text encoder": says(
        "text_encoder/adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path="../outside",
        auto_mapping={"base_model_class": "Own", "parent_library": MODULE},
    ),
    # weights
    "pickled unet": pickled("unet", f"{_WEIGHTS}.bin"),
    "pickled vae": pickled("vae", f"{_WEIGHTS}.bin"),
    "pickled text encoder": pickled("text_encoder", "pytorch_model.bin"),
    "shard above the folder": sharded("unet", _WEIGHTS, "../../outside.safetensors"),
    "shard at the root": sharded("unet", _WEIGHTS, "/outside.safetensors"),
    "shard with backslashes": sharded("unet", _WEIGHTS, "..\\outside.safetensors"),
    "pickled shard": sharded("unet", _WEIGHTS, "shard.bin"),
    "shard of the text encoder above the folder": sharded("text_encoder", "model", "../../outside.safetensors"),
    "shards without names": says(f"unet/{_WEIGHTS}.safetensors.index.json", weight_map=[1]),
}

# What changes a VAE's folder.
VAES: dict[str, Kind] = {
    "auto_map": says("config.json", auto_map=_REMOTE),
    "own module": python("modeling.py"),
    "quantized": says("config.json", quantization_config={"quant_method": "gguf"}),
    "class": says("config.json", _class_name=f"{MODULE}.Own"),
    "another class": says("config.json", _class_name="AutoencoderTiny"),
    "pickled": pickled(".", f"{_WEIGHTS}.bin"),
    "shard above the folder": sharded(".", _WEIGHTS, "../outside.safetensors"),
    "not an object": lambda model, marker: (model / "config.json").write_text("[]") and None,
    "nested": lambda model, marker: (model / "config.json").write_text("[" * 100_000) and None,
}

# What changes the folder of a scorer's CLIP model with its tokenizer.
CLIPS: dict[str, Kind] = {
    "auto_map": says("config.json", auto_map=_REMOTE),
    "own module": python("modeling.py"),
    "attention kernel": nested("config.json", "attn_implementation", "owner/kernel"),
    "quantized": says("config.json", quantization_config={"quant_method": "mxfp4"}),
    "adapter": says("adapter_config.json", peft_type="LORA", base_model_name_or_path="../outside"),
    "auto_map of the tokenizer": says("tokenizer_config.json", auto_map=_REMOTE),
    "fast_tokenizer_files": says("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.json"]),
    "shard above the folder": sharded(".", "model", "../outside.safetensors"),
}
