"""The flags of relabelling, each with its unit, and what is refused before anything is read."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.errors import BadInput
from dpo_fast.files import user_path
from dpo_fast.help_text import Page, asks_help, show_help

PROG = "python -m dpo_fast.relabel"


@dataclass(frozen=True)
class RelabelConfig:
    """Label preference pairs by scorers instead of people: AI feedback, to train on with --dataset_name OUTPUT.

    OUTPUT has Pick-a-Pic's columns (jpg_0, jpg_1: the bytes as they were; caption; label_0), label_human, and the two
    scores of every scorer. The margin of a pair is score 0 - score 1 of one scorer; of several the sum of weight x
    difference / (root mean square of that scorer's differences over the set: their standard deviation, about 0 because
    which image is first says nothing). Labels are 1, 0, or 0.5 where the margin is exactly 0.
    """

    # ---- labels ------------------------------------------------------------------------------------------------------
    dataset_name: str | None = None
    """Preference pairs: a hub id, a folder or a parquet / arrow / JSONL file, as for training. Hub sets are stored."""
    scorer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME, or NAME:WEIGHT (1 where left out; below 0: the lower score wins). Once for each scorer."""
    output: Path | None = None
    """The .parquet file to write. OUTPUT's name with .json gets the counts."""
    temperature: float | None = None
    """Soft labels sigmoid(margin / T), to be trained on with --soft_labels; in the margin's unit. None: hard labels."""
    keep_fraction: float | None = None
    """Keep only this fraction of the pairs, in (0, 1]: those with the largest absolute margins."""
    min_margin: float | None = None
    """Keep only pairs whose absolute margin is at least this."""
    unlabelled: bool = False
    """The pairs have no human labels: none is read, kept or compared with."""

    # ---- pairs -------------------------------------------------------------------------------------------------------
    dataset_config_name: str | None = None
    """Configuration name of a hub data set."""
    dataset_split_name: str | None = None
    """Split; None: train, else the only one there is."""
    image_columns: tuple[str, str] | None = None
    """The two image columns, in the label's order; None: jpg_0 jpg_1, or chosen rejected."""
    label_column: str | None = None
    """Column with the human label: 1 (first image wins), 0 (second wins), 0.5 (tie); None: label_0."""
    caption_column: str | None = None
    """Column with the prompt; None: caption or prompt."""
    max_train_samples: int | None = None
    """Use only the first N rows."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the rows is unusable (undecodable image, empty caption, missing file)."""

    # ---- machine and places ------------------------------------------------------------------------------------------
    batch_size: int = 16
    """Images handed to a scorer at once, all of one size."""
    dataloader_num_workers: int = 2
    """Threads that read and decode images."""
    scorer_models: Path | None = None
    """Folder that holds the scorers' models as OWNER/NAME; None: the hub."""
    scores_dir: Path | None = None
    """Folder of the scores, written as they come and kept: the same command goes on from them, and other weights,
    temperatures or filters take no scoring. Outputs of one set may share it, whatever their labels and number of rows.
    None: OUTPUT's name with .scores."""
    overwrite: bool = False
    """Replace an output that is there."""
    cache_dir: str | None = None
    """Where the hub's downloads are kept; None: the hub's default."""
    hub_token: str | None = None
    """Access token for the hub; None: the one you are logged in with."""

    @property
    def weights(self) -> dict[str, float]:
        """Scorer -> weight, in the order given. Raises BadInput for what is no weight and for a scorer named twice."""
        weights: dict[str, float] = {}
        for given in self.scorer:
            name, colon, text = given.partition(":")
            try:
                weight = float(text) if colon else 1.0
            except ValueError:
                weight = math.nan
            if not name or not math.isfinite(weight) or weight == 0:
                raise BadInput(f"--scorer {given} must be NAME or NAME:WEIGHT, the weight a number other than 0")
            if name in weights:
                raise BadInput(f"--scorer {name} is given twice: give each scorer once, with its whole weight")
            weights[name] = weight
        return weights

    @property
    def scores(self) -> Path:
        """The folder of the scores."""
        return user_path(self.scores_dir) if self.scores_dir else self.output.with_suffix(".scores")


# Numbers that can be used; the second column is how the limits read in the error.
_NUMBERS = {
    "temperature": (lambda v: v > 0, "greater than 0"),
    "keep_fraction": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "min_margin": (lambda v: v > 0, "greater than 0"),
    "max_train_samples": (lambda v: v >= 1, "at least 1"),
    "max_bad_fraction": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "dataloader_num_workers": (lambda v: v >= 1, "at least 1"),
}


def parse(argv: list[str]) -> RelabelConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for a value that cannot be used."""
    if asks_help(argv):
        show_help(Page(PROG, RelabelConfig))
    refuse_empty(argv)
    with one_line_errors(RelabelConfig):
        config = tyro.cli(RelabelConfig, args=argv, prog=PROG)
    check(config)
    paths = {name: getattr(config, name) for name in ("output", "scorer_models")}
    return replace(config, **{name: user_path(path) for name, path in paths.items() if path is not None})


def check(config: RelabelConfig) -> None:
    """Refuse values nothing can be labelled with, naming flag, value and remedy. Raises BadInput."""
    for name, (allowed, reading) in _NUMBERS.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and allowed(value)):
            raise BadInput(f"--{name} ({value}) must be {reading}")
    if config.dataset_name is None:
        raise BadInput("no pairs are named: give --dataset_name (a hub id, or a local file or folder)")
    if not config.weights:
        raise BadInput("no scorer is named: give --scorer NAME, once for each")
    if config.output is None:
        raise BadInput("no output is named: give --output FILE.parquet")
    if config.output.suffix != ".parquet":
        raise BadInput(f"--output ({config.output}) must end in .parquet")
    if config.keep_fraction is not None and config.min_margin is not None:
        raise BadInput("--keep_fraction and --min_margin exclude each other: both say which margins are kept")
    if config.unlabelled and config.label_column is not None:
        raise BadInput(f"--unlabelled and --label_column ({config.label_column}) exclude each other: leave one out")
