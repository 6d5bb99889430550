"""Which runs and evaluations the named folders hold: a sweep holds several runs."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_fast.checksums import Damaged
from dpo_fast.comparing.sweeps import CONFIG, SWEEP, run_name
from dpo_fast.comparing.untrusted import read_object
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.findings import RECORD
from dpo_fast.files import contents, is_inside
from dpo_fast.jobs import ending

_NO_RUN = f"no run, sweep or evaluation: it has none of {CONFIG}, {SWEEP} and {RECORD}"


class Place(NamedTuple):
    """A folder that becomes a row."""

    folder: Path
    kind: str  # run, evaluation, or unknown
    name: str = ""  # in the tables
    missing: tuple[str, ...] = ()  # what is known to be wrong with it, in words


def places_of(folders: Iterable[Path]) -> list[Place]:
    """The runs and evaluations in `folders`, each once, with distinct names."""
    places: dict[str, Place] = {}
    for folder in folders:
        for place in _inside(Path(folder)):
            places.setdefault(os.path.realpath(place.folder), place)
    names = distinct_names([place.folder for place in places.values()])
    return [place._replace(name=name) for place, name in zip(places.values(), names, strict=True)]


def refuse_unknown(places: Sequence[Place]) -> None:
    """Raise BadInput if there is no run and no evaluation at all, for then the folders are not what was meant."""
    if all(place.kind == "unknown" for place in places):
        shown = ", ".join(str(place.folder) for place in places)
        raise BadInput(f"{shown}: {places[0].missing[0]}; name folders of dpo_fast.train, sweep or evaluate")


def _inside(folder: Path) -> list[Place]:
    try:
        if not folder.is_dir():
            return [Place(folder, "unknown", missing=("it is no folder",))]
        if (folder / SWEEP).is_file():
            return _runs_of_sweep(folder)
        if (folder / CONFIG).is_file():
            return [Place(folder, "run")]
        if (folder / RECORD).is_file():
            return [Place(folder, "evaluation")]
        inside = [entry.name for entry in sorted(contents(folder)) if (entry / CONFIG).is_file()]
    except OSError as error:
        return [Place(folder, "unknown", missing=(f"it cannot be read ({error.strerror or error})",))]
    hint = f"; there are runs in it, such as {folder / inside[0]}" if inside else ""
    return [Place(folder, "unknown", missing=(_NO_RUN + hint,))]


def _runs_of_sweep(folder: Path) -> list[Place]:
    """The runs that a sweep recorded, in its order, and then those that are in its folder all the same."""
    places: dict[str, Place] = {}
    missing = []
    try:
        record = read_object(folder / SWEEP)
    except Damaged as error:
        record, missing = {}, [str(error)]
    swept, rows = record.get("swept"), record.get("runs")
    for row in rows if isinstance(rows, list) and isinstance(swept, dict) else ():
        values = {name: row.get(name) for name in swept} if isinstance(row, dict) else {}
        name = run_name(values)
        if not all(isinstance(value, str) for value in values.values()) or not is_inside(name) or "/" in name:
            missing.append(f"{folder / SWEEP} lists a run that is none of its own")
            continue
        status = row.get("status")
        ended = () if status == 0 or not isinstance(status, int) else (f"it {ending(status)}",)
        kind = "run" if (folder / name / CONFIG).is_file() else "unknown"
        places[name] = Place(folder / name, kind, missing=ended or (() if kind == "run" else (_NO_RUN,)))
    for entry in sorted(contents(folder)):
        if entry.name not in places and (entry / CONFIG).is_file():
            places[entry.name] = Place(entry, "run")
    if missing or not places:
        missing = missing or ["the sweep has no run yet"]
        return [*places.values(), *(Place(folder, "unknown", missing=(line,)) for line in missing[:1])]
    return list(places.values())


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: as many of its last parts as tell it from the others."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    names = []
    for one in parts:
        number = 1
        while number < len(one) and sum(other[-number:] == one[-number:] for other in parts) > 1:
            number += 1
        names.append("/".join(one[-number:]))
    return names
