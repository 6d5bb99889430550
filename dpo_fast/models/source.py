"""Which model, and how it is sampled: one small value that whatever loads a model is given."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.hub_revisions import public_name
from dpo_fast.models import COMPUTE_DTYPES, Family, load, load_family, merge_lora
from dpo_fast.models.load import align_weights, component_config, family_of
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.lora import WEIGHT_NAME, check_adapter, check_loaded
from dpo_fast.models.untrusted import read_index


@dataclass(frozen=True)
class ModelSource:
    """A pipeline, what is added to its weights, and how it is usually sampled. Equal sources are equal models."""

    path: str  # hub id, diffusers folder or .safetensors file
    merged: str | None = None  # a LoRA that is part of the weights
    adapter: str | None = None  # a folder with a LoRA that is put on
    turbo: bool = False
    mixed_precision: str = "no"  # compute dtype on a GPU; on a CPU, where half is slow, it is fp32
    steps: int | None = None  # None: the family's usual
    guidance: float | None = None
    resolution: int | None = None  # pixels; None: the model's own
    revision: str | None = None
    variant: str | None = None
    vae_path: str | None = None
    prediction_type: str | None = None
    zero_terminal_snr: str = "auto"  # of the schedule it was trained with, which the sampler follows
    attention: str = "auto"
    cache_dir: str | None = None
    token: str | None = None
    single_file_config: str | None = None

    def __str__(self) -> str:
        return " + LoRA ".join(filter(None, (self.path, self.merged, self.adapter)))

    def shown(self) -> str:
        """As `str`, without the places on this disk: for what others may read."""
        return " + LoRA ".join(public_name(part) for part in (self.path, self.merged, self.adapter) if part)

    def weights(self) -> "ModelSource":
        """The same without how it is usually sampled."""
        return replace(self, steps=None, guidance=None, resolution=None)

    def family(self) -> type[Family]:
        """Its family, from the model's index alone. Raises BadInput for a model that is not there."""
        hub = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
        return family_of(self.path, turbo=self.turbo, **hub)

    def settled(self) -> "ModelSource":
        """The same with steps, guidance and resolution filled in, from the model's configuration alone.

        Raises BadInput for a model that is not there and for a resolution that it cannot have.
        """
        family = self.family()
        hub = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
        where = {**hub, "single_file_config": self.single_file_config}
        unet, vae = (component_config(self.path, name, **where) for name in ("unet", "vae"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        resolution = self.resolution or unet["sample_size"] * factor
        if resolution % multiple:
            near = max(1, round(resolution / multiple)) * multiple
            raise BadInput(
                f"--resolution ({resolution}) must be a multiple of {multiple} for {self.path}, for example {near}"
            )
        return replace(
            self,
            steps=family.sampling_steps if self.steps is None else self.steps,
            guidance=family.sampling_guidance if self.guidance is None else self.guidance,
            resolution=resolution,
        )


def base_of(config: TrainConfig) -> ModelSource:
    """What a run started from, `--init_lora` merged: its reference."""
    return ModelSource(
        path=config.pretrained_model_name_or_path,
        merged=config.init_lora,
        turbo=config.is_turbo,
        mixed_precision=config.mixed_precision,
        steps=config.sampling_steps,
        guidance=config.sampling_guidance,
        resolution=config.resolution,
        revision=config.revision,
        variant=config.variant,
        vae_path=config.pretrained_vae_model_name_or_path,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.zero_terminal_snr,
        attention=config.attention,
        cache_dir=config.cache_dir,
        token=config.hub_token,
        single_file_config=config.single_file_config,
    )


def result_of(config: TrainConfig, folder: Path) -> ModelSource:
    """What a run of `config` wrote to `folder`: its LoRA on its base, or a pipeline."""
    base = base_of(config)
    if config.tuning == "lora":
        return replace(base, adapter=str(folder))
    return replace(base, path=str(folder), merged=None, revision=None, variant=None, vae_path=None)


class OneAtATime:
    """Loads models one after another and holds the last. A LoRA on the one that is held is only put on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: tuple[ModelSource, Family] | None = None

    def open(self, source: ModelSource) -> Family:
        """The family of `source`, as users sample from it. Keep no reference to it when you open another."""
        if self._held is not None and self._held[0] == source:
            return self._held[1]
        bare = replace(source, adapter=None)
        if self._held is None or self._held[0] != bare:
            self._held = None  # its memory is wanted
            self._held = bare, self._load(bare)
        family = self._held[1]
        if source.adapter is not None:
            check_adapter(Path(source.adapter) / WEIGHT_NAME)
            with bad_input(f"{source.adapter} cannot be loaded", "name the folder of a run on this base"):
                family.pipeline.load_lora_weights(source.adapter, weight_name=WEIGHT_NAME, use_safetensors=True)
            check_loaded(family.unet, Path(source.adapter) / WEIGHT_NAME)
            align_weights(family.pipeline)
            self._held = source, family
        return family

    def _load(self, source: ModelSource) -> Family:
        family = load_family(
            source.path,
            turbo=source.turbo,
            dtype=compute_dtype(source, self.device),
            device=self.device,
            revision=source.revision,
            variant=source.variant,
            vae_path=source.vae_path,
            prediction_type=source.prediction_type,
            zero_terminal_snr=source.zero_terminal_snr,
            attention=source.attention,
            cache_dir=source.cache_dir,
            token=source.token,
            single_file_config=source.single_file_config,
        )
        if source.merged:
            merge_lora(family.pipeline, source.merged, cache_dir=source.cache_dir, token=source.token)
        return family


def files_stamp(source: ModelSource) -> str:
    """A digest of the sizes and times of the files that a model is read from; of the hub's, their names."""
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
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=8).hexdigest()


def revisions(source: ModelSource) -> dict[str, str]:
    """Repository, folder or file -> its `revision_of`, of all that a model is read from."""
    others = (source.vae_path, source.merged, source.adapter, source.single_file_config)
    return load.revisions(source.path, *others, revision=source.revision, cache_dir=source.cache_dir)


def compute_dtype(source: ModelSource, device: torch.device) -> torch.dtype:
    """What a model is sampled in: its compute dtype on a GPU, fp32 on a CPU."""
    return torch.float32 if device.type == "cpu" else COMPUTE_DTYPES[source.mixed_precision]
