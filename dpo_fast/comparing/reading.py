"""What a run or an evaluation says of itself, as far as its files can be read; what is missing is said in words.

RUN/config.yaml  summary.json  metrics.jsonl  validation.jsonl  scores.parquet     also RUN/pick of dpo_fast.pick
EVALUATION/summary.json  scores.parquet

Nothing that these files name elsewhere is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_fast.comparing.folders import Place
from dpo_fast.comparing.logs import Curve, Log, read_log
from dpo_fast.comparing.settings import Settings, read_settings, settings_of
from dpo_fast.comparing.sweeps import CONFIG
from dpo_fast.comparing.untrusted import (
    LARGEST_NUMBER,
    count,
    interval,
    mapping,
    number,
    read_object,
    share,
    texts,
    words,
)
from dpo_fast.errors import BadInput, one_line
from dpo_fast.evaluation.findings import SUMMARY
from dpo_fast.evaluation.scored import SCORES, Scored, read_scores
from dpo_fast.hub_revisions import NOT_FETCHED, NOT_READABLE
from dpo_fast.statistics import Interval, median_of_prompt
from dpo_fast.training.metrics import LOGS

METRICS, VALIDATION = LOGS
LOSS, ACCURACY, HELD_OUT, MARGIN = "loss", "implicit_accuracy", "validation_accuracy", "margin"  # in these logs
_TOLERANCE = 1e-9  # relative, of a mean over images that was computed in another order


@dataclass(frozen=True)
class Judged:
    """One scorer's verdict in an evaluation."""

    win_rate: Interval
    gain: Interval | None  # mean of policy minus base
    base: float | None  # means over images
    policy: float | None


@dataclass(frozen=True)
class Signal:
    """One sign of over-optimisation."""

    base: float | None  # None: the measure itself compares policy and base
    difference: Interval  # policy minus base; of a distance the distance


@dataclass(frozen=True)
class Evaluation:
    """A comparison of a policy with its base: the numbers, and what they rest on."""

    judged: dict[str, Judged]  # by scorer, the one that leads first
    prompts: int | None
    images: int | None  # of each side
    medians: bool  # medians of each prompt's images are compared, not image by image
    settings: dict[str, str]  # how the images were made; empty: not known
    baseline: frozenset[str]  # revisions of the files of the base; empty: not known
    provenance: dict[str, dict[str, Any]]  # of each scorer: its files, dtype, ...
    signals: dict[str, Signal]
    warnings: list[str]
    scored: Scored | None  # the scores of each image; None: cannot be read


@dataclass(frozen=True)
class Entry:
    """A run, or an evaluation of a policy; values that are not known are None."""

    name: str
    folder: Path
    kind: str  # run, evaluation, unknown
    settings: Settings | None = None
    steps: int | None = None  # done
    pairs: int | None = None  # trained on, repeated ones counted again
    loss: float | None = None  # last logged
    accuracy: float | None = None  # implicit, on training pairs, last logged
    held_out: Interval | float | None = None  # implicit accuracy on held-out pairs
    held_out_of: str | None = None  # which pairs these are
    seconds: float | None = None  # of training
    overoptimised_at: int | None = None  # step
    result_of: int | None = None  # step whose weights are the result, where training was ended early
    strength: float | None = None  # of what was trained, where one was picked
    evaluation: Evaluation | None = None
    curves: dict[str, Curve] = field(default_factory=dict)  # metric -> values over the steps
    missing: list[str] = field(default_factory=list)  # what is missing, in words
    finished: bool = False


def read_entry(place: Place) -> Entry:
    """Read a run or an evaluation. Nothing is raised for what is missing or damaged: the entry says it."""
    missing = list(place.missing)
    if place.kind == "unknown":
        return Entry(place.name, place.folder, place.kind, missing=missing)
    read = _run if place.kind == "run" else _evaluation
    try:
        return read(place, missing)
    except OSError as error:
        missing.append(f"it cannot be read ({error.strerror or error})")
        return Entry(place.name, place.folder, place.kind, missing=missing)


def _run(place: Place, missing: list[str]) -> Entry:
    folder = place.folder
    settings = None
    try:
        settings = read_settings(folder / CONFIG)
    except BadInput as error:
        missing.append(one_line(error))
    metrics = _log(folder / METRICS, (LOSS, ACCURACY, MARGIN), missing)
    validation = _log(folder / VALIDATION, (HELD_OUT,), missing)
    summary = _summary(folder, missing)
    wanted = count(settings["max_train_steps"]) if settings else None
    if summary is None:
        done = metrics.step
        at = "before its first step" if done is None else f"at step {done}" + (f" of {wanted}" if wanted else "")
        missing.append(f"unfinished: {at}")
        summary = {"steps": done, "loss_last": metrics.last.get(LOSS), ACCURACY: metrics.last.get(ACCURACY)}
        if HELD_OUT in validation.curves:
            summary[HELD_OUT] = validation.curves[HELD_OUT][-1].value
        finished = False
    else:
        finished = True
    per_step = count(settings["pairs_per_step"]) if settings else None
    steps, pairs = count(summary.get("steps")), count(summary.get("pairs_seen"))
    held_out = number(summary.get(HELD_OUT))
    return Entry(
        place.name,
        folder,
        place.kind,
        settings,
        steps=steps,
        pairs=steps * per_step if pairs is None and None not in (steps, per_step) else pairs,
        loss=number(summary.get("loss_last")),
        accuracy=number(summary.get(ACCURACY)),
        held_out=share(held_out, summary.get(f"{HELD_OUT}_ci95")) or held_out,
        held_out_of=None if held_out is None or settings is None else _own_pairs(settings),
        seconds=number(summary.get("seconds")),
        overoptimised_at=count(summary.get("overoptimised_at")),
        result_of=count(mapping(summary.get("ended_early")).get("result_of")),
        strength=number(summary.get("strength")),
        evaluation=_comparison(folder, summary, missing) if "win_rate" in summary else None,
        curves=metrics.curves | validation.curves,
        missing=missing,
        finished=finished,
    )


