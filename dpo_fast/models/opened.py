"""Models to sample from: fill in their usual settings, and hold one at a time in memory."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from dpo_fast.models.attention import usable_attention
from dpo_fast.models.family import COMPUTE_DTYPES, Family, check_resolution
from dpo_fast.models.load import align_weights, component_config, family_of, load_family
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.lora import WEIGHT_NAME, check_adapter, check_loaded
from dpo_fast.models.merging import merge_lora
from dpo_fast.models.source import ModelSource
from dpo_fast.models.text_chunks import check_chunks
from dpo_fast.models.trained import Blend, Trained, files_of, read_trained
from dpo_fast.models.untrusted import read_index


def settled(source: ModelSource) -> ModelSource:
    """Return `source` with steps, guidance and resolution filled in, from the model's configuration alone.

    Raises BadInput for a model that does not exist, and for a resolution or a length of captions that it does not
    support.
    """
    family = family_of(source)
    sides = family.sides(*(component_config(source, part) for part in ("unet", "vae")))
    encoders = (component_config(source, part) for part in family.text_encoders)
    check_chunks(source.max_token_length, encoders, source.path)
    resolution = source.resolution or sides.default_resolution
    check_resolution(resolution, sides.resolution_multiple, source.path)
    return replace(
        source,
        steps=family.sampling_steps if source.steps is None else source.steps,
        guidance=family.sampling_guidance if source.guidance is None else source.guidance,
        resolution=resolution,
    )


class OneAtATime:
    """Loads models one after another and holds the last.

    An adapter on the held model is added without a reload. Nor do other strengths and checkpoints need one, if they are
    of the same base, with the same kind of adapters.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: tuple[ModelSource, Family] | None = None
        self._blend: Blend | None = None  # what the held model is changed with, if it is of a checkpoint
        self._trained: tuple[str, Trained] | None = None  # the last checkpoint read

    def open(self, source: ModelSource) -> Family:
        """Return the family of `source`, ready to sample from. Drop all references to it before opening another."""
        if self._held is not None and self._held[0] == source:
            return self._held[1]
        bare = replace(source, adapter=None, trained=None, strength=1.0)
        if source.trained is not None:
            return self._blended(source, bare)
        self._hold(bare)
        family = self._held[1]
        if source.adapter is not None:
            check_adapter(Path(source.adapter) / WEIGHT_NAME)
            with bad_input(f"{source.adapter} cannot be loaded", "name the folder of a run on this base"):
                family.pipeline.load_lora_weights(source.adapter, weight_name=WEIGHT_NAME, use_safetensors=True)
            check_loaded(family.unet, Path(source.adapter) / WEIGHT_NAME)
            align_weights(family.pipeline)
            self._held = source, family
        return family

    def _hold(self, bare: ModelSource) -> None:
        if self._held is None or self._held[0] != bare:
            self._held = self._blend = None  # free its memory before the next one is loaded
            self._held = bare, self._load(bare)

    def _blended(self, source: ModelSource, bare: ModelSource) -> Family:
        if self._trained is None or self._trained[0] != source.trained:
            self._trained = source.trained, read_trained(Path(source.trained))
        trained = self._trained[1]
        held = None if self._held is None else replace(self._held[0], trained=None, strength=1.0)
        if self._blend is None or held != bare or self._blend.adapters != trained.adapters:
            self._hold(bare)
            self._blend = Blend(self._held[1], trained)
            align_weights(self._held[1].pipeline)
        self._blend.set(trained, source.strength)
        self._held = source, self._blend.family
        return self._blend.family

    def _load(self, source: ModelSource) -> Family:
        if source.attention != "auto" and (self.device.type != "cuda" or usable_attention()[source.attention]):
            source = replace(source, attention="auto")  # trained on another machine; only rounding differs
        family = load_family(source, dtype=compute_dtype(source, self.device), device=self.device)
        if source.merged:
            merge_lora(family.pipeline, source.merged, cache_dir=source.cache_dir, token=source.token)
        return family


def files_stamp(source: ModelSource) -> str:
    """Return a digest of the sizes and modification times of a model's local files, and of its hub ids."""
    found: list[object] = []
    for place in filter(None, (source.path, source.vae_path, source.merged, source.adapter)):
        path = Path(place)
        index = path / "model_index.json"
        if index.is_file():
            parts = [path / name for name in read_index(path, index)]
            files = [index, *(file for part in parts if part.is_dir() for file in sorted(part.iterdir()))]
        elif path.is_dir():
            files = sorted(path.glob("*.safetensors"))  # a LoRA, a VAE
        else:
            files = [path] if path.is_file() else []
        stats = [(file.name, file.stat()) for file in files]
        found.append([place, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    if source.trained is not None:
        stats = [(file.name, file.stat()) for file in files_of(Path(source.trained))]
        found.append([source.trained, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=8).hexdigest()


def compute_dtype(source: ModelSource, device: torch.device) -> torch.dtype:
    """Return the dtype to sample a model in: its compute dtype on a GPU, fp32 on a CPU."""
    return torch.float32 if device.type == "cpu" else COMPUTE_DTYPES[source.mixed_precision]
