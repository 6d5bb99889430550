"""`python -m dpo_fast.generate`: images of the same prompts and seeds from a policy and its base. `--help` lists flags.

    python -m dpo_fast.generate --policy RUN --prompts partiprompts --seeds 2
    accelerate launch --num_processes 8 -m dpo_fast.generate ...     every process its share

Into OUTPUT_DIR/<model>/<prompt>-<seed>.png, with images.json and grid.png; the same command goes on with what is
missing. Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import sys
import time
from pathlib import Path

from dpo_fast.cli import guarded, leave, refuse, say, show_log
from dpo_fast.evaluation.generate_options import GenerateConfig, parse, seeds_of
from dpo_fast.evaluation.prompts import Where, read_prompts


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        kept="the images that were made stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: GenerateConfig) -> int:
    where = Where(config.cache_dir, config.hub_token)
    prompts = read_prompts(config.prompts, people=config.slice == "people", most=config.max_prompts, where=where)

    # Imported here: flags and prompts are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import parallel
    from dpo_fast.evaluation.generation import GRID, LISTING, generate_images, wanted_of
    from dpo_fast.evaluation.sides import models_of

    started = time.perf_counter()
    models = models_of(config, config.policy, config.baseline)
    wanted = wanted_of(config, models, prompts, seeds_of(config.seeds))
    out = config.output_dir or Path("images", list(models)[-1])
    for name, model in models.items():
        say(f"{name}: {model}, {model.steps} steps, guidance {model.guidance:g}, {model.resolution} pixels a side")

    show_log()
    ranks = parallel.start("none")
    try:
        made = generate_images(wanted, out, ranks)
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); lower --batch_size", any_rank=True)
    finally:
        ranks.close()
    distinct = len({prompt.text for prompt in prompts})
    if ranks.is_main:
        print(
            f"{len({row.file for row in wanted.rows()})} images of {distinct} prompts, {made} made now,"
            f" {time.perf_counter() - started:.0f} s: {out / LISTING}, {out / GRID}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    leave(main())
