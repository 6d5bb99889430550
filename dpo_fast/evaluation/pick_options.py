"""The flags of `dpo_fast.pick`, each with its unit, and what is refused before anything is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.generate_options import gathered
from dpo_fast.files import user_path
from dpo_fast.help_text import Page, asks_help, show_help

PROG = "python -m dpo_fast.pick"
MOST_STRENGTH = 4.0  # beyond this nothing of the model is left


@dataclass(frozen=True)
class PickConfig:
    """Find the checkpoint of a run, and the strength of what it trained, that score best.

    Images are made at every point of the grid checkpoints x strengths, for half of the prompts; the worse half of the
    points is dropped, again and again, with twice as many images each time. What is left over is judged on the other
    half of the prompts, and written to OUTPUT_DIR as a result that loads like the run's own, with pick.json,
    surface.png and report.html.
    """

    run: Path | None = None
    """An output folder of dpo_fast.train, with its checkpoints. Its flag may be left out: dpo_fast.pick RUN."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the checkpoints to try; none: eight of the run's, evenly spread, with the last."""
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    """Of what was trained: 1 is the checkpoint itself, 0.5 half of its difference from the base, more than 1 goes on in
    the same direction. A LoRA's scale."""
    by: Literal["gain", "win_rate"] = "gain"
    """What is best: the largest mean gain in score over the base, or the largest win rate. The win rate hardly falls as
    the strength goes to 0, where the images do not change."""

    prompts: tuple[str, ...] = ()
    """Texts, files (.txt: one prompt a line; .tsv) or sets, as for dpo_fast.evaluate. None: what the run was evaluated
    on in training."""
    scorers: tuple[str, ...] = ()
    """Names (docs/evaluation.md); the first decides, all of them judge. None: those of the run's evaluation."""
    scorer_models: Path | None = None
    """Folder that holds the scorers' models as OWNER/NAME; None: the run's, else the hub."""
    images: int = 256
    """Images of each point that is left in the last round."""
    judge_images: int = 256
    """Images of the base, of the pick and of the run's result, on the other prompts."""
    sampling_steps: int | None = None
    """Denoising steps; None: the run's, else the model's usual."""
    sampling_guidance: float | None = None
    """Classifier-free guidance scale; None: the run's, else the model's usual."""
    batch_size: int | None = None
    """Images generated, or scored, at once by a rank. None: the run's --eval_batch_size."""
    output_dir: Path | None = None
    """None: RUN/pick. The same command goes on with what is missing there."""
    cache_dir: str | None = None
    """Where the hub's downloads are kept; None: the hub's default."""
    hub_token: str | None = None
    """Access token for the hub; None: the one you are logged in with."""


def parse(argv: list[str]) -> PickConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for a value that nothing can be picked with."""
    if asks_help(argv):
        show_help(Page(PROG, PickConfig, usage="RUN [--FLAG VALUE ...]"))
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else argv
    words = gathered(gathered(words, "prompts"), "scorers")
    refuse_empty(argv)
    with one_line_errors(PickConfig):
        config = tyro.cli(PickConfig, args=words, prog=PROG)
    check(config)
    return config


def check(config: PickConfig) -> None:
    """Raise BadInput, naming flag, value and remedy, for values that nothing can be picked with."""
    if config.run is None:
        raise BadInput("no run is named: python -m dpo_fast.pick RUN, an output folder of dpo_fast.train")
    if not (user_path(config.run) / "config.yaml").is_file():
        raise BadInput(f"{config.run} is no output folder of dpo_fast.train: it holds no config.yaml")
    for name in ("images", "judge_images", "sampling_steps", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} ({value}) must be at least 1")
    guidance = config.sampling_guidance
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise BadInput(f"--sampling_guidance ({guidance}) must be 0 or more")
    if any(not 0 < strength <= MOST_STRENGTH for strength in config.strengths):
        raise BadInput(f"--strengths ({_listed(config.strengths)}) must be above 0 and at most {MOST_STRENGTH:g}")
    for name in ("strengths", "checkpoints"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise BadInput(f"--{name} ({_listed(values)}) must name each value once")
    if not config.strengths:
        raise BadInput("--strengths is empty: name at least one, such as 1.0")


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
