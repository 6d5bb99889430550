"""`python -m dpo_fast.sweep --beta_dpo 500,2000,5000 --learning_rate 1e-5,3e-5 FLAGS`: a run for every combination.

Any number or choice among the flags of `python -m dpo_fast.train` may be a list with commas. The runs go one after
another on the same caches (with --cached_reference they also share the reference's errors), each into
OUTPUT_DIR/<its values>. At the end: a table, OUTPUT_DIR/sweep.json and OUTPUT_DIR/sweep.png. The same command again
repeats no finished run and goes on with an interrupted one. Exit status: 0 done, 2 bad input or a run that ended with
2 (the others are run all the same), 130 interrupted.
"""

import itertools
import math
import secrets
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from dpo_fast import locks, output_folder
from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.cli import guarded, leave, say, unhurried
from dpo_fast.command_line import defaults_of, parse
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput, printable
from dpo_fast.help_text import Page, asks_help, show_help
from dpo_fast.pictures import save_png
from dpo_fast.plot import Point, Series, against

RECORD = "sweep.json"
LOG_SCALE = ("learning_rate", "beta_dpo", "adam_epsilon", "adam_weight_decay")

# What the plot shows: the first of these that the runs have. (key in summary.json, its interval, title, even chance)
MEASURES = (
    ("win_rate", "win_rate_ci95", "win rate over the base, 95% intervals", 0.5),
    ("validation_accuracy", "validation_accuracy_ci95", "held-out implicit accuracy, 95% intervals", 0.5),
    ("implicit_accuracy", None, "implicit accuracy on training pairs, last logged steps", 0.5),
)

OF_ONE_RUN = ("overwrite", "resume_from_checkpoint", "dry_run", "push_to_hub")  # flags that a sweep refuses
TEXTS = {
    "output_dir": "Folder of the sweep, with a folder for each run; None: runs/sweep-<time>.",
    "seed": "Everything random follows from it; None: drawn once, the same for all runs, and recorded.",
}

Values = dict[str, str]  # flag -> value, as given


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(argv),
        argv=argv,
        kept="finished runs stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(argv: list[str]) -> int:
    if asks_help(argv):
        _help(argv)
    swept, flags = split(argv)
    combinations = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    configs = [parse([*flags, *_as_flags(values)])[0] for values in combinations]  # refused before the first run
    for name in OF_ONE_RUN:
        if getattr(configs[0], name):
            raise BadInput(f"--{name} belongs to a single run: leave it out of a sweep, which goes on by itself")
    folder = configs[0].output_dir or Path("runs", f"sweep-{datetime.now():%Y%m%d-%H%M%S}")
    rows, started = [], time.perf_counter()
    with output_folder.hold(folder):
        flags = _begin(folder, flags, seeded="seed" in swept or configs[0].seed is not None)
        for number, values in enumerate(combinations):
            rows.append({**values, **_result(folder, values, flags, f"run {number + 1} of {len(combinations)}")})
            write_signed_json(folder / RECORD, {"flags": flags, "swept": swept, "runs": rows})
        print(table(rows, list(swept)))
        if (picture := plot(rows, list(swept))) is not None:
            save_png(picture, folder / "sweep.png")
            print(f"\n{folder / 'sweep.png'}, {folder / RECORD}; {time.perf_counter() - started:.0f} s")
    return 2 if any(row["status"] for row in rows) else 0


