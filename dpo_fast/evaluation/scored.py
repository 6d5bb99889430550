"""The scores that an evaluation rests on, and the table they are kept in: scores.parquet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dpo_fast.checksums import Damaged
from dpo_fast.errors import BadInput
from dpo_fast.files import atomic_file, regular_file

SCORES = "scores.parquet"
COLUMNS = ("pair", "prompt", "category", "seed", "model")  # followed by one for each scorer
MOST_ROWS, MOST_BYTES = 20_000_000, 1 << 30  # of a file that is read: rows, and what they take in memory


@dataclass(frozen=True)
class Scored:
    """Scores of base and policy, one pair per row: one prompt, one seed, an image of each model. Without scorers: the
    pairs alone.

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
        assert list(self.base) == list(self.policy) and len(self.seeds) == size[0] > 0
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

    def of_rows(self, rows: Sequence[int]) -> "Scored":
        """The scores of some rows, without their categories."""
        picked = torch.tensor(rows)
        return Scored(
            [self.prompts[row] for row in rows],
            [self.seeds[row] for row in rows],
            {scorer: values[picked] for scorer, values in self.base.items()},
            {scorer: values[picked] for scorer, values in self.policy.items()},
        )

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
        pq.write_table(pa.table(columns), os.path.abspath(temporary), compression="zstd", write_page_checksum=True)


def read_scores(path: Path, *, unscored: bool = False) -> Scored:
    """Read a file of `write_scores`. Raises Damaged for a file that is missing, damaged, or another, and for pairs that
    nobody scored unless `unscored`.

    Where only some rows have a category, that of the others is the empty text.
    """
    try:
        table = _read_table(regular_file(path), unscored)
        number, rest = divmod(table.num_rows, 2)
        texts = {name: _texts(table.column(name)) for name in ("prompt", "category", "model")}
        pairs, seeds = (table.column(name).to_numpy() for name in ("pair", "seed"))
        halves = [(texts["prompt"][:number], [*seeds[:number]]), (texts["prompt"][number:], [*seeds[number:]])]
        if rest or not number or halves[0] != halves[1] or [*pairs] != [*range(number)] * 2:
            raise ValueError("its rows are not pairs")
        if texts["model"] != ["base"] * number + ["policy"] * number or None in texts["prompt"]:
            raise ValueError("its rows are not of a base and a policy")
        scores = {
            name: torch.from_numpy(table.column(name).to_numpy().copy()) for name in table.column_names[len(COLUMNS) :]
        }
        categories = [category or "" for category in texts["category"][:number]]
        return Scored(
            texts["prompt"][:number],
            [int(seed) for seed in seeds[:number]],
            {name: values[:number] for name, values in scores.items()},
            {name: values[number:] for name, values in scores.items()},
            categories if any(categories) else None,
        )
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise Damaged(f"{path} cannot be read as scores of pairs ({reason}): evaluate again") from error


def _read_table(path: Path, unscored: bool) -> pa.Table:
    """The table in a file, if it has the columns of `write_scores` and a size that can be held."""
    text = ("prompt", "category", "model")  # kept as dictionaries, in which a long text counts once
    with pq.ParquetFile(os.path.abspath(path), page_checksum_verification=True, read_dictionary=[*text]) as file:
        names, kinds = file.schema_arrow.names, dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
        lacking = len(names) == len(COLUMNS) and not unscored
        if tuple(names[: len(COLUMNS)]) != COLUMNS or lacking or len(kinds) < len(names):
            raise ValueError(f"its columns are not {', '.join(COLUMNS)} and scorers")
        wanted = {name: pa.float64() for name in names} | dict.fromkeys(("pair", "seed"), pa.int64())
        wanted |= {name: pa.dictionary(pa.int32(), pa.string()) for name in text}
        wrong = [name for name in names if kinds[name] != wanted[name]]
        if wrong:
            raise ValueError(f"column {wrong[0]!r} holds {kinds[wrong[0]]}")
        groups = (file.metadata.row_group(k) for k in range(file.metadata.num_row_groups))
        if file.metadata.num_rows > MOST_ROWS or sum(group.total_byte_size for group in groups) > MOST_BYTES:
            raise ValueError(f"it has {file.metadata.num_rows} rows, more than can be held")
        table = file.read()
    if any(table.column(name).null_count for name in names if name != "category"):
        raise ValueError("it holds nulls")
    return table


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """The values of a column of dictionaries; equal ones are one object."""
    values: list[str | None] = []
    for chunk in column.chunks:
        distinct = [*chunk.dictionary.to_pylist(), None]
        values += [distinct[place] for place in chunk.indices.fill_null(-1).to_pylist()]
    return values
