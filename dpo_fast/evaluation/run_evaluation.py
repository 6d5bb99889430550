"""The evaluation that ends a training run: `dpo_fast.evaluate` of the run, with its results in the run's folder.

RUN/evaluation/        evaluation.json, images/, scores/, summary.json, as in any evaluation's folder (`comparison`)
RUN/scores.parquet     RUN/report.html     RUN/samples.png     RUN/summary.json gets the numbers
"""

import logging
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from dpo_fast import output_folder
from dpo_fast.checksums import Damaged, write_signed_json
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput, printable
from dpo_fast.evaluation.comparison import check_scorers, compare, find_pairs, write_report
from dpo_fast.evaluation.evaluate_options import EvaluateConfig
from dpo_fast.evaluation.findings import RECORD, Findings
from dpo_fast.evaluation.generation import LISTING, settings_of_images
from dpo_fast.evaluation.pairing import ImagePairs
from dpo_fast.evaluation.prompts import Prompt, Where
from dpo_fast.evaluation.reopened import OF_RUN as FOLDER
from dpo_fast.evaluation.report.gallery import drawn, extremes
from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.sides import (
    Comparison,
    comparison_of,
    prompts_in_training,
    read_run,
    scoring_of,
    settings_of,
    sides_of,
)
from dpo_fast.evaluation.voted import people_of
from dpo_fast.files import delete, rename_away
from dpo_fast.models.load import revisions
from dpo_fast.parallel import Ranks
from dpo_fast.pictures import before_after, save_png, to_picture
from dpo_fast.scorers import check_names
from dpo_fast.training.run_folder import SUMMARY, check_space, is_finished, read_summary

logger = logging.getLogger(__name__)

PICTURE = "samples.png"
COLUMNS = 8  # of samples.png
OF_RESULT = "result"  # in the record: the checksums of the result that was evaluated


def check_request(config: TrainConfig, ranks: Ranks) -> list[Prompt]:
    """Check scorers, their files and the prompts before the training; return the prompts. Every rank calls this.

    Every scorer is loaded on the main rank's CPU and released again, so that the training has the GPU to itself.
    Raises BadInput, on every rank, for scorers and prompts that cannot be used, and for a folder of another evaluation
    where this one is to be.
    """
    check_names(config.eval_scorers)

    def check() -> list[Prompt]:
        prompts = prompts_in_training(config, Where(config.cache_dir, config.hub_token))
        texts = [prompt.text for prompt in prompts]
        check_scorers(config.eval_scorers, scoring_of(_as_flags(config), config), texts)
        number = 2 * (config.eval_images or len(set(texts)))  # of base and policy; PNGs are at most as large as pixels
        needed = number * 3 * (config.resolution or 0) ** 2
        check_space(config.output_dir, needed, f"the {number} images of the evaluation")
        finished = is_finished(config.output_dir, config.max_train_steps, evaluated=True, uploaded=False)
        if not (finished or config.overwrite):
            _read_record(config.output_dir / FOLDER)
        return prompts

    return ranks.from_main(check)


def evaluate_run(config: TrainConfig, prompts: list[Prompt], ranks: Ranks) -> Findings | None:
    """Compare a finished run with its base on `prompts`, by the scorers that its configuration names.

    Every rank generates and scores its share. The main rank returns the findings, the others None; it also writes
    scores.parquet, report.html and samples.png into the run's folder. After an interruption it goes on where it was, if
    the run's result and what it is compared with are still the same.
    """
    flags, home = _as_flags(config), config.output_dir
    out = flags.output_dir

    def plan() -> tuple[Comparison, dict[str, object]]:
        models, sides = sides_of(flags)
        comparison = comparison_of(flags, read_run(flags.policy), models, sides, prompts)
        record = {
            **settings_of(flags, sides, models, comparison),
            "base": revisions(models[sides[0].name]),
            "images": settings_of_images(comparison.wanted, ranks.device),
            OF_RESULT: read_summary(home).get("result"),
        }
        return comparison, record

    comparison, record = ranks.from_main(plan)
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(output_folder.hold(out)))
        ranks.on_main(lambda: _claim(out, record))
        comparison, pairs = find_pairs(comparison, out, ranks)
        result = compare(comparison, pairs, out, ranks, flags.batch_size)
        if result is None:
            return None
        findings, scored = result
        findings = findings.with_people(people_of(out, pairs), scored)
        write_signed_json(out / SUMMARY, findings.for_summary())
        write_report(home, findings, scored, pairs)
        save_png(_samples(pairs, scored), home / PICTURE)
    return findings


def add_to_summary(folder: Path, findings: Findings, seconds: float) -> dict[str, object]:
    """Add the findings, and the seconds they took, to the run's summary.json and return it."""
    summary = read_summary(folder) | findings.numbers() | {"evaluation_seconds": seconds}
    write_signed_json(folder / SUMMARY, summary)
    return summary


def _as_flags(config: TrainConfig) -> EvaluateConfig:
    """The flags of `dpo_fast.evaluate` that evaluate a run as its training does."""
    return EvaluateConfig(
        policy=str(config.output_dir),
        output_dir=config.output_dir / FOLDER,
        batch_size=config.eval_batch_size,
        cache_dir=config.cache_dir,
        hub_token=config.hub_token,
    )


def _read_record(out: Path) -> dict[str, object] | None:
    """Return the record of a run's evaluation; None if there is none, or a damaged one.

    Raises BadInput if the folder holds something else, which is not deleted.
    """
    try:
        record = output_folder.read_record(out, RECORD)
    except Damaged as error:
        logger.warning("%s: the evaluation is made again", printable(str(error)))
        return None
    if record is None and output_folder.is_free(out):
        return None
    if record is None or OF_RESULT not in record:
        raise BadInput(
            f"{out} is not of this run's evaluation, which is written there: move it away, then the same command with"
            " --resume_from_checkpoint auto"
        )
    return record


def _claim(out: Path, record: dict[str, object]) -> None:
    """Claim the folder of a run's evaluation, which is held; delete the images of an earlier result or request."""
    before, there = _read_record(out), (out / RECORD).is_file()
    try:
        output_folder.read_record(out / "images", LISTING)
    except Damaged as error:
        logger.warning("%s: the evaluation is made again", printable(str(error)))
        before = None
    if there and (before is None or output_folder.differences(before, record)):
        for name in ("images", "scores"):
            if (out / name).exists():
                delete(rename_away(out / name))
        delete(out / SUMMARY)
        write_signed_json(out / RECORD, record)  # votes on the earlier images stay, and do not count any more
    output_folder.claim(out, RECORD, record, what="an evaluation")


def _samples(pairs: ImagePairs, scored: Scored) -> Image.Image:
    """Draw the largest gains by the scorer that decides beside pairs drawn at random: before, after, what changed."""
    scorer = scored.scorers[0]
    gains = extremes(scored, scorer)[0][: COLUMNS // 2]
    others = [row for row in drawn(scored) if row not in gains][: COLUMNS - len(gains)]
    groups = {f"largest gains by {scorer}, of {len(scored.prompts)} pairs": len(gains), "drawn at random": len(others)}
    rows = [*gains, *others]
    pictures = ([to_picture(files[row]) for row in rows] for files in (pairs.base, pairs.policy))
    captions = [pairs.prompts[row] for row in rows]
    return before_after(*pictures, captions, {title: columns for title, columns in groups.items() if columns})
