"""An evaluation read back from its folder: its pairs of images, to vote on, and its findings, to report them again.

Nothing is generated, scored or measured again.
"""

from dataclasses import dataclass
from pathlib import Path

from dpo_fast import output_folder
from dpo_fast.checksums import Damaged, read_signed_json
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.findings import RECORD, SUMMARY, About, Findings, judge
from dpo_fast.evaluation.generation import LISTING
from dpo_fast.evaluation.image_names import PromptImage, file_stem, images_of
from dpo_fast.evaluation.implicit import ImplicitAccuracy
from dpo_fast.evaluation.pairing import ImagePairs, pair_up
from dpo_fast.evaluation.prompts import Prompt
from dpo_fast.evaluation.scored import SCORES, Scored, read_scores
from dpo_fast.evaluation.signals import Signal
from dpo_fast.files import user_path
from dpo_fast.statistics import Interval

AGAIN = "evaluate again"
IMAGES = "images"  # in an evaluation's folder: the generated ones
OF_RUN = "evaluation"  # the folder, in a run's, of the evaluation that ended it


@dataclass(frozen=True)
class Reopened:
    """What an evaluation's folder holds."""

    findings: Findings  # without people's votes
    scored: Scored
    pairs: ImagePairs  # in the order of `scored`
    implicit: ImplicitAccuracy | None


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is that of an evaluation of images that is done."""
    return (folder / RECORD).is_file() and (home_of(folder) / SCORES).is_file()


def home_of(folder: Path) -> Path:
    """Where an evaluation's scores and report are: in its folder or, where it ended a run, in the run's."""
    of_run = folder.name == OF_RUN and not (folder / SCORES).is_file() and (folder.parent / SCORES).is_file()
    return folder.parent if of_run else folder


def names_of(folder: Path) -> tuple[str, str]:
    """The names of an evaluation's two sides, the baseline's first. Raises Damaged."""
    record = output_folder.read_record(folder, RECORD, ("baseline", "policy"))
    return record["baseline"]["name"], record["policy"]["name"]


def is_scored(folder: Path) -> bool:
    """Whether an evaluation that is done has a report. Raises Damaged."""
    return "about" in read_signed_json(folder / SUMMARY, AGAIN)


def pairs_of(folder: Path) -> ImagePairs:
    """The pairs of images that an evaluation compared, in the order of its scores.parquet.

    Raises Damaged, a BadInput, if the folder's files cannot be read, and BadInput if a folder of images that it was
    compared with is gone, or no longer gives the same pairs.
    """
    return _pairs(folder, read_scores(home_of(folder) / SCORES, unscored=True))


def reopen(folder: Path) -> Reopened:
    """Read back an evaluation. Raises as `pairs_of`."""
    summary = read_signed_json(folder / SUMMARY, AGAIN, ("about", "signals", "medians_compared", "resamples"))
    scored = read_scores(home_of(folder) / SCORES)
    try:
        signals = [Signal(**{**of, "difference": Interval(**of["difference"])}) for of in summary["signals"].values()]
        about = About(**summary["about"])
        implicit = ImplicitAccuracy.from_summary(summary["implicit"]) if "implicit" in summary else None
        medians, resamples = bool(summary["medians_compared"]), int(summary["resamples"])
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise Damaged(f"{folder / SUMMARY} is not as this version writes it ({error}): {AGAIN}") from error
    findings = judge(scored, signals, about, compare_medians=medians, resamples=resamples)
    return Reopened(findings, scored, _pairs(folder, scored), implicit)


def _pairs(folder: Path, scored: Scored) -> ImagePairs:
    record = output_folder.read_record(folder, RECORD, ("baseline", "policy", "seeds"))
    listing = output_folder.read_record(folder / IMAGES, LISTING, ("settings",))
    generated = {} if listing is None else listing["settings"]["models"]
    seeds: dict[str, list[int]] = {}
    for prompt, seed in zip(scored.prompts, scored.seeds, strict=True):
        seeds.setdefault(prompt, []).append(seed)
    sides = []
    for side in (record["baseline"], record["policy"]):
        if side["name"] in generated:
            home = folder / IMAGES / side["name"]
            images = {
                text: [PromptImage(home / f"{file_stem(text)}-{seed}.png", seed) for seed in of]
                for text, of in seeds.items()
            }
        else:
            home = user_path(side["of"])
            if not home.is_dir():
                raise BadInput(
                    f"{folder}: the images of {side['name']} were in {side['of']}, which is not there: put them back,"
                    " or start the command where the evaluation was started"
                )
            images = images_of(home, list(seeds)).images
        sides.append(images)
    categories = scored.categories or [None] * len(scored.prompts)
    category_of = dict(zip(scored.prompts, categories, strict=True))
    prompts = [Prompt(text, "", category) for text, category in category_of.items()]
    found = pair_up(
        prompts,
        None if record["seeds"] == "all" else seeds,
        *sides,
        (record["baseline"]["name"], record["policy"]["name"]),
    )
    if (found.prompts, found.seeds) != (scored.prompts, scored.seeds):
        raise BadInput(f"{folder}: the folders of images no longer give the pairs that were scored: {AGAIN}")
    return found
