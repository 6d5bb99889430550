"""The flags of evaluation, each with its unit, and what is refused before anything is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.errors import BadInput
from dpo_fast.evaluation import generate_options
from dpo_fast.evaluation.generate_options import GenerateConfig, gathered
from dpo_fast.help_text import Page, asks_help, show_help

PROG = "python -m dpo_fast.evaluate"
BATCH_SIZE = 8
OF_PAIRS = (
    "dataset_config_name",
    "dataset_split_name",
    "image_columns",
    "label_column",
    "caption_column",
    "max_pairs",
    "max_bad_fraction",
    "draws",
    "dataloader_num_workers",
)
OF_GENERATION = ("sampling_steps", "sampling_guidance", "layout", "strength")
OF_IMAGES = (*OF_GENERATION, "seeds", "slice", "max_prompts", "scorers", "scorer_models", "compare")
BY_PEOPLE = "people"  # as --scorers
PROTOCOL_SETS = ("partiprompts", "hps")  # of the protocol diffusion-dpo
RESERVED = ("base", "sdedit", *PROTOCOL_SETS)  # names in a protocol's folder that --closed cannot give


@dataclass(frozen=True)
class EvaluateConfig(GenerateConfig):
    """Compare a policy with a baseline: images of the same prompts and noise, scores, win rates, a page to look at.

    OUTPUT_DIR gets report.html, summary.json, scores.parquet and the images. Of a run that was evaluated in training
    (--eval_scorers) `--policy RUN` is enough. With --dataset_name the implicit-reward accuracy on those pairs is
    measured, for which nothing is generated; without --prompts that is all.
    """

    prompts: tuple[str, ...] = ()
    """Texts, files (.txt: one prompt a line; .tsv: columns Prompt and Category) or sets: partiprompts, hps,
    pickapic-validation, shapes; NAME=PATH: a set from your own copy; pickapic-validation=OWNER/NAME: from another
    repository of the hub than version 2's. May be given more than once. None: what the run was evaluated on in
    training."""
    policy: str | None = None
    """An output folder of dpo_fast.train, one of its checkpoints (RUN/checkpoint-N), a pipeline (hub id, diffusers
    folder, .safetensors file), or a folder of images named by their prompts."""
    baseline: str | None = None
    """base: what the run started from; else a run, a pipeline or a folder of images. None: base for a run."""
    seeds: str | None = None
    """Images a prompt: N takes the seeds 0 to N-1; a list with commas takes those (the single seed 7: `7,`). None: as
    many as the run had of a prompt in training where --prompts is its own, else 1; of two folders of images all."""
    batch_size: int | None = None
    """Images generated, or scored, at once by a rank; of held-out pairs as many images. None: the run's
    --eval_batch_size, else 8."""
    output_dir: Path | None = None
    """None: evaluations/<policy>-against-<baseline>, of a protocol protocols/<policy>. The same command goes on with
    what is missing there."""

    # ---- a published protocol ----------------------------------------------------------------------------------------
    protocol: Literal["diffusion-dpo"] | None = None
    """diffusion-dpo: the comparisons of the paper, one evaluation each, for people to vote on (docs/protocol.md). None:
    one evaluation."""
    closed: tuple[str, ...] = ()
    """Of the protocol: images of closed models that you have, as NAME=FOLDER (midjourney=FOLDER emu=FOLDER); images are
    found by the names of the prompts."""

    # ---- scores ------------------------------------------------------------------------------------------------------
    scorers: tuple[str, ...] = ()
    """Names (docs/evaluation.md), the one that leads first; people: nothing is scored, and people can vote. None:
    those of the run's evaluation in training; of the protocol, the paper's as far as their files are there."""
    scorer_models: Path | None = None
    """Folder that holds the scorers' models as OWNER/NAME; None: the run's, else the hub."""
    compare: Literal["images", "medians"] | None = None
    """images: seed by seed. medians: prompt by prompt, the median score of its images (the published way with
    several). None: images."""

    # ---- held-out pairs ----------------------------------------------------------------------------------------------
    dataset_name: str | None = None
    """Held-out preference pairs for the implicit-reward accuracy: a hub id, a folder or a parquet / arrow / JSONL
    file, as for training. The reference is what the run started from; of a policy that is no run, the baseline."""
    dataset_config_name: str | None = None
    """Configuration name of a hub data set."""
    dataset_split_name: str | None = None
    """Split; None: train, else the only one there is."""
    image_columns: tuple[str, str] | None = None
    """The two image columns, in the label's order; None: jpg_0 jpg_1, or chosen rejected."""
    label_column: str | None = None
    """Column with the label: 1 (first image wins), 0 (second wins), 0.5 (tie: left out); None: label_0."""
    caption_column: str | None = None
    """Column with the prompt; None: caption or prompt."""
    max_pairs: int | None = None
    """Use only the first N rows."""
    max_bad_fraction: float | None = None
    """Stop when more than this fraction of the rows is unusable (undecodable image, empty caption, missing file).
    None: 0.01."""
    draws: int | None = None
    """Noises and timesteps a pair, spread over the timesteps; its implicit reward is the mean over them. None: 8."""
    dataloader_num_workers: int | None = None
    """Processes that read and decode pairs. None: 2."""


