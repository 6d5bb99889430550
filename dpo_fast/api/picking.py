"""`dpo_fast.pick`: the checkpoint of a run, and the strength of what it trained, that score best."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_fast import output_folder, parallel
from dpo_fast.api.options import settled_options
from dpo_fast.errors import out_of_memory
from dpo_fast.evaluation import pick_options, picking
from dpo_fast.evaluation.findings import REPORT
from dpo_fast.evaluation.pick_options import PickConfig
from dpo_fast.evaluation.picking import PICTURE, Picked, Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picking:
    """What came of a pick: the same on every rank."""

    folder: Path  # with the result, pick.json, surface.png and report.html
    picked: Picked

    def __str__(self) -> str:
        """Text for the terminal."""
        files = f"picture: {self.folder / PICTURE}\nreport: {self.folder / REPORT}"
        return f"{self.picked}\n{files}"


def pick(config: PickConfig | None = None, **settings: object) -> Picking:
    """Find the checkpoint and the strength that score best, judge them on other prompts, and write the result.

    Described by `settings`, flags of `python -m dpo_fast.pick` by name (`run=folder, strengths=[0.5, 1.0]`), or by
    `config`, a PickConfig. Images and scores that are in the output folder already are not made again. Under
    `accelerate launch` every process calls this.

    Raises BadInput, before long work, for a run, prompts and scorers that cannot be used, and OSError for a disk that
    is full or fails.
    """
    config = settled_options(PickConfig, pick_options.parse, config, settings)
    plan = picking.plan(config)
    logger.info(_cost(plan))
    try:
        with parallel.joined("none") as ranks, ExitStack() as held:
            parallel.allow_tf32(plan.run.allow_tf32)  # as in training
            ranks.on_main(lambda: held.enter_context(output_folder.hold(plan.out)))
            return Picking(plan.out, ranks.share(picking.pick(plan, ranks)))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, "lower --batch_size") from error


def _cost(plan: Plan) -> str:
    steps = len({point.step for point in plan.points})
    rounds = ", ".join(str(share.images) for share in plan.rounds)
    return (
        f"{len(plan.points)} points: {steps} checkpoints x {len(plan.points) // steps} strengths; rounds of {rounds}"
        f" images a point; {plan.images_to_pick()} images to pick ({plan.images_of_grid()} for the whole grid), at most"
        f" {3 * plan.config.judge_images} to judge"
    )
