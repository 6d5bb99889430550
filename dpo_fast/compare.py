"""`python -m dpo_fast.compare RUN RUN ...`: runs, sweeps and evaluations in one table, with intervals.

    python -m dpo_fast.compare runs/a runs/b evaluations/c runs/sweep --page compare.html
    python -m dpo_fast.compare runs/* --pool seed --against runs/a

Runs that were evaluated on the same prompts and noise are compared image by image. Exit status: 0 done, 2 bad input,
130 interrupted, 1 an internal error.
"""

import shutil
import sys
from datetime import date

from dpo_fast.cli import guarded, leave
from dpo_fast.comparing.options import CompareConfig, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        kept="no output is half-written",
        go_on="start the same command again",
    )


def _run(config: CompareConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    from dpo_fast.comparing import formats
    from dpo_fast.comparing.folders import places_of, refuse_unknown
    from dpo_fast.comparing.overview import overview
    from dpo_fast.comparing.page import page
    from dpo_fast.comparing.reading import read_entry
    from dpo_fast.files import write_text

    places = places_of(config.runs)
    refuse_unknown(places)
    found = overview([read_entry(place) for place in places], against=config.against, pool_seeds=config.pool == "seed")
    print(formats.terminal(found, shutil.get_terminal_size((formats.WIDTH, 24)).columns), flush=True)
    write = {
        "csv": formats.as_csv,
        "markdown": formats.markdown,
        "latex": formats.latex,
        "page": lambda of: page(of, date.today().isoformat()),
    }
    for name, path in config.outputs.items():
        write_text(path, write[name](found))
        print(f"{name}: {path}", flush=True)
    return 0


if __name__ == "__main__":
    leave(main())
