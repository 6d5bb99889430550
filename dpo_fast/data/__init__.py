"""Preference pairs: from a source on disk or on the hub to micro-batches in a reproducible order.

    source = open_source(PairsSource("yuvalkirstain/pickapic_v2"))  # columns found, images not decoded
    pairs = build_index(source, seed=0)                    # ties and bad rows out, a start check, a validation split
    transform = PairTransform(resolution=512, seed=0, timesteps=allowed)
    dataset = PairDataset(source, pairs.train, transform)
    stream = TrainStream(seed=0, pair_ids=pairs.train.pair_id, pairs_per_step=64, batch_size=4, rank=0, world_size=1)
    for batch in make_loader(dataset, stream, first_step=0, last_step=1000, num_workers=4, pin_memory=True): ...

With streaming there is no index: `StreamedPairs(source, transform, ...).batches(first_step, last_step)`.
"""

from dpo_fast.data.batch import Batch, PairDataset, PairTransform, collate
from dpo_fast.data.images import BadImage
from dpo_fast.data.pairs import BadRow, PairIndex, PairSets, build_index, write_report
from dpo_fast.data.pairs_source import NotFetched, PairsSource, not_fetched, open_source
from dpo_fast.data.sources import RowsSource, Source, StreamedSource
from dpo_fast.data.stream import VALIDATION_DRAWS, StreamedPairs, TrainStream, make_loader, validation_loader

__all__ = [
    "VALIDATION_DRAWS",
    "BadImage",
    "BadRow",
    "Batch",
    "NotFetched",
    "PairDataset",
    "PairIndex",
    "PairSets",
    "PairTransform",
    "PairsSource",
    "RowsSource",
    "Source",
    "StreamedPairs",
    "StreamedSource",
    "TrainStream",
    "build_index",
    "collate",
    "make_loader",
    "not_fetched",
    "open_source",
    "validation_loader",
    "write_report",
]
