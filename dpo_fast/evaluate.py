"""`python -m dpo_fast.evaluate`: did it work? A policy against its base, another model or anybody's images.

    python -m dpo_fast.evaluate --policy RUN --prompts partiprompts --scorers pickscore hpsv2.1 aesthetic
    python -m dpo_fast.evaluate --policy RUN --dataset_name PAIRS    the implicit-reward accuracy; no image is made
    accelerate launch --num_processes 8 -m dpo_fast.evaluate ...     every process its share

Into OUTPUT_DIR: report.html, summary.json, scores.parquet, and what was generated and scored: the same command goes on
from there. Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.cli import guarded, leave, refuse, say, show_log
from dpo_fast.evaluation.evaluate_options import EvaluateConfig, parse

if TYPE_CHECKING:
    from dpo_fast.config import TrainConfig
    from dpo_fast.data import PairIndex, Source
    from dpo_fast.evaluation.findings import Findings
    from dpo_fast.evaluation.implicit import ImplicitAccuracy
    from dpo_fast.evaluation.pairing import ImagePairs
    from dpo_fast.evaluation.scored import Scored
    from dpo_fast.models.source import ModelSource
    from dpo_fast.parallel import Ranks

DRAWS, WORKERS, MAX_BAD_FRACTION = 8, 2, 0.01  # where the flags say nothing


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        kept="images and scores that were made stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: EvaluateConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import output_folder, parallel
    from dpo_fast.evaluation.comparison import check_scorers, compare, find_pairs, unscored
    from dpo_fast.evaluation.findings import RECORD
    from dpo_fast.evaluation.sides import (
        batch_size_of,
        comparison_of,
        evaluation_name,
        is_run,
        read_run,
        reference_of,
        settings_of,
        sides_of,
    )

    started = time.perf_counter()
    run = read_run(config.policy) if is_run(config.policy) else None
    config = replace(config, batch_size=batch_size_of(config, run))
    parallel.allow_tf32(run is not None and run.allow_tf32)  # as in training
    models, sides = sides_of(config)
    comparison = None
    if config.prompts or config.dataset_name is None:
        comparison = comparison_of(config, run, models, sides)
    reference = None if config.dataset_name is None else reference_of(config, run, models, sides)
    out = config.output_dir or Path("evaluations", evaluation_name(config, sides))
    for name, model in models.items():
        say(f"{name}: {model}, {model.steps} steps, guidance {model.guidance:g}, {model.resolution} pixels a side")

    show_log()
    ranks, held = parallel.start("none"), ExitStack()
    try:
        # everything that may be refused comes before everything that takes long
        held_out = None if reference is None else _open_pairs(config, ranks)
        ranks.on_main(lambda: held.enter_context(output_folder.hold(out)))
        settings = settings_of(config, sides, models, comparison)
        ranks.on_main(lambda: output_folder.claim(out, RECORD, settings, what="an evaluation"))
        pairs = result = implicit = None
        if comparison is not None:
            texts = [prompt.text for prompt in comparison.wanted.prompts]
            ranks.on_main(lambda: check_scorers(unscored(comparison, out), comparison.scoring, texts))
            comparison, pairs = find_pairs(comparison, out, ranks)
            result = compare(comparison, pairs, out, ranks, config.batch_size)
        if reference is not None:
            implicit = _implicit(config, run, models[sides[1].name], reference, held_out, ranks)
        if ranks.is_main:
            _tell(out, run, result, pairs, implicit)
            print(f"\n{time.perf_counter() - started:.0f} s: {out}", flush=True)
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); lower --batch_size", any_rank=True)
    finally:
        held.close()
        ranks.close()
    return 0


def _tell(
    out: Path,
    run: "TrainConfig | None",
    result: "tuple[Findings, Scored] | None",
    pairs: "ImagePairs | None",
    implicit: "ImplicitAccuracy | None",
) -> None:
    """Write and print what was found. run: how the policy was trained, where it is a run."""
    from dpo_fast.checksums import write_signed_json
    from dpo_fast.config import public
    from dpo_fast.evaluation.comparison import write_report
    from dpo_fast.evaluation.findings import REPORT, SUMMARY
    from dpo_fast.training.hub import public_config

    summary = {} if run is None else {"run": public_config(public(run))}
    if implicit is not None:
        summary["implicit"] = implicit.for_summary()
    if result is None:
        write_signed_json(out / SUMMARY, summary)
        print(f"\n{implicit}", flush=True)
        return
    findings, scored = result
    write_report(out, findings, scored, pairs, implicit)
    write_signed_json(out / SUMMARY, findings.for_summary() | summary)
    print("", findings, *([implicit] if implicit is not None else []), sep="\n\n", flush=True)
    print(f"\nreport: {out / REPORT}", flush=True)


def _open_pairs(config: EvaluateConfig, ranks: "Ranks") -> "tuple[Source, PairIndex]":
    """The held-out pairs, on every rank."""
    from dpo_fast.data import PairsSource, build_index, open_source

    def work() -> "tuple[Source, PairIndex]":
        source = open_source(PairsSource.of(config, max_rows=config.max_pairs))
        sets = build_index(source, seed=0, max_bad_fraction=_bad_fraction(config), progress=ranks.is_main)
        say(f"{source.description}: {len(sets.train)} pairs; {sets.left_out}")
        return source, sets.train

    return ranks.on_all(work)


def _implicit(
    config: EvaluateConfig,
    run: "TrainConfig | None",
    policy: "ModelSource",
    reference: "ModelSource",
    held_out: "tuple[Source, PairIndex]",
    ranks: "Ranks",
) -> "ImplicitAccuracy | None":
    """The implicit-reward accuracy, on the main rank."""
    from dpo_fast.evaluation.implicit import accuracy, implicit_rewards
    from dpo_fast.hub_revisions import public_name, revision_of
    from dpo_fast.models.load import revisions

    as_trained = {}
    if run is not None:
        as_trained = {name: getattr(run, name) for name in ("time_ids", "min_timestep", "max_timestep")}
    rewards = implicit_rewards(
        policy,
        reference,
        *held_out,
        ranks,
        draws=config.draws or DRAWS,
        seed=0,
        batch_size=max(1, config.batch_size // 2),
        num_workers=WORKERS if config.dataloader_num_workers is None else config.dataloader_num_workers,
        beta=None if run is None else run.beta_dpo,
        max_bad_fraction=_bad_fraction(config),
        **as_trained,
    )
    if rewards is None:
        return None
    pairs = {public_name(config.dataset_name): revision_of(config.dataset_name, kind="dataset")}
    return replace(
        accuracy(rewards),
        files={"reference": revisions(reference), "policy": revisions(policy), "pairs": pairs},
    )


def _bad_fraction(config: EvaluateConfig) -> float:
    return MAX_BAD_FRACTION if config.max_bad_fraction is None else config.max_bad_fraction


if __name__ == "__main__":
    leave(main())
