"""What caching takes from a run's configuration."""

from dataclasses import dataclass
from pathlib import Path

from dpo_fast.caching.recipe import default_root
from dpo_fast.config import TrainConfig
from dpo_fast.files import user_path


@dataclass(frozen=True)
class CacheSettings:
    """Where latents and embeddings are kept, and how they are made."""

    root: Path  # the cache folder
    resolution: int | None  # pixels per side; None: not known before the model is loaded
    hflip: bool  # also of mirrored images
    soft_labels: bool  # ties are used
    max_bad_fraction: float  # of the rows
    num_workers: int  # threads that read and decode
    vae_batch_size: int  # images per VAE call

    @classmethod
    def of(cls, config: TrainConfig) -> "CacheSettings":
        """The settings of a run."""
        return cls(
            user_path(config.latent_cache_dir) if config.latent_cache_dir else default_root(),
            config.resolution,
            config.hflip,
            config.soft_labels,
            config.max_bad_fraction,
            max(1, config.dataloader_num_workers),
            config.vae_encode_batch_size,
        )


@dataclass(frozen=True)
class ScoringSettings:
    """How the reference's errors are computed."""

    root: Path  # the cache folder
    batch_size: int  # pairs per training micro-batch
    beta: float  # of the margins that are compared
    backend: str  # of the kernels
    mixed_precision: str
    attention: str
    memory_order: str
    allow_tf32: bool

    @classmethod
    def of(cls, config: TrainConfig) -> "ScoringSettings":
        """The settings of a run."""
        return cls(
            CacheSettings.of(config).root,
            config.train_batch_size,
            config.beta_dpo,
            config.backend,
            config.mixed_precision,
            config.attention,
            config.memory_order,
            config.allow_tf32,
        )