def parse(argv: list[str]) -> EvaluateConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for a value that nothing can be compared with."""
    if asks_help(argv):
        show_help(Page(PROG, EvaluateConfig))
    words = gathered(gathered(gathered(argv, "prompts"), "scorers"), "closed")
    refuse_empty(argv)
    with one_line_errors(EvaluateConfig):
        config = tyro.cli(EvaluateConfig, args=words, prog=PROG)
    check(config)
    return generate_options.expanded(config)


def check(config: EvaluateConfig) -> None:
    """Raise BadInput, naming flag, value and remedy, for values that nothing can be compared with."""
    generate_options.check(config)
    if config.baseline == "none":
        raise BadInput("--baseline none leaves nothing to compare with: name a run, a pipeline or a folder of images")
    for name in ("max_pairs", "draws"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} ({value}) must be at least 1")
    if config.max_bad_fraction is not None and not 0 <= config.max_bad_fraction <= 1:
        raise BadInput(f"--max_bad_fraction ({config.max_bad_fraction}) must be in [0, 1]")
    if config.dataloader_num_workers is not None and config.dataloader_num_workers < 0:
        raise BadInput(f"--dataloader_num_workers ({config.dataloader_num_workers}) must be 0 or more")
    if BY_PEOPLE in config.scorers and len(config.scorers) > 1:
        raise BadInput(f"--scorers {' '.join(config.scorers)}: people stands alone, leave it out or the others")
    if config.protocol is None:
        refuse_idle(config, ("closed",), "is of a protocol: add --protocol diffusion-dpo, or leave it out")
    else:
        _check_protocol(config)
    if config.dataset_name is None:
        refuse_idle(config, OF_PAIRS, "is of preference pairs: add --dataset_name, or leave it out")
    elif not config.prompts:
        refuse_idle(config, OF_IMAGES, "is of images, and none are compared: add --prompts, or leave it out")


def _check_protocol(config: EvaluateConfig) -> None:
    if config.dataset_name is not None:
        raise BadInput(f"--dataset_name ({config.dataset_name}) is no part of the protocol: evaluate on it separately")
    if config.slice is not None:
        raise BadInput(f"--slice {config.slice}: the protocol reports the people slice anyway, leave it out")
    for given in config.prompts:
        if given.partition("=")[0] not in PROTOCOL_SETS:
            raise BadInput(
                f"--prompts {given} is no set of the protocol {config.protocol}: name {' or '.join(PROTOCOL_SETS)}, as"
                " NAME=PATH your own copy, or leave --prompts out"
            )
    names = []
    for given in config.closed:
        name, equals, folder = given.partition("=")
        if not (equals and folder and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+]{0,39}", name)):
            raise BadInput(f"--closed {given} must be NAME=FOLDER, with letters, digits, dots, + and _ in NAME")
        if name.lower() in (*names, *RESERVED):
            raise BadInput(f"--closed {given}: the name {name} is taken, give each folder one of its own")
        names.append(name.lower())


def refuse_idle(config: EvaluateConfig, names: Sequence[str], why: str) -> None:
    """Raise BadInput for a flag that was given and would do nothing."""
    for name in names:
        if getattr(config, name) not in (None, False, ()):
            raise BadInput(f"--{name} {why}")