def _own_pairs(settings: Settings) -> str:
    """Which pairs a run holds out: those of a share of the captions, drawn with the seed."""
    return f"{settings['validation_fraction']} of the captions of {settings['dataset_name']}, seed {settings['seed']}"


def _evaluation(place: Place, missing: list[str]) -> Entry:
    summary = _summary(place.folder, missing)
    finished = summary is not None
    if summary is None:
        missing.append("unfinished: the command that began it goes on")
        summary = {}
    settings = settings_of(summary["run"]) if isinstance(summary.get("run"), dict) else None
    steps, per_step = (count(settings[name]) if settings else None for name in ("max_train_steps", "pairs_per_step"))
    steps = count(summary.get("step", steps))
    implicit = mapping(summary.get("implicit"))
    held_out = number(implicit.get(ACCURACY))
    files = texts(mapping(implicit.get("files")).get("pairs"))
    pairs = ", ".join(f"{name} @ {revision}" for name, revision in files.items())
    return Entry(
        place.name,
        place.folder,
        place.kind,
        settings,
        steps=steps,
        pairs=None if None in (steps, per_step) else steps * per_step,
        strength=number(summary.get("strength")),
        held_out=share(held_out, implicit.get(f"{ACCURACY}_ci95")) or held_out,
        held_out_of=None if held_out is None else f"{count(implicit.get('draws'))} draws of {pairs}",
        evaluation=_comparison(place.folder, summary, missing) if "win_rate" in summary else None,
        missing=missing,
        finished=finished,
    )


def _log(path: Path, metrics: tuple[str, ...], missing: list[str]) -> Log:
    if not path.is_file():
        return Log({})
    try:
        log = read_log(path, metrics)
    except BadInput as error:
        missing.append(one_line(error))
        return Log({})
    if log.unusable:
        missing.append(f"{path.name} has {log.unusable} lines that are no metrics of a later step: left out")
    return log


def _summary(folder: Path, missing: list[str]) -> dict[str, Any] | None:
    """A summary.json; None where there is none, or it is damaged."""
    if not (folder / SUMMARY).is_file():
        return None
    try:
        return read_object(folder / SUMMARY)
    except BadInput as error:
        missing.append(one_line(error))
        return None


def _comparison(folder: Path, summary: Mapping[str, Any], missing: list[str]) -> Evaluation | None:
    judged = {}
    for name, of in mapping(summary.get("scores")).items():
        of = mapping(of)
        rate, gain = mapping(of.get("win_rate")), mapping(of.get("gain"))
        win_rate = share(rate.get("rate"), (rate.get("low"), rate.get("high")))
        if win_rate is not None:
            difference = interval(gain.get("value"), (gain.get("low"), gain.get("high")))
            judged[name] = Judged(win_rate, difference, number(of.get("base")), number(of.get("policy")))
    if not judged:
        missing.append(f"{SUMMARY} says nothing of any scorer")
        return None
    signals = {}
    for name, of in mapping(summary.get("signals")).items():
        of = mapping(of)
        change = mapping(of.get("difference"))
        difference = interval(change.get("value"), (change.get("low"), change.get("high")))
        if difference is not None:
            signals[name] = Signal(number(of.get("base")), difference)
    about = mapping(summary.get("about"))
    medians = summary.get("medians_compared") is True
    return Evaluation(
        judged,
        prompts=count(summary.get("prompts")),
        images=count(summary.get("images")),
        medians=medians,
        settings=texts(summary.get("settings") or about.get("settings")),
        baseline=frozenset(texts(mapping(summary.get("models")).get("base")).values()) - {NOT_FETCHED, NOT_READABLE},
        provenance={name: mapping(of) for name, of in mapping(summary.get("scorers")).items()},
        signals=signals,
        warnings=words(summary.get("warnings")),
        scored=_scores(folder, judged, medians, missing),
    )


def _scores(folder: Path, judged: Mapping[str, Judged], medians: bool, missing: list[str]) -> Scored | None:
    """The scores of an evaluation's images, if they are those that its summary is of."""
    if not (folder / SCORES).is_file():
        missing.append(f"no {SCORES}: its images are not compared with those of others")
        return None
    try:
        scored = read_scores(folder / SCORES)
    except BadInput as error:
        missing.append(one_line(error))
        return None
    largest = max(values.abs().max().item() for side in (scored.base, scored.policy) for values in side.values())
    if largest > LARGEST_NUMBER:
        missing.append(f"{SCORES} holds a score of size {largest:.3g}, which no scorer gives: it is not used")
        return None
    for name, of in judged.items():
        for side, mean in ((scored.base, of.base), (scored.policy, of.policy)):
            values = side.get(name)
            if values is None or (mean is not None and not _is_mean(mean, values, scored.prompts if medians else None)):
                missing.append(f"{SCORES} is not of the evaluation in {SUMMARY} ({name}): evaluate again")
                return None
    return scored


def _is_mean(mean: float, values: torch.Tensor, prompts: list[str] | None) -> bool:  # fp64 [N]
    """Whether `mean` is that of the values, or with `prompts` that of each prompt's median."""
    found = (values if prompts is None else median_of_prompt(values, prompts)).mean().item()
    return abs(found - mean) <= _TOLERANCE * max(1.0, abs(mean), values.abs().max().item())
