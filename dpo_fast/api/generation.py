"""`dpo_fast.generate`: images of the same prompts and noise from a policy and its base."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_fast import parallel
from dpo_fast.api.evaluation import sampled_as
from dpo_fast.api.options import settled_options
from dpo_fast.errors import out_of_memory
from dpo_fast.evaluation import generate_options
from dpo_fast.evaluation.generate_options import GenerateConfig, seeds_of
from dpo_fast.evaluation.generation import GRID, LISTING, ImageRow, generate_images, wanted_of
from dpo_fast.evaluation.prompts import Where, read_prompts
from dpo_fast.evaluation.sides import models_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """What was generated: the same on every rank."""

    folder: Path
    rows: list[ImageRow]  # one for each model, prompt and seed; `folder / row.file` is the image
    made_now: int  # the others were in the folder already

    def __str__(self) -> str:
        """Text for the terminal."""
        files, prompts = ({getattr(row, name) for row in self.rows} for name in ("file", "prompt"))
        return (
            f"{len(files)} images of {len(prompts)} prompts, {self.made_now} made now: {self.folder / LISTING},"
            f" {self.folder / GRID}"
        )


def generate(config: GenerateConfig | None = None, **settings: object) -> Images:
    """Generate the images that are missing from the output folder, and return what it holds.

    The request is described by `settings`, flags of `python -m dpo_fast.generate` by name (`policy=folder,
    prompts=["a cat"], seeds=2`), or by `config`, a GenerateConfig. Under `accelerate launch` every process calls this.

    Raises BadInput, before long work, for settings, models and prompts that cannot be used, and OSError for a disk
    that is full or fails.
    """
    config = settled_options(GenerateConfig, generate_options.parse, config, settings)
    where = Where(config.cache_dir, config.hub_token)
    prompts = read_prompts(config.prompts, people=config.slice == "people", most=config.max_prompts, where=where)
    models = models_of(config, config.policy, config.baseline)
    wanted = wanted_of(config, models, prompts, seeds_of(config.seeds))
    out = config.output_dir or Path("images", list(models)[-1])
    for name, model in models.items():
        logger.info("%s: %s", name, sampled_as(model))
    try:
        with parallel.joined("none") as ranks:
            made = generate_images(wanted, out, ranks)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, "lower --batch_size") from error
    return Images(out, wanted.rows(), made)
