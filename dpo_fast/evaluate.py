"""`python -m dpo_fast.evaluate`: did it work? A policy against its base, another model or anybody's images.

    python -m dpo_fast.evaluate --policy RUN --prompts partiprompts --scorers pickscore hpsv2.1 aesthetic
    python -m dpo_fast.evaluate --policy RUN --dataset_name PAIRS    the implicit-reward accuracy; no image is made
    accelerate launch --num_processes 8 -m dpo_fast.evaluate ...     every process its share

Into OUTPUT_DIR: report.html, summary.json, scores.parquet, and what was generated and scored: the same command goes on
from there. Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import sys
import time

from dpo_fast.cli import guarded, leave, show, show_log
from dpo_fast.evaluation.evaluate_options import EvaluateConfig, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        argv=argv,
        kept="images and scores that were made stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: EvaluateConfig) -> int:
    started = time.perf_counter()
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    from dpo_fast.api.evaluation import evaluate

    show_log()
    result = evaluate(config)
    show(f"\n{result}\n\n{time.perf_counter() - started:.0f} s: {result.folder}")
    return 0


if __name__ == "__main__":
    leave(main())
