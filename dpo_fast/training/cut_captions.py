"""The captions of a run that have more tokens than are encoded."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dpo_fast.caching import score_reference
from dpo_fast.config import TOKEN_LENGTHS, TrainConfig
from dpo_fast.data import PairIndex
from dpo_fast.training.batches import RunPairs, needed_rows_of_stream


class CutCaptions(NamedTuple):
    """How many captions are cut off, of how many, and where."""

    cut: int
    captions: int  # one a pair
    limit: int  # tokens that are encoded
    example: int | None  # the first row whose caption is cut off

    @property
    def what(self) -> str:
        """What is said of them, after their number."""
        said = f"longer than {self.limit} tokens and are cut off there, for example that of row {self.example}"
        most = TOKEN_LENGTHS[-1]
        longer = TOKEN_LENGTHS[0] <= self.limit < most
        return said + longer * f" (--max_token_length encodes up to {most})"


def cut_captions(
    config: TrainConfig, pairs: RunPairs, cut_off: Callable[[Sequence[str]], tuple[list[bool], int]]
) -> CutCaptions | None:
    """Count the pairs whose captions are cut off; None for a stream whose rows are not known.

    cut_off: tells which captions are, and how many tokens are encoded, as `Family.cut_off` does.
    """
    if pairs.sets is not None:
        rows = [(i, c) for index in (pairs.sets.train, pairs.sets.validation) for i, c in _captions_of(index)]
    elif pairs.manifest is not None:
        needed = needed_rows_of_stream(config)
        picked, pair_of = score_reference.pairs_of_stream(config.soft_labels, pairs.manifest, needed)
        rows = [(row, pair_of(row).caption) for row in picked]
    else:
        return None
    captions = list(dict.fromkeys(caption for _, caption in rows))
    cut, limit = cut_off(captions)
    long = {caption for caption, is_cut in zip(captions, cut, strict=True) if is_cut}
    cut_rows = [row for row, caption in rows if caption in long]
    return CutCaptions(len(cut_rows), len(rows), limit, min(cut_rows, default=None))


def _captions_of(index: PairIndex) -> Iterator[tuple[int, str]]:
    return zip(index.pair_id.tolist(), index.captions, strict=True)
