"""`python -m dpo_fast.sweep --beta_dpo 500,2000,5000 --learning_rate 1e-5,3e-5 FLAGS`: a run for every combination.

Any number or choice among the flags of `python -m dpo_fast.train` may be a list with commas. The runs share the same
caches (with --cached_reference also the reference's errors); each goes into OUTPUT_DIR/<its values>. They go one after
another; with --gpus or --parallel several go at once, and what each prints goes into OUTPUT_DIR/<its values>.log.

At the end: a table (that of `python -m dpo_fast.compare OUTPUT_DIR`), OUTPUT_DIR/sweep.json and OUTPUT_DIR/sweep.png.
The same command again, with any --gpus and --parallel, repeats no finished run and goes on with interrupted ones. A run
that fails stops no other. Exit status: 0 done, 2 bad input or a run that ended with 2, 1 a run that ended otherwise,
130 interrupted.
"""

import itertools
import math
import os
import secrets
import shutil
import sys
import time
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from tqdm.auto import tqdm

from dpo_fast import locks, output_folder
from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.cli import guarded, leave, say
from dpo_fast.command_line import defaults_of, parse
from dpo_fast.comparing.sweeps import SWEEP, run_name
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.help_text import Page, asks_help, show_help, without_help
from dpo_fast.jobs import Job, ending, last_words, run_jobs
from dpo_fast.pictures import save_png
from dpo_fast.plot import Point, Series, against

MOST_AT_ONCE = 1024
QUIET_SECONDS = 10.0  # between two updates of a progress bar in a log
LOOK_SECONDS = 1.0  # between two looks at the logs of the runs that go on
LOG_SCALE = ("learning_rate", "beta_dpo", "adam_epsilon", "adam_weight_decay")

# What the plot shows: the first of these that the runs have. (key in summary.json, its interval, title, even chance)
MEASURES = (
    ("win_rate", "win_rate_ci95", "win rate over the base, 95% intervals", 0.5),
    ("validation_accuracy", "validation_accuracy_ci95", "held-out implicit accuracy, 95% intervals", 0.5),
    ("implicit_accuracy", None, "implicit accuracy on training pairs, last logged steps", 0.5),
)

OF_ONE_RUN = ("overwrite", "resume_from_checkpoint", "dry_run", "push_to_hub")  # flags that a sweep refuses
OWN = {  # flags of the sweep itself: kind of value, sentence
    "gpus": ("INT ...", "A run on each of these GPUs, counted among those that this command sees."),
    "parallel": (
        "INT",
        "Runs at once: with GPUs in turn on all of them, or on those of --gpus; without, each on its part of the CPU.",
    ),
}
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
    at_once, gpus, argv = own_flags(argv)
    swept, flags = split(argv)
    combinations = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    configs = [parse([*flags, *_as_flags(values)])[0] for values in combinations]  # refused before the first run
    for name in OF_ONE_RUN:
        if getattr(configs[0], name):
            raise BadInput(f"--{name} belongs to a single run: leave it out of a sweep, which goes on by itself")
    slots = slots_of(at_once, gpus)
    folder = configs[0].output_dir or Path("runs", f"sweep-{datetime.now():%Y%m%d-%H%M%S}")
    started = time.perf_counter()
    with output_folder.hold(folder):
        flags = _begin(folder, flags, seeded="seed" in swept or configs[0].seed is not None)
        rows = _Sweep(folder, flags, swept, combinations, slots).run()
        print(f"\n{_table(folder, combinations)}")
        if (picture := plot(rows, list(swept))) is not None:
            save_png(picture, folder / "sweep.png")
            print(f"\n{folder / 'sweep.png'}, {folder / SWEEP}; {time.perf_counter() - started:.0f} s")
    statuses = {row["status"] for row in rows}
    return 0 if statuses == {0} else 2 if statuses <= {0, 2} else 1


