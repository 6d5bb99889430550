"""The pairs of a run and the order in which they are trained on: from the data set to this rank's micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_fast.caching.build import Cached, manifest_of
from dpo_fast.caching.manifest import Manifest, RememberedSource
from dpo_fast.caching.needed import NeededRows, is_fully_known
from dpo_fast.caching.reader import CachedTransform
from dpo_fast.caching.score_reference import AllReferenceErrors, ReferenceErrors
from dpo_fast.caching.settings import CacheSettings
from dpo_fast.config import TrainConfig
from dpo_fast.data import (
    Batch,
    PairDataset,
    PairIndex,
    PairSets,
    PairTransform,
    Source,
    StreamedPairs,
    StreamedSource,
    TrainStream,
    build_index,
    make_loader,
    open_source,
)
from dpo_fast.data.batch import load_images, load_keys
from dpo_fast.data.images import SAME
from dpo_fast.data.pairs_source import PairsSource, is_local
from dpo_fast.data.stream import WINDOW
from dpo_fast.models import Family
from dpo_fast.parallel import Ranks

SAMPLE_PROMPTS = 4


@dataclass
class RunPairs:
    """The opened pairs of a run."""

    source: Source | StreamedSource | None  # None: a stream whose rows the cache already knows
    sets: PairSets | None  # None when streaming
    manifest: Manifest | None  # None: without the cache

    @property
    def identity(self) -> str:
        """The identity of the training pairs and their order, used as a fingerprint in checkpoints."""
        identity, sets = (self.source or self.manifest.stream()).identity.rows, self.sets
        if sets is not None:  # the training order depends on which rows are left out
            same = sum(bad.reason.endswith(SAME) for bad in sets.bad)
            left_out = {"unlabelled": sets.unlabelled, "contradicted": sets.contradicted, "same_image": same}
            identity += "".join(f" {name}={count}" for name, count in left_out.items() if count)
        return identity


def steps_of(config: TrainConfig, pairs: RunPairs) -> int:
    """Return the optimizer steps of a run; without max_train_steps, those of its epochs, at least one."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    return max(1, len(pairs.sets.train) * config.num_train_epochs // config.pairs_per_step)


def open_pairs(config: TrainConfig, ranks: Ranks, report_path: Path | None) -> RunPairs:
    """Open the pairs and sort their rows into sets; images that the cache already knows are not read again."""
    root, asked = CacheSettings.of(config).root, pairs_source(config)
    if config.cache and config.streaming and not is_local(config.dataset_name):
        manifest = manifest_of(root, asked, "")
        if is_fully_known(config.soft_labels, manifest, needed_rows_of_stream(config)):
            return RunPairs(None, None, manifest)
    source = source_of(config)
    manifest = manifest_of(root, asked, source.identity.stamp) if config.cache else None
    if config.streaming:
        return RunPairs(source, None, manifest)
    if manifest is not None:
        source = RememberedSource(source, manifest)
    sets = build_index(
        source,
        seed=config.seed,
        soft_labels=config.soft_labels,
        max_bad_fraction=config.max_bad_fraction,
        validation_fraction=config.validation_fraction,
        report_path=report_path if ranks.is_main else None,
        progress=ranks.is_main,
    )
    return RunPairs(source, sets, manifest)


def source_of(config: TrainConfig) -> Source | StreamedSource:
    """Open the source of the pairs that a run trains on."""
    return open_source(pairs_source(config))


def pairs_source(config: TrainConfig) -> PairsSource:
    """Which pairs a run trains on."""
    return PairsSource.of(config, max_rows=config.max_train_samples, streaming=config.streaming)


def needed_rows(config: TrainConfig, pairs: RunPairs) -> NeededRows:
    """Return the pairs that a run trains on and those it holds out."""
    if pairs.sets is None:
        return needed_rows_of_stream(config)
    trained = train_stream(config, pairs.sets.train).visited(config.max_train_steps)
    return NeededRows(rows=sorted([*trained.tolist(), *pairs.sets.validation.pair_id.tolist()]))


