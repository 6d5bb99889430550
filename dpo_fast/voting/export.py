"""Votes as files: each vote as a row of CSV, or the pairs of images as preference pairs that training reads.

A pair is a row of a parquet file in Pick-a-Pic's columns, with the bytes of its images as they were when people voted:

    jpg_0  jpg_1  label_0 (1: jpg_0 is better, 0: jpg_1 is, 0.5: a tie)  caption  category  votes
"""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.evaluate_options import refuse_idle
from dpo_fast.evaluation.formats import counted
from dpo_fast.evaluation.prompts import Prompt, narrowed
from dpo_fast.files import atomic_file, exists, read_bytes, user_path
from dpo_fast.help_text import Page, asks_help, show_help
from dpo_fast.votes.records import Vote
from dpo_fast.votes.store import ImageFile, VoteStore
from dpo_fast.votes.tally import majority_of

PROG = "python -m dpo_fast.vote export"
GROUP_BYTES = 64 << 20  # of images per row group of the file
SCHEMA = pa.schema(
    [
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("caption", pa.string()),
        ("category", pa.string()),
        ("votes", pa.int64()),
    ]
)
CSV_COLUMNS = ("group", "question", "comparison", "prompt", "category", "seed", "model_0", "model_1", "label_0",
               "voter", "model_0_left", "seconds", "at")  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """Write votes to a file: .csv, one vote a row, or .parquet, preference pairs to train on with --dataset_name.

    A pair with as many votes for either image is a tie (0.5), which training leaves out, or uses with --soft_labels.
    """

    file: tyro.conf.Positional[Path]
    """The file of votes, votes.sqlite."""
    to: Path
    """The file to write: .csv or .parquet."""
    labels: Literal["majority", "soft"] | None = None
    """Of pairs. majority: 1, 0 or 0.5. soft: the share of votes for the first image, ties half, to be trained on with
    --soft_labels. None: majority."""
    question: str | None = None
    """Only votes on this question, by its id. Of pairs it must be named if there are several."""
    voter: str | None = None
    """Only the votes of this voter: a preference of one's own."""
    slice: Literal["people"] | None = None
    """people: only prompts of the category People; of groups without it, those with a word that names a person."""
    excluded: bool = False
    """Also the votes of voters whom you excluded."""
    overwrite: bool = False
    """Replace the file if it exists."""


class Written(NamedTuple):
    """What was written."""

    path: Path
    rows: int  # votes of a CSV file, pairs of a parquet file
    votes: int
    labels: Mapping[str, int] | None  # pairs by who won: first, second, neither; None: of a CSV file
    soft: bool

    def __str__(self) -> str:
        if self.labels is None:
            return f"{counted(self.rows, 'vote')}: {self.path}"
        first, second, neither = (self.labels[name] for name in ("first", "second", "neither"))
        soft = " --soft_labels" if self.soft else ""
        return (
            f"{counted(self.rows, 'pair')} of {counted(self.votes, 'vote')}: the first image is preferred in {first},"
            f" the second in {second}, neither in {neither}\ntrain on them: python -m dpo_fast.train --dataset_name"
            f" {self.path}{soft}"
        )


