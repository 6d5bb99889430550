"""`python -m dpo_fast.generate`: images of the same prompts and seeds from a policy and its base. `--help` lists flags.

    python -m dpo_fast.generate --policy RUN --prompts partiprompts --seeds 2
    accelerate launch --num_processes 8 -m dpo_fast.generate ...     every process its share

Into OUTPUT_DIR/<model>/<prompt>-<seed>.png, with images.json and grid.png; the same command goes on with what is
missing. Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import sys
import time

from dpo_fast.cli import guarded, leave, show, show_log
from dpo_fast.evaluation.generate_options import GenerateConfig, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        argv=argv,
        kept="the images that were made stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: GenerateConfig) -> int:
    started = time.perf_counter()
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    from dpo_fast.api.generation import generate

    show_log()
    images = generate(config)
    show(f"{images}; {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    leave(main())