def needed_rows_of_stream(config: TrainConfig) -> NeededRows:
    """Return how many pairs a stream must provide: those visited, rounded up to full shuffle windows."""
    windows = -(-config.max_train_steps * config.pairs_per_step // WINDOW)
    return NeededRows(pairs=windows * WINDOW)


def transform_of(config: TrainConfig, family: Family) -> PairTransform:
    """The transform that turns a training pair into tensors."""
    return PairTransform(
        resolution=config.resolution,
        seed=config.seed,
        timesteps=family.timesteps,
        grid=family.timestep_grid,
        hflip=config.hflip,
        random_crop=config.random_crop,
        caption_dropout=config.proportion_empty_prompts,
        time_ids=config.time_ids,
    )


def held_out_transform(transform: PairTransform) -> PairTransform:
    """The transform for held-out pairs, in which only the noise is random."""
    return replace(transform, hflip=False, random_crop=False, caption_dropout=0.0)


def most_visits(config: TrainConfig, pairs: int, steps: int) -> int:
    """Return the maximum number of times that one of `pairs` pairs is visited in `steps` optimizer steps."""
    return -(-steps * config.pairs_per_step // pairs)


def open_batches(
    config: TrainConfig,
    ranks: Ranks,
    pairs: RunPairs,
    cached: Cached | None,
    scored: AllReferenceErrors | None,
    family: Family,
    step: int,
) -> tuple[Iterator[Batch], PairSets | StreamedPairs, PairDataset | None, list[str]]:
    """Open the training batches from `step` on; also return the counts, held-out pairs and sample prompts."""
    transform = transform_of(config, family)
    source, sets = pairs.source, pairs.sets
    work = dict(num_workers=config.dataloader_num_workers, pin_memory=ranks.device.type == "cuda")
    images = load_keys if cached else load_images

    def of(transform: PairTransform, scored: ReferenceErrors | None) -> PairTransform | CachedTransform:
        errors = scored.errors if scored else None
        return CachedTransform(transform, cached.latents, cached.text, errors) if cached else transform

    in_training = of(transform, scored and scored.train)
    validation, captions = None, []
    if sets is None:
        sets = StreamedPairs(
            source,
            in_training,
            soft_labels=config.soft_labels,
            max_bad_fraction=config.max_bad_fraction,
            progress=ranks.is_main,
            **split_of(config, ranks),
        )
        if cached:
            work["num_workers"] = max(1, work["num_workers"])
        batches = sets.batches(step, config.max_train_steps, **work)
    else:
        stream = train_stream(config, sets.train, ranks)
        batches = make_loader(
            PairDataset(source, sets.train, in_training, images), stream, step, config.max_train_steps, **work
        )
        if len(sets.validation):
            steady = of(held_out_transform(transform), scored and scored.validation)
            validation = PairDataset(source, sets.validation, steady, images)
        captions = sets.validation.captions or sets.train.captions
    prompts = list(config.validation_prompts) or list(dict.fromkeys(captions))[:SAMPLE_PROMPTS]
    return batches, sets, validation, prompts


def train_stream(config: TrainConfig, train: PairIndex, ranks: Ranks | None = None) -> TrainStream:
    """The training order of this rank, or without `ranks` that of all ranks combined."""
    split = split_of(config, ranks) if ranks else dict(pairs_per_step=config.pairs_per_step, batch_size=1)
    return TrainStream(seed=config.seed, pair_ids=train.pair_id, **split)


def split_of(config: TrainConfig, ranks: Ranks) -> dict[str, int]:
    """Return the keyword arguments of a stream that split a step's pairs into micro-batches and over ranks."""
    return dict(
        pairs_per_step=config.pairs_per_step,
        batch_size=config.train_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
