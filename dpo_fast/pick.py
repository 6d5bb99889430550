"""`python -m dpo_fast.pick RUN`: find the checkpoint and the strength that score best. `--help` lists every flag.

Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import sys
import time

from dpo_fast.cli import guarded, leave, show, show_log
from dpo_fast.evaluation.pick_options import PickConfig, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        argv=argv,
        kept="images and scores that were made stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: PickConfig) -> int:
    started = time.perf_counter()
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    from dpo_fast.api.picking import pick

    show_log()
    result = pick(config)
    show(f"\n{result}\n\n{time.perf_counter() - started:.0f} s: {result.folder}")
    return 0


if __name__ == "__main__":
    leave(main())
