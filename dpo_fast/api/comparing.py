"""`dpo_fast.compare`: runs, sweeps and evaluations side by side."""

import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from dpo_fast.api.options import settled_options
from dpo_fast.comparing import formats, options
from dpo_fast.comparing.folders import places_of, refuse_unknown
from dpo_fast.comparing.options import CompareConfig
from dpo_fast.comparing.overview import Overview, overview
from dpo_fast.comparing.page import page
from dpo_fast.comparing.reading import read_entry
from dpo_fast.files import write_text


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side: their tables, and the files these were written to."""

    overview: Overview
    files: dict[str, Path]  # csv, markdown, latex, page -> the file that was asked for

    def __str__(self) -> str:
        """Text for the terminal, as wide as that is."""
        tables = formats.terminal(self.overview, shutil.get_terminal_size((formats.WIDTH, 24)).columns)
        return "\n".join([tables, *(f"{name}: {path}" for name, path in self.files.items())])


def compare(config: CompareConfig | None = None, **settings: object) -> RunComparison:
    """Put runs, sweeps and evaluations into tables, and compare those of the same prompts and noise image by image.

    Described by `settings`, flags of `python -m dpo_fast.compare` by name (`runs=[folder, folder], pool="seed"`), or by
    `config`, a CompareConfig. Nothing is generated or scored. What is missing or damaged in a folder is said in the
    tables.

    Raises BadInput for folders of which none is a run, sweep or evaluation, and for files that cannot be written, and
    OSError for a disk that is full or fails.
    """
    config = settled_options(CompareConfig, options.parse, config, settings)
    places = places_of(config.runs)
    refuse_unknown(places)
    found = overview([read_entry(place) for place in places], against=config.against, pool_seeds=config.pool == "seed")
    write = {
        "csv": formats.as_csv,
        "markdown": formats.markdown,
        "latex": formats.latex,
        "page": lambda of: page(of, date.today().isoformat()),
    }
    for name, path in config.outputs.items():
        write_text(path, write[name](found))
    return RunComparison(found, config.outputs)