def split(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The swept flags with their values, in their order, and all other words of a command line.

    Raises BadInput where nothing is swept, a flag is swept twice, or a value recurs.
    """
    swept, rest = _split(argv)
    if not swept:
        raise BadInput("nothing is swept: give a flag several values, as in --beta_dpo 500,2000,5000")
    return swept, rest


def _split(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    swept: dict[str, list[str]] = {}
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in _SCALARS:
            given = value if equals else words[0] if words else ""
            if "," in given:
                words = words if equals else words[1:]
                values = [part for part in given.split(",") if part]
                if name in swept or len(set(values)) < len(values):
                    raise BadInput(f"--{name} {given}: give each flag once and each of its values once")
                swept[name] = values
                continue
        rest.append(word)
    return swept, rest


def _scalar_flags() -> frozenset[str]:
    """The flags whose value is a number or a choice."""
    names = []
    for name, hint in typing.get_type_hints(TrainConfig).items():
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not types.NoneType]
        choices = [typing.get_origin(kind) is typing.Literal for kind in kinds]
        if any(choices) or all(kind in (int, float) for kind in kinds):
            names.append(name)
    return frozenset(names)


_SCALARS = _scalar_flags()


def _help(argv: Sequence[str]) -> NoReturn:
    """Print the flags that a sweep takes, with the defaults of the preset that `argv` names, and exit."""
    page = Page(
        prog="python -m dpo_fast.sweep",
        flags=TrainConfig,
        what="A training run for every combination of the values of some flags.\n\n" + __doc__.partition("\n\n")[2],
        about=f"""A flag with `[,...]` may be a list; the other flags hold for every run. A run is one process. These
        flags of training are refused, since they belong to a single run: --{", --".join(OF_ONE_RUN)}.""",
        usage="--FLAG VALUE,VALUE,... [--FLAG VALUE ...]",
        only=[field.name for field in fields(TrainConfig) if field.name not in (*OF_ONE_RUN, "hub_model_id")],
        texts=TEXTS,
        lists=_SCALARS,
    )
    show_help(page, *defaults_of(_split(argv)[1]))


def _as_flags(values: Values) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def _name(values: Values) -> str:
    """The folder of a run."""
    return "-".join(f"{name}={value}" for name, value in values.items())


def _begin(folder: Path, flags: list[str], seeded: bool) -> list[str]:
    """The flags of all runs, with a seed; as they were before, where the sweep goes on."""
    before = output_folder.read_record(folder, RECORD, ["flags"])
    if not seeded:
        flags = [*flags, *(before["flags"][-2:] if before else ("--seed", str(secrets.randbits(31))))]
    new = {"flags": flags, "swept": {}, "runs": []}
    output_folder.claim(folder, RECORD, new, what="a sweep", key="flags")
    return flags


def _result(folder: Path, values: Values, flags: list[str], which: str) -> dict[str, object]:
    """What came of a run, which is trained where it is not finished."""
    home = folder / _name(values)
    command = [*flags, *_as_flags(values), "--output_dir", str(home), "--resume_from_checkpoint", "auto"]
    with locks.hold(home, otherwise="wait until it is done", waiting=say):
        pass  # the run of a sweep that was killed may still be training
    if not _finished(home, parse(command)[0]):
        say(f"{which}: {_name(values)}")
        status = _train(command)
        if status == 130:
            raise KeyboardInterrupt
        if status not in (0, 2):
            raise RuntimeError(f"{home} ended with {status}")
        if status:
            return {"status": status}
    return {"status": 0, **_summary(home)}


def _train(command: list[str]) -> int:
    """Run a training to its end and return its exit status; an interruption is passed on, and waited for: it saves."""
    run = subprocess.Popen([sys.executable, "-m", "dpo_fast.train", *command])
    try:
        return run.wait()
    except KeyboardInterrupt as error:
        unhurried()
        if str(error):  # a signal to this process alone; Ctrl-C reaches both
            run.send_signal(signal.SIGTERM)
        run.wait()
        raise


def _finished(home: Path, config: TrainConfig) -> bool:
    """Whether a run wrote all that was asked for."""
    if not (home / "summary.json").is_file():
        return False
    return "win_rate" in _summary(home) or not config.eval_scorers


def _summary(home: Path) -> dict[str, object]:
    """A run's summary.json. Raises BadInput where it is damaged."""
    again = f"delete the folder {home}, and the same command trains that run again"
    return read_signed_json(home / "summary.json", again, ["loss_last", "seconds"])


def table(rows: Sequence[dict], swept: Sequence[str]) -> str:
    """A line a run: its values, what it measured, and what it took."""
    shown = [*swept, *(key for key, *_ in MEASURES if any(row.get(key) is not None for row in rows))]
    shown += ["loss_last", "seconds"]
    intervals = {key: interval for key, interval, *_ in MEASURES}
    cells = [shown]
    for row in rows:
        line = []
        for key in shown:
            value, interval = row.get(key), row.get(intervals.get(key) or "")
            text = printable(value) if isinstance(value, str) else "-" if value is None else f"{value:.4g}"
            line.append(text + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""))
        cells.append(line)
    widths = [max(len(line[column]) for line in cells) for column in range(len(shown))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row, number in zip(rows, range(1, len(lines)), strict=True):
        if row["status"]:
            lines[number] += f"  (ended with {row['status']})"
    return "\n".join(lines)


def plot(rows: Sequence[dict], swept: Sequence[str]):
    """The measure against the first swept flag, a line for every combination of the others; None: nothing measured."""
    measured = [m for m in MEASURES if any(row.get(m[0]) is not None for row in rows)]
    if not measured:
        return None
    key, interval, title, even = measured[0]
    axis, *others = swept
    texts = list(dict.fromkeys(row[axis] for row in rows))
    try:
        place = {text: float(text) for text in texts}
    except ValueError:  # choices stand side by side
        place = {text: float(number) for number, text in enumerate(texts)}
    log_x = axis in LOG_SCALE and all(x > 0 for x in place.values())
    series: dict[str, Series] = {}
    for row in rows:
        value = row.get(key)
        if value is None or not math.isfinite(value):
            continue
        name = ", ".join(f"{other} {row[other]}" for other in others)
        low, high = row.get(interval or "") or (None, None)
        series.setdefault(name, Series(name, [])).points.append(Point(place[row[axis]], value, low, high))
    ticks = [(x, text) for text, x in place.items()]
    return against(list(series.values()), ticks, title=title, x_label=axis, log_x=log_x, even=even)


if __name__ == "__main__":
    leave(main())