def own_flags(argv: Sequence[str]) -> tuple[int | None, list[int], list[str]]:
    """The values of --parallel (None: not given) and --gpus, and all other words of a command line.

    Raises BadInput for what is no number of runs or GPUs.
    """
    at_once, gpus, rest = _own_words(argv)
    if at_once is not None and not (at_once.isdecimal() and 1 <= int(at_once) <= MOST_AT_ONCE):
        raise BadInput(f"--parallel ({at_once}) must be the number of runs at once, 1 to {MOST_AT_ONCE}")
    if not all(gpu.isdecimal() for gpu in gpus) or len(set(map(int, gpus))) < len(gpus):
        raise BadInput(f"--gpus ({' '.join(gpus)}) must name GPUs by their numbers, each once, as in --gpus 0 1 2")
    return None if at_once is None else int(at_once), [int(gpu) for gpu in gpus], rest


def _own_words(argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    at_once: str | None = None
    gpus: list[str] = []
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--parallel":
            at_once = value if equals else words.pop(0) if words else ""
        elif name == "--gpus":
            named = [value] if equals else []
            while not equals and words and not words[0].startswith("--"):
                named.append(words.pop(0))
            gpus += [part for one in named for part in one.split(",") if part] or [""]
        else:
            rest.append(word)
    return at_once, gpus, rest


def slots_of(at_once: int | None, gpus: Sequence[int]) -> list[dict[str, str]]:
    """The environment variables of each run at once: its GPU, or its share of the CPU's threads.

    Raises BadInput for a GPU that is not there.
    """
    if not gpus and (at_once or 1) == 1:
        return [{}]
    import torch  # the count of GPUs needs it, and takes seconds

    number = torch.cuda.device_count()
    if unseen := [gpu for gpu in gpus if gpu >= number]:
        there = f"this machine has {number}" if number else "this machine has none: leave it out, or give --parallel N"
        raise BadInput(f"--gpus {unseen[0]}: there is no such GPU ({there})")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(gpu) for gpu in range(number)]
    chosen = [visible[gpu].strip() for gpu in (gpus or range(number))]
    size = at_once or len(chosen)
    threads = max(1, _cores() // size)
    shared = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": f"{QUIET_SECONDS:g}"} if size > 1 else {}
    shared = {name: os.environ.get(name, value) for name, value in shared.items()}
    own = [{"CUDA_VISIBLE_DEVICES": chosen[place % len(chosen)]} if chosen else {} for place in range(size)]
    return [{**shared, **one} for one in own]


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        own=OWN,
        lists=_SCALARS,
    )
    _, _, rest = _own_words(without_help(argv))
    show_help(page, *defaults_of(_split(rest)[1]))


def _as_flags(values: Values) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def _begin(folder: Path, flags: list[str], seeded: bool) -> list[str]:
    """The flags of all runs, with a seed; as they were before, where the sweep goes on."""
    before = output_folder.read_record(folder, SWEEP, ["flags"])
    if not seeded:
        flags = [*flags, *(before["flags"][-2:] if before else ("--seed", str(secrets.randbits(31))))]
    new = {"flags": flags, "swept": {}, "runs": []}
    output_folder.claim(folder, SWEEP, new, what="a sweep", key="flags")
    return flags


