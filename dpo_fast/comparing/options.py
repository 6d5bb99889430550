"""The flags of the comparison of runs, and what is refused before anything is read."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.errors import BadInput
from dpo_fast.files import exists, regular_file, user_path
from dpo_fast.help_text import Page, asks_help, show_help

PROG = "python -m dpo_fast.compare"
# How each output begins: a file that does not begin so was not written by this command, and is not replaced.
BEGINS = {
    "csv": b"run,folder,",
    "markdown": b"<!-- made by dpo_fast.compare -->",
    "latex": b"% made by dpo_fast.compare",
    "page": b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta name="generator" content="dpo_fast.compare">',
}
SUFFIXES = {"csv": (".csv",), "markdown": (".md", ".markdown"), "latex": (".tex",), "page": (".html", ".htm")}


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs of dpo_fast.train, sweeps of dpo_fast.sweep and evaluations of dpo_fast.evaluate: one table.

    What the runs have in common is said once; win rates, gains and held-out accuracies have 95% intervals. Runs that
    were evaluated on the same prompts and noise are also compared with one of them, image by image; where evaluations
    cannot be compared, the table says why.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs, sweeps and evaluations, in any order and number. The flag may be left out: dpo_fast.compare RUN
    RUN ..."""
    against: str | None = None
    """The run that the others are compared with, by its folder or its name in the table. None: the first that was
    evaluated."""
    pool: Literal["seed"] | None = None
    """seed: runs whose settings differ only in the seed become one row; intervals are over the prompts they share."""
    csv: Path | None = None
    """Also write all numbers, in full precision, to this .csv file."""
    markdown: Path | None = None
    """Also write the tables to this .md file."""
    latex: Path | None = None
    """Also write the tables to this .tex file, to be included where booktabs is loaded."""
    page: Path | None = None
    """Also write a page to this .html file: tables, win rates, and the metrics over the steps. It loads nothing."""

    @property
    def outputs(self) -> dict[str, Path]:
        """Flag -> the file it asks for."""
        named = {name: getattr(self, name) for name in BEGINS}
        return {name: path for name, path in named.items() if path is not None}


def parse(argv: list[str]) -> CompareConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for a value that cannot be used."""
    if asks_help(argv):
        show_help(Page(PROG, CompareConfig, usage="RUN ... [--FLAG VALUE ...]"))
    refuse_empty(argv)
    with one_line_errors(CompareConfig):
        config = tyro.cli(CompareConfig, args=[word for word in argv if word != "--runs"], prog=PROG)
    config = replace(
        config,
        runs=tuple(user_path(folder) for folder in config.runs),
        **{name: user_path(path) for name, path in config.outputs.items()},
    )
    check(config)
    return config


def check(config: CompareConfig) -> None:
    """Raise BadInput, naming value and remedy, for folders that do not exist and files that cannot be written."""
    if not config.runs:
        raise BadInput("nothing is named: give the folders of runs, sweeps and evaluations")
    for folder in config.runs:
        if not exists(folder):
            raise BadInput(f"{folder} does not exist: name the folder of a run, a sweep or an evaluation")
    places = [path.resolve() for path in config.outputs.values()]
    for name, path in config.outputs.items():
        if path.suffix not in SUFFIXES[name]:
            raise BadInput(f"--{name} {path} must end in {' or '.join(SUFFIXES[name])}")
        if places.count(path.resolve()) > 1:
            raise BadInput(f"--{name} {path} is named for two outputs: name two files")
        _check_place(name, path)


def _check_place(name: str, path: Path) -> None:
    """Raise BadInput if `path` is somebody else's file, or cannot be written."""
    try:
        if path.is_dir():
            raise BadInput(f"--{name} {path} is a folder: name a file in it")
        if exists(path) and not _begins(path, BEGINS[name]):
            raise BadInput(f"--{name} {path} exists and was not written by this command: name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"x")
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"--{name}: {path} cannot be written ({reason}): name another file") from error


def _begins(path: Path, expected: bytes) -> bool:
    with regular_file(path).open("rb") as file:
        return file.read(len(expected)) == expected
