"""`python -m dpo_fast.pick RUN`: find the checkpoint and the strength that score best. `--help` lists every flag.

Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dpo_fast.cli import guarded, leave, refuse, say, show_log
from dpo_fast.evaluation.pick_options import PickConfig, parse

if TYPE_CHECKING:
    from dpo_fast.evaluation.picking import Picked, Plan


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        kept="images and scores that were made stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: PickConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import output_folder, parallel
    from dpo_fast.evaluation.picking import pick, plan

    started = time.perf_counter()
    planned = plan(config)
    parallel.allow_tf32(planned.run.allow_tf32)  # as in training
    say(_cost(planned))
    show_log()
    ranks, held = parallel.start("none"), ExitStack()
    try:
        ranks.on_main(lambda: held.enter_context(output_folder.hold(planned.out)))
        picked = pick(planned, ranks)
        if picked is not None:
            print(f"\n{_told(planned, picked)}\n\n{time.perf_counter() - started:.0f} s: {planned.out}", flush=True)
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); lower --batch_size", any_rank=True)
    finally:
        held.close()
        ranks.close()
    return 0


def _cost(plan: "Plan") -> str:
    steps = len({point.step for point in plan.points})
    rounds = ", ".join(str(share.images) for share in plan.rounds)
    judged = 3 * plan.config.judge_images
    return (
        f"{len(plan.points)} points: {steps} checkpoints x {len(plan.points) // steps} strengths; rounds of {rounds}"
        f" images a point; {plan.images_to_pick()} images to pick ({plan.images_of_grid()} for the whole grid), at most"
        f" {judged} to judge"
    )


def _told(plan: "Plan", picked: "Picked") -> str:
    """The table, the pick, and how it does on prompts that did not pick."""
    lines = [f"{'checkpoint':>10}  {'strength':>8}  {'images':>6}  {'gain [95%]':>30}  win rate [95%]"]
    for row in picked.rows:
        mark = "*" if row.point == picked.pick else " "
        gain = f"{row.gain.value:+.4g} [{row.gain.low:+.4g}, {row.gain.high:+.4g}]"
        lines.append(
            f"{mark}{row.point.step:>9}  {row.point.strength:>8g}  {row.images:>6}  {gain:>30}  {row.win_rate}"
        )
    first = picked.findings.overall[0]
    lines += ["", picked.why(), f"on {first.prompts} prompts that did not pick ({picked.findings.images} images):"]
    shown = {"the pick": (first.win_rate, first.gain)}
    if picked.result is not None:
        shown[f"step {plan.result.step} as trained"] = picked.result
    for name, (rate, gain) in shown.items():
        lines.append(f"  {name}: win rate {rate}, gain {gain.value:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]")
    if not first.decided or first.win_rate.rate < 0.5:
        lines.append("  that shows no gain over the base: train longer, or on more pairs, rather than use this")
    cost = f"{picked.images} images to pick, {picked.images / picked.images_of_grid:.0%} of the whole grid's"
    return "\n".join([*lines, f"{cost}; picture: {plan.out / 'surface.png'}; report: {plan.out / 'report.html'}"])


if __name__ == "__main__":
    leave(main())
