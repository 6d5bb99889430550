"""The flags of generation, each with its unit, and what is refused before anything is loaded."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.config import TOKEN_LENGTHS
from dpo_fast.errors import BadInput
from dpo_fast.files import user_path
from dpo_fast.help_text import Page, asks_help, show_help

PROG = "python -m dpo_fast.generate"
MOST_SEEDS = 10_000  # of a prompt
C = TypeVar("C", bound="GenerateConfig")
STRENGTH = 0.6  # of SDEdit, as in the paper (supplement, TEdBench)


@dataclass(frozen=True)
class GenerateConfig:
    """Generate images from a policy and its baseline: the same prompts, the same initial noise."""

    # ---- what is generated -------------------------------------------------------------------------------------------
    prompts: tuple[str, ...] = ()
    """Texts, files (.txt: one prompt a line; .tsv: columns Prompt and Category) or sets: partiprompts, hps,
    pickapic-validation, shapes; NAME=PATH: a set from your own copy; pickapic-validation=OWNER/NAME: from another
    repository of the hub than version 2's. May be given more than once."""
    policy: str | None = None
    """An output folder of dpo_fast.train, one of its checkpoints (RUN/checkpoint-N), or a pipeline: hub id, diffusers
    folder, .safetensors file."""
    baseline: str | None = None
    """base: what the run started from; none: only the policy; else a run or a pipeline. None: base for a run."""
    is_turbo: bool = False
    """Pipelines named as policy or baseline are SDXL-Turbo or SD-Turbo. A run knows it itself."""
    seeds: str = "1"
    """Images a prompt: N takes the seeds 0 to N-1; a list with commas takes those (the single seed 7: `7,`)."""
    slice: Literal["people"] | None = None
    """people: only prompts of the category People; of sets without it, those with a word that names a person."""
    max_prompts: int | None = None
    """Use only N prompts, evenly spread over the list; None: all."""

    # ---- sampling ----------------------------------------------------------------------------------------------------
    sampling_steps: int | None = None
    """Denoising steps; None: the run's, else the model's usual (SD1.5 and SDXL 50, Turbo 4)."""
    sampling_guidance: float | None = None
    """Classifier-free guidance scale; None: the run's, else the model's usual (SD1.5 7.5, SDXL 5, Turbo 0)."""
    max_token_length: int | None = None
    """Tokens of a prompt that are encoded: 75, or 150 or 225 in chunks of 75, as kohya's sd-scripts does. None: as in
    the run; of pipelines 75."""
    resolution: int | None = None
    """Side of the square images in pixels; None: the run's, else the model's own."""
    layout: Path | None = None
    """SDEdit: start from this image, or from the images of this folder (a prompt takes the one that is named like it,
    the others take them in turn, in the order of their names)."""
    strength: float | None = None
    """Noise on the layout, in (0, 1]: of the steps, the last strength x steps are taken. None: 0.6."""

    # ---- machine and places ------------------------------------------------------------------------------------------
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Compute dtype on a GPU (a CPU computes in fp32): no is fp32. None: the run's, of pipelines fp16."""
    batch_size: int = 8
    """Images generated at once by a rank."""
    output_dir: Path | None = None
    """Folder of the images; None: images/<the policy's name>. The same command goes on with what is missing."""
    cache_dir: str | None = None
    """Where the hub's downloads are kept; None: the hub's default."""
    hub_token: str | None = None
    """Access token for the hub; None: the one you are logged in with."""


def parse(argv: list[str]) -> GenerateConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for a value that nothing can be made with."""
    if asks_help(argv):
        show_help(Page(PROG, GenerateConfig))
    refuse_empty(argv)
    with one_line_errors(GenerateConfig):
        config = tyro.cli(GenerateConfig, args=gathered(argv, "prompts"), prog=PROG)
    check(config)
    return expanded(config)


def expanded(config: C) -> C:
    """The same with the home folder in the place of a leading ~, which a shell leaves in `--policy=~/runs/mine`."""
    models = {name: getattr(config, name) for name in ("policy", "baseline")}
    homes = {name: str(user_path(path)) for name, path in models.items() if path is not None and path.startswith("~")}
    return replace(config, **homes)


def check(config: GenerateConfig) -> None:
    """Raise BadInput, naming flag, value and remedy, for values that nothing can be made with."""
    if config.policy is None:
        raise BadInput("no model is named: give --policy an output folder of dpo_fast.train, a pipeline or a hub id")
    for name in ("max_prompts", "sampling_steps", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} ({value}) must be at least 1")
    if config.max_token_length not in (None, *TOKEN_LENGTHS):
        raise BadInput(f"--max_token_length ({config.max_token_length}) must be 75, 150 or 225")
    if config.resolution is not None and config.resolution < 8:
        raise BadInput(f"--resolution ({config.resolution}) must be at least 8 pixels")
    guidance = config.sampling_guidance
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise BadInput(f"--sampling_guidance ({guidance}) must be 0 or more")
    if config.strength is not None and not 0 < config.strength <= 1:
        raise BadInput(f"--strength ({config.strength}) must be in (0, 1]; the paper's is {STRENGTH}")
    if config.strength is not None and config.layout is None:
        raise BadInput(f"--strength ({config.strength}) is of the noise on a layout: add --layout IMAGE_OR_FOLDER")
    if config.seeds is not None:
        seeds_of(config.seeds)


def seeds_of(given: str) -> tuple[int, ...]:
    """The seeds that `--seeds` stands for. Raises BadInput where there are none or one recurs."""
    try:
        numbers = [int(part) for part in given.split(",") if part.strip()]
    except ValueError as error:
        raise BadInput(f"--seeds ({given}) must be a number of images, or a list of seeds such as 3,17,99") from error
    if "," not in given and numbers:
        if not 1 <= numbers[0] <= MOST_SEEDS:
            raise BadInput(f"--seeds ({given}) must be 1 to {MOST_SEEDS}: the images a prompt")
        return tuple(range(numbers[0]))
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= number < 2**63 for number in numbers):
        raise BadInput(f"--seeds ({given}) must name each seed once, in [0, 2^63)")
    return tuple(numbers)


def gathered(argv: list[str], name: str) -> list[str]:
    """The words with all values of a repeated flag at its first place: of other flags the last one wins."""
    values: list[str] = []
    rest: list[str] = []
    taking, place = False, None
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag == f"--{name}":
            taking, place = not equals, len(rest) if place is None else place
            values += [value] if equals else []
        elif taking and not word.startswith("--"):
            values.append(word)
        else:
            taking = False
            rest.append(word)
    return rest if place is None else [*rest[:place], f"--{name}", *values, *rest[place:]]
