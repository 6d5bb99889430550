"""Which model to use and how to sample it: the one small value passed to everything that loads or names a model."""

from dataclasses import dataclass, replace
from pathlib import Path

from dpo_fast.config import TrainConfig
from dpo_fast.hub_revisions import public_name


@dataclass(frozen=True)
class ModelSource:
    """A pipeline, what is added to its weights, and how it is usually sampled. Equal sources mean equal models."""

    path: str  # hub id, diffusers folder or .safetensors file
    merged: str | None = None  # a LoRA that is merged into the weights
    adapter: str | None = None  # a folder with a LoRA that is loaded as an adapter
    trained: str | None = None  # a run's checkpoint, whose weights replace those of this base
    strength: float = 1.0  # of what that checkpoint trained (`dpo_fast.models.trained`)
    turbo: bool = False
    mixed_precision: str = "no"  # compute dtype on a GPU; a CPU, where half precision is slow, uses fp32
    steps: int | None = None  # None: the family's usual
    guidance: float | None = None
    resolution: int | None = None  # pixels; None: the model's own
    revision: str | None = None
    variant: str | None = None
    vae_path: str | None = None
    prediction_type: str | None = None
    max_token_length: int = 75  # tokens of a caption that are encoded, in chunks of 75
    zero_terminal_snr: str = "auto"  # of the schedule it was trained with, which the sampler follows
    attention: str = "auto"
    memory_order: str = "auto"
    cache_dir: str | None = None
    token: str | None = None
    single_file_config: str | None = None

    def __str__(self) -> str:
        return " + LoRA ".join(filter(None, (self.path, self.merged, self.adapter))) + self._at(self.trained)

    def shown(self) -> str:
        """Return the same as `str`, without paths on this disk, for anything that others may read."""
        parts = " + LoRA ".join(public_name(part) for part in (self.path, self.merged, self.adapter) if part)
        return parts + self._at(self.trained and public_name(self.trained))

    def _at(self, trained: str | None) -> str:
        return f" + {self.strength:g} of {trained}" if trained else ""

    def weights(self) -> "ModelSource":
        """Return this source without its sampling settings (steps, guidance, resolution)."""
        return replace(self, steps=None, guidance=None, resolution=None)

    def hub(self) -> dict[str, str | None]:
        """Return how to fetch its files, as keyword arguments of huggingface_hub and diffusers."""
        return {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}


def base_of(config: TrainConfig) -> ModelSource:
    """Return the model that a run starts from, with `--init_lora` merged. It is also the run's reference."""
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
        max_token_length=config.max_token_length,
        zero_terminal_snr=config.zero_terminal_snr,
        attention=config.attention,
        memory_order=config.memory_order,
        cache_dir=config.cache_dir,
        token=config.hub_token,
        single_file_config=config.single_file_config,
    )


def result_of(config: TrainConfig, folder: Path) -> ModelSource:
    """Return the model that a run of `config` wrote to `folder`: its LoRA on its base, or a pipeline."""
    base = base_of(config)
    if config.tuning == "lora":
        return replace(base, adapter=str(folder))
    return replace(base, path=str(folder), merged=None, revision=None, variant=None, vae_path=None)
