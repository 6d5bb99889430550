"""The scores that an evaluation rests on, and the table they are kept in: scores.parquet."""

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dpo_fast.errors import BadInput
from dpo_fast.files import atomic_file

COLUMNS = ("pair", "prompt", "category", "seed", "model")  # followed by one for each scorer


@dataclass(frozen=True)
class Scored:
    """Scores of base and policy, one pair per row: one prompt, one seed, an image of each model.

    Raises BadInput for a score that is not finite, which no comparison could count, and for a scorer named like a
    column of the table.
    """

    prompts: list[str]
    seeds: list[int]
    base: dict[str, Tensor]  # scorer -> fp64 [N]; the scorers in the order they are reported in
    policy: dict[str, Tensor]
    categories: list[str] | None = None  # of each row

    def __post_init__(self) -> None:
        size = (len(self.prompts),)
        assert self.base and list(self.base) == list(self.policy) and len(self.seeds) == size[0] > 0
        assert self.categories is None or len(self.categories) == size[0]
        for model, scores in (("base", self.base), ("policy", self.policy)):
            for scorer, values in scores.items():
                assert values.shape == size, f"{scorer} of {model}: {tuple(values.shape)}, not {size}"
                if scorer in COLUMNS:
                    raise BadInput(f"a scorer cannot be named {scorer!r}, a column of scores.parquet; rename it")
                if not values.isfinite().all():
                    row = int((~values.isfinite()).nonzero()[0])
                    raise BadInput(
                        f"{scorer} gave {values[row].item()} for the {model}'s image of {self.prompts[row]!r}, seed"
                        f" {self.seeds[row]}; run that scorer in fp32, or leave it out"
                    )

    @property
    def scorers(self) -> list[str]:
        return list(self.base)

    def gain(self, scorer: str) -> Tensor:
        """Policy minus base, fp64 [N]."""
        return self.policy[scorer].double() - self.base[scorer].double()


def write_scores(path: Path, scored: Scored) -> None:
    """Write one row per pair and model, atomically.

    Columns: pair (row number, int64), prompt, category (null if there is none), seed (int64), model (base or policy),
    and one of doubles for each scorer.
    """
    number = len(scored.prompts)
    columns = {
        "pair": pa.array([*range(number)] * 2, pa.int64()),
        "prompt": pa.array(scored.prompts * 2, pa.string()),
        "category": pa.array((scored.categories or [None] * number) * 2, pa.string()),
        "seed": pa.array(scored.seeds * 2, pa.int64()),
        "model": pa.array(["base"] * number + ["policy"] * number, pa.string()),
    }
    for scorer in scored.scorers:
        columns[scorer] = pa.array(torch.cat([scored.base[scorer], scored.policy[scorer]]).double().numpy())
    with atomic_file(path) as temporary:
        # absolute: pyarrow takes a relative name with a colon for a URI
        pq.write_table(pa.table(columns), os.path.abspath(temporary), compression="zstd")
