"""`python -m dpo_fast.compare RUN RUN ...`: runs, sweeps and evaluations in one table, with intervals.

    python -m dpo_fast.compare runs/a runs/b evaluations/c runs/sweep --page compare.html
    python -m dpo_fast.compare runs/* --pool seed --against runs/a

Runs that were evaluated on the same prompts and noise are compared image by image. Exit status: 0 done, 2 bad input,
130 interrupted, 1 an internal error.
"""

import sys

from dpo_fast.cli import guarded, leave, show
from dpo_fast.comparing.options import CompareConfig, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        argv=argv,
        kept="no output is half-written",
        go_on="start the same command again",
    )


def _run(config: CompareConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    from dpo_fast.api.comparing import compare

    show(f"{compare(config)}")
    return 0


if __name__ == "__main__":
    leave(main())
