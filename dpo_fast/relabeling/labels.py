"""Turn the scores of pairs into labels: margins, which pairs are kept, agreement with people, and the file."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dpo_fast.checksums import Damaged, file_digest, parse_signed, signed, write_signed_json
from dpo_fast.data import BadImage, Source
from dpo_fast.data.relabelled import DIGEST, LabelDigest, check_all
from dpo_fast.errors import BadInput
from dpo_fast.files import atomic_file, read_bytes, regular_file
from dpo_fast.relabeling.pair_scores import Scores
from dpo_fast.statistics import binomial_interval

GROUP_BYTES = 64 << 20  # of images per row group of the file
NOTE = b"dpo_fast.relabel"  # the metadata key of the file's note on how it was made


@dataclass(frozen=True)
class Rule:
    """How scores become labels, and which pairs are kept."""

    weights: Mapping[str, float]  # of every scorer
    temperature: float | None  # None: hard labels
    keep_fraction: float | None
    min_margin: float | None


@dataclass(frozen=True)
class Labels:
    """The labels that a rule derives from scores, in the order of the source."""

    scale: dict[str, float]  # scorer -> what its differences were divided by
    margin: np.ndarray  # fp64 [n]
    label: np.ndarray  # fp64 [n], in [0, 1]: the probability that image 0 is the better one
    kept: np.ndarray  # bool [n]


class Agreement(NamedTuple):
    """How often a scorer and people prefer the same image; ties are counted separately."""

    rate: float | None  # None: no pair is decided by both
    low: float | None  # ends of its exact 95% confidence interval
    high: float | None
    agree: int
    disagree: int
    tied_by_people: int  # not by the scorer
    tied_by_scorer: int  # not by people
    tied_by_both: int

    def __str__(self) -> str:
        ties = f"tied by people {self.tied_by_people}, by the scorer {self.tied_by_scorer}, by both {self.tied_by_both}"
        if self.rate is None:
            return f"none is decided by both; {ties}"
        both = self.agree + self.disagree
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}], {self.agree} of {both} pairs; {ties}"


def label(scores: Scores, rule: Rule) -> Labels:
    """Compute labels from margins.

    With one scorer, the margin is weight x (score 0 - score 1). With several, it is the sum of these, each divided by
    the root mean square of the scorer's differences over these pairs. Raises BadInput if there are no scores, if a
    scorer gives both images of every pair the same score, or if no pair is kept.
    """
    if not len(scores.rows):
        raise BadInput(f"no pair can be scored: all {len(scores.bad)} have an image that cannot be decoded")
    margin, scale = np.zeros(len(scores.rows)), {}
    for name, weight in rule.weights.items():
        difference = scores.of[name][:, 0] - scores.of[name][:, 1]
        deviation = float(np.sqrt(np.mean(difference**2)))
        if deviation == 0:
            raise BadInput(f"scorer {name} gives both images of every pair the same score: leave it out")
        scale[name] = deviation if len(rule.weights) > 1 else 1.0
        margin += weight * difference / scale[name]
    if rule.temperature is None:
        labels = 0.5 + 0.5 * np.sign(margin)
    else:
        labels = 0.5 + 0.5 * np.tanh(margin / (2 * rule.temperature))  # the sigmoid, without overflow
    kept = np.ones(len(margin), dtype=bool)
    if rule.min_margin is not None:
        kept = np.abs(margin) >= rule.min_margin
        if not kept.any():
            raise BadInput(
                f"--min_margin ({rule.min_margin:g}) keeps no pair: the largest margin is {np.abs(margin).max():g}"
            )
    if rule.keep_fraction is not None:
        kept[np.argsort(-np.abs(margin), kind="stable")[max(1, round(rule.keep_fraction * len(margin))) :]] = False
    return Labels(scale, margin, labels, kept)


def agreement(difference: np.ndarray, human: np.ndarray) -> Agreement:  # [n]; above 0 or 0.5: the first image wins
    """Compare a scorer's preferences with people's."""
    scorer, people = np.sign(difference), np.sign(human - 0.5)
    decided = (scorer != 0) & (people != 0)
    agree, both = int((scorer == people)[decided].sum()), int(decided.sum())
    rate, low, high = binomial_interval(agree, both) if both else (None, None, None)
    return Agreement(
        rate,
        low,
        high,
        agree,
        both - agree,
        tied_by_people=int(((people == 0) & (scorer != 0)).sum()),
        tied_by_scorer=int(((people != 0) & (scorer == 0)).sum()),
        tied_by_both=int(((people == 0) & (scorer == 0)).sum()),
    )


def report(scores: Scores, labels: Labels, rule: Rule, human: np.ndarray | None, rows: int, bad: int) -> dict:
    """Return the counts of a source of `rows` rows, `bad` of which cannot be used. human: labels [n], or None."""
    kept, difference = labels.kept, {name: pair[:, 0] - pair[:, 1] for name, pair in scores.of.items()}
    scorers: dict[str, dict] = {}
    for name, pair in scores.of.items():
        scorers[name] = {"weight": rule.weights[name], "scale": labels.scale[name], "mean": float(pair.mean())}
        if human is not None:
            first, second = human > 0.5, human < 0.5
            winners = np.concatenate([pair[first, 0], pair[second, 1]])
            losers = np.concatenate([pair[first, 1], pair[second, 0]])
            scorers[name] |= {
                "mean_human_winner": float(winners.mean()) if len(winners) else None,
                "mean_human_loser": float(losers.mean()) if len(losers) else None,
                "agreement": agreement(difference[name], human)._asdict(),
            }
    return {
        "rows": rows,
        "bad_rows": bad,
        "scored": len(scores.rows),
        "kept": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "kept_fraction": float(kept.mean()),
        "smallest_kept_margin": float(np.abs(labels.margin[kept]).min()),
        "margin_rms": float(np.sqrt(np.mean(labels.margin**2))),
        "first_wins": int((labels.margin[kept] > 0).sum()),
        "second_wins": int((labels.margin[kept] < 0).sum()),
        "ties": int((labels.margin[kept] == 0).sum()),
        "agreement": None if human is None else agreement(labels.margin, human)._asdict(),
        "agreement_of_kept": None if human is None else agreement(labels.margin[kept], human[kept])._asdict(),
        "scorers": scorers,
        **{name: value for name, value in asdict(rule).items() if name != "weights"},
    }


def as_text(found: dict) -> str:
    """Format a report as text."""
    lines = [
        f"{found['rows']} rows, {found['bad_rows']} unusable, {found['scored']} pairs scored; kept {found['kept']}"
        f" ({found['kept_fraction']:.1%}), margins from {found['smallest_kept_margin']:.4g} on; dropped"
        f" {found['dropped']}",
        f"image 0 wins {found['first_wins']}, image 1 wins {found['second_wins']}, ties {found['ties']}",
    ]
    if found["agreement"] is not None:
        lines.append(f"agreement with the human labels {Agreement(**found['agreement'])}")
        if found["dropped"]:
            lines.append(f"agreement of those kept         {Agreement(**found['agreement_of_kept'])}")
    for name, scorer in found["scorers"].items():
        line = f"{name}: weight {scorer['weight']:g}, mean {scorer['mean']:.4g}"
        if scorer["scale"] != 1.0:
            line += f", differences divided by {scorer['scale']:.4g}"
        if scorer.get("mean_human_winner") is not None:
            line += f"; human winners {scorer['mean_human_winner']:.4g}, losers {scorer['mean_human_loser']:.4g}"
        if found["agreement"] is not None and len(found["scorers"]) > 1:
            line += f"; agreement {Agreement(**scorer['agreement'])}"
        lines.append(line)
    return "\n".join(lines)


def write_pairs(
    path: Path,
    source: Source,
    scores: Scores,
    labels: Labels,
    human: Sequence[float | None],  # of every row of the source
    note: dict,
    progress: bool,
) -> None:
    """Write the kept pairs atomically, in Pick-a-Pic's columns and the source's order, with the original image bytes.

    `note` is stored in the file, for `note_of`, as is a digest of all but the images; every page has a checksum. Raises
    BadInput if a scored row's images can no longer be read.
    """
    captions, names = source.captions(), list(scores.of)
    columns = [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("caption", pa.string())]
    columns += [("label_0", pa.float64()), ("label_human", pa.float64())]
    columns += [(f"score_{side}_{name}", pa.float64()) for name in names for side in (0, 1)]
    schema = pa.schema(columns, metadata={NOTE: signed(json.dumps(note))})
    places = np.flatnonzero(labels.kept).tolist()
    packing = {name: "none" if name.startswith("jpg_") else "snappy" for name, _ in columns}
    options = {"compression": packing, "write_page_checksum": True}
    with atomic_file(path) as temporary, pq.ParquetWriter(os.path.abspath(temporary), schema, **options) as file:
        whole = LabelDigest()
        group: dict[str, list] = {name: [] for name, _ in columns}
        size = 0
        bar = tqdm(places, desc="Writing pairs", unit=" pairs", disable=not progress)
        for number, place in enumerate(bar, start=1):
            row = int(scores.rows[place])
            try:
                images = source.image_bytes(row)
            except BadImage as error:
                raise BadInput(f"row {row}: {error}, though it was scored: the pairs changed meanwhile") from error
            scored = [scores.of[name][place, side] for name in names for side in (0, 1)]
            values = (*images, captions[row], labels.label[place], human[row], *scored)
            for column, value in zip(group.values(), values, strict=True):
                column.append(value)
            whole.update(values[len(images) :])
            size += sum(map(len, images))
            if size >= GROUP_BYTES or number == len(places):
                file.write_table(pa.table(group, schema=schema))
                group, size = {name: [] for name in group}, 0
        file.add_key_value_metadata({DIGEST: whole.hexdigest()})


def note_of(path: Path) -> dict | None:
    """Return the note in a file of `write_pairs`, None for any other file. Raises Damaged if the note has changed."""
    regular_file(path)
    try:
        metadata = pq.read_schema(os.path.abspath(path)).metadata or {}
    except (OSError, ValueError, pa.ArrowException):
        return None
    if NOTE not in metadata:
        return None
    try:
        note = parse_signed(metadata[NOTE], required=False)
        if not isinstance(note, dict):
            raise ValueError("its note is no object")
        return note
    except ValueError as error:
        raise Damaged(
            f"{path} is damaged ({error}): --overwrite writes it again from the scores that were kept"
        ) from error


def check_output(path: Path) -> None:
    """Raise Damaged if the file of pairs is not what was written.

    It is checked by the checksum in the report beside it or, if there is no complete report (a process was killed
    before writing it), by the checksums in the file.
    """
    try:
        report = parse_signed(read_bytes(path.with_suffix(".json")))
    except (OSError, ValueError):
        report = {}
    if not isinstance(report, dict) or "checksum" not in report:
        check_all(path)
    elif file_digest(path) != report["checksum"]:
        raise Damaged(
            f"{path} is damaged (its checksum is not the one in {path.with_suffix('.json').name}): --overwrite writes"
            " it again from the scores that were kept"
        )


def write_counts(path: Path, found: dict) -> None:
    """Write the counts beside the file of pairs, with its checksum."""
    write_signed_json(path.with_suffix(".json"), {**found, "checksum": file_digest(path)})


def human_labels(source: Source) -> list[float]:
    """Return the stored labels, NaN where a row has none or its two labels disagree."""
    return [math.nan if value is None or isinstance(value, dict) else float(value) for value in source.labels()]