class _Sweep:
    """The runs of a sweep: what is left to do is done, and what came of each is recorded as soon as it is known."""

    def __init__(
        self,
        folder: Path,
        flags: list[str],
        swept: dict[str, list[str]],
        combinations: list[Values],
        slots: Sequence[Mapping[str, str]],
    ) -> None:
        self.folder, self.flags, self.swept, self.combinations, self.slots = folder, flags, swept, combinations, slots
        self.names = [run_name(values) for values in combinations]
        self.rows: dict[str, dict[str, object]] = {}  # by name
        self.steps: dict[str, int] = {}  # that a run takes, by name
        self.begun: set[str] = set()  # by this command
        self.look_at = 0.0  # when the logs are read again, on the clock of time.monotonic
        self.bar = tqdm(disable=True)

    def run(self) -> list[dict[str, object]]:
        """Run what is not finished; return a row for each combination: its values, status and summary."""
        jobs = []
        for name, values in zip(self.names, self.combinations, strict=True):
            home = self.folder / name
            with locks.hold(home, otherwise="wait until it is done", waiting=say):
                pass  # the run of a sweep that was killed may still be training
            command = [*self.flags, *_as_flags(values), "--output_dir", str(home), "--resume_from_checkpoint", "auto"]
            config = parse(command)[0]
            self.steps[name] = config.max_train_steps or 0
            if _finished(home, config):
                self._record(name, {"status": 0, **_summary(home)})
            else:
                log = self.folder / f"{name}.log" if len(self.slots) > 1 else None
                jobs.append(Job(name, [sys.executable, "-m", "dpo_fast.train", *command], log))
        self._write()
        total = sum(self.steps[job.name] for job in jobs)
        several = len(self.slots) > 1 and bool(jobs)
        often = 0.1 if sys.stderr.isatty() else QUIET_SECONDS
        self.bar = tqdm(total=total or None, unit="step", desc="sweep", disable=not several, mininterval=often)
        with self.bar:
            run_jobs(jobs, self.slots, started=self._started, ended=self._ended, waiting=self._waiting)
        return [self.rows[name] for name in self.names]

    def _started(self, job: Job, slot: int) -> None:
        self.begun.add(job.name)
        gpu = self.slots[slot].get("CUDA_VISIBLE_DEVICES")
        self._say(f"{self._which(job)}: {job.name}" + ("" if gpu is None else f", on GPU {gpu}"))

    def _ended(self, job: Job, status: int) -> None:
        row = {"status": status, **(_summary(self.folder / job.name) if status == 0 else {})}
        self._record(job.name, row)
        self._write()
        if status:
            why = "" if job.log is None else f": {last_words(job.log)} ({job.log})"
            self._say(f"{self._which(job)} {ending(status)}{why}; the others go on")
        elif job.log is not None:
            self._say(f"{self._which(job)} is done: {job.name}")

    def _waiting(self, running: Sequence[Job]) -> None:
        """Show how far the runs are that go on at once."""
        if self.bar.disable or time.monotonic() < self.look_at:
            return
        self.look_at = time.monotonic() + LOOK_SECONDS
        from dpo_fast.comparing.logs import last_step

        done = {job.name: last_step(self.folder / job.name / "metrics.jsonl") or 0 for job in running}
        ended = sum(self.steps[name] for name in self.rows if name in self.begun)
        self.bar.n = ended + sum(done.values())
        states = [f"{self._number(name)}: {_state(step, self.steps[name])}" for name, step in done.items()]
        self.bar.set_postfix_str(", ".join(states), refresh=False)
        self.bar.update(0)

    def _which(self, job: Job) -> str:
        return f"run {self._number(job.name)} of {len(self.names)}"

    def _number(self, name: str) -> int:
        return self.names.index(name) + 1

    def _say(self, message: str) -> None:
        with self.bar.external_write_mode(file=sys.stderr):
            say(message)

    def _record(self, name: str, row: dict[str, object]) -> None:
        self.rows[name] = {**self.combinations[self.names.index(name)], **row}

    def _write(self) -> None:
        """Record the runs that are known, in the order of the combinations."""
        rows = [self.rows[name] for name in self.names if name in self.rows]
        write_signed_json(self.folder / SWEEP, {"flags": self.flags, "swept": self.swept, "runs": rows})


def _state(step: int, steps: int) -> str:
    """What a run does, in words."""
    if not step:
        return "preparing"
    return "ending" if step == steps else f"{step}/{steps or 'unknown'}"


def _finished(home: Path, config: TrainConfig) -> bool:
    """Whether a run wrote all that was asked for."""
    if not (home / "summary.json").is_file():
        return False
    return "win_rate" in _summary(home) or not config.eval_scorers


def _summary(home: Path) -> dict[str, object]:
    """A run's summary.json. Raises BadInput where it is damaged."""
    again = f"delete the folder {home}, and the same command trains that run again"
    return read_signed_json(home / "summary.json", again, ["loss_last", "seconds"])


def _table(folder: Path, combinations: Sequence[Values]) -> str:
    """The runs side by side, as `python -m dpo_fast.compare` shows them."""
    # imported here: flags are checked in a moment, before the heavy libraries are loaded
    from dpo_fast.comparing import formats
    from dpo_fast.comparing.folders import places_of
    from dpo_fast.comparing.overview import overview
    from dpo_fast.comparing.reading import read_entry

    names = {run_name(values) for values in combinations}
    entries = [read_entry(place) for place in places_of([folder]) if place.folder.name in names]
    return formats.terminal(overview(entries), shutil.get_terminal_size((formats.WIDTH, 24)).columns)


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