def parse(argv: list[str]) -> ExportConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for values that exclude each other."""
    if asks_help(argv):
        show_help(Page(PROG, ExportConfig, usage="FILE --to FILE [--FLAG VALUE ...]"))
    refuse_empty(argv)
    with one_line_errors(ExportConfig):
        config = tyro.cli(ExportConfig, args=argv, prog=PROG)
    config = replace(config, file=user_path(config.file), to=user_path(config.to))
    if config.to.suffix not in (".csv", ".parquet"):
        raise BadInput(f"--to {config.to} must end with .csv (votes) or .parquet (pairs to train on)")
    if config.to.suffix == ".csv":
        refuse_idle(config, ("labels",), "is of pairs, and a .csv file has votes: leave it out, or write .parquet")
    if exists(config.to) and not config.overwrite:
        raise BadInput(f"--to {config.to} exists: name another file, or add --overwrite")
    return config


def export(config: ExportConfig) -> Written:
    """Write what the flags ask for, atomically.

    Raises BadInput for a file that holds no such votes, and for an image that is not what people saw any more.
    """
    with VoteStore.read(config.file) as store:
        votes = _selected(store, config)
        files, images = store.files(), store.image_files()
    if config.to.suffix == ".csv":
        with atomic_file(config.to) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            write_votes(file, votes)
        return Written(config.to, len(votes), len(votes), None, False)
    soft = config.labels == "soft"
    of = _labels(votes, soft)
    _write_pairs(config.to, votes, of, files, images)
    won = Counter("first" if label > 0.5 else "second" if label < 0.5 else "neither" for label in of.values())
    return Written(config.to, len(of), len(votes), {name: won[name] for name in ("first", "second", "neither")}, soft)


def _selected(store: VoteStore, config: ExportConfig) -> list[Vote]:
    """The votes that the flags leave. Raises BadInput if none is left."""
    questions, excluded = store.settings()["questions"], store.excluded()
    question = config.question
    if question is None and config.to.suffix == ".parquet":
        if len(questions) > 1:
            raise BadInput(f"{config.file} has several questions: name one, --question {' | '.join(questions)}")
        question = next(iter(questions))
    if question is not None and question not in questions:
        raise BadInput(f"--question {question} is none of {', '.join(questions)}")
    if config.voter is not None and config.voter not in store.voters():
        raise BadInput(f"--voter {config.voter} is none of the voters: {', '.join(store.voters()) or 'there are none'}")
    if config.voter in excluded and not config.excluded:
        raise BadInput(f"--voter {config.voter} is excluded ({excluded[config.voter]}): add --excluded")
    votes = [
        vote
        for vote in store.votes(excluded=config.excluded)
        if question in (None, vote.question) and config.voter in (None, vote.voter)
    ]
    if config.slice is not None:
        kept = _about_people(votes) if votes else set()
        votes = [vote for vote in votes if (vote.group, vote.prompt) in kept]
    if not votes:
        raise BadInput(f"{config.file} has no such votes: nothing is written")
    return votes


def _about_people(votes: Sequence[Vote]) -> Collection[tuple[str, str]]:
    """Group and prompt of the votes on prompts about people. Raises BadInput if there are none."""
    parts: dict[str, dict[str, Prompt]] = {}
    for vote in votes:
        parts.setdefault(vote.group, {}).setdefault(vote.prompt, Prompt(vote.prompt, vote.group, vote.category))
    kept = narrowed([[*of.values()] for of in parts.values()], people=True, most=None)
    return {(prompt.source, prompt.text) for prompt in kept}


def _labels(votes: Sequence[Vote], soft: bool) -> dict[int, float]:
    """Comparison -> the label of its first image, in the order of the comparisons."""
    if not soft:
        return dict(sorted(majority_of(votes).items()))
    of: dict[int, list[float]] = {}
    for vote in votes:
        of.setdefault(vote.comparison, []).append(vote.outcome)
    return {comparison: sum(outcomes) / len(outcomes) for comparison, outcomes in sorted(of.items())}


def write_votes(file: TextIO, votes: Iterable[Vote]) -> None:
    """Write votes as CSV, one a row, with CSV_COLUMNS as the first."""
    table = csv.writer(file)
    table.writerow(CSV_COLUMNS)
    for vote in votes:
        *head, models, outcome, voter, left, seconds, at = vote
        table.writerow([*head, *models, outcome, voter, int(left), f"{seconds:.3f}", f"{at:.3f}"])


def _write_pairs(
    path: Path,
    votes: Sequence[Vote],
    labels: Mapping[int, float],
    files: Mapping[int, tuple[Path, Path]],
    images: Mapping[Path, ImageFile],
) -> None:
    """Write one row a comparison. An image is read, and compared with what people saw, when its row is written."""
    number = Counter(vote.comparison for vote in votes)
    about = {vote.comparison: vote for vote in votes}
    packing = {name: "none" if name.startswith("jpg_") else "snappy" for name in SCHEMA.names}
    options = {"compression": packing, "write_page_checksum": True}
    # absolute: pyarrow takes a relative name with a colon for a URI
    with atomic_file(path) as temporary, pq.ParquetWriter(os.path.abspath(temporary), SCHEMA, **options) as file:
        group: list[dict[str, object]] = []
        size = 0
        for comparison, label in labels.items():
            first, second = (_image(one, images.get(one)) for one in files[comparison])
            of = about[comparison]
            values = (first, second, label, of.prompt, of.category, number[comparison])
            group.append(dict(zip(SCHEMA.names, values, strict=True)))
            size += len(first) + len(second)
            if size >= GROUP_BYTES:
                file.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
                group, size = [], 0
        if group:
            file.write_table(pa.Table.from_pylist(group, schema=SCHEMA))


def _image(path: Path, seen: ImageFile | None) -> bytes:
    """The bytes of an image. Raises BadInput if it is missing, or other than what people saw."""
    try:
        data = read_bytes(path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{path} cannot be read ({reason}): put back the image that was voted on") from error
    if seen is not None and ImageFile.of(data) != seen:
        raise BadInput(f"{path} has changed since people voted on it: put back the image that was voted on")
    return data
