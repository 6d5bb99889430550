"""`python -m dpo_fast.evaluate`: did it work? A policy against its base, another model or anybody's images.

    python -m dpo_fast.evaluate --policy RUN --prompts partiprompts --scorers pickscore hpsv2.1 aesthetic
    python -m dpo_fast.evaluate --policy RUN --dataset_name PAIRS    the implicit-reward accuracy; no image is made
    accelerate launch --num_processes 8 -m dpo_fast.evaluate ...     every process its share

Into OUTPUT_DIR: report.html, summary.json, scores.parquet, and what was generated and scored: the same command goes on
from there. Exit status: 0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import hashlib
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.cli import guarded, leave, refuse, say, show_log
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.evaluate_options import OF_GENERATION, EvaluateConfig, parse, refuse_idle
from dpo_fast.evaluation.generate_options import seeds_of
from dpo_fast.evaluation.prompts import Prompt, Where, read_prompts
from dpo_fast.files import user_path

if TYPE_CHECKING:
    from dpo_fast.config import TrainConfig
    from dpo_fast.data import PairIndex, Source
    from dpo_fast.evaluation.comparison import Comparison, Side
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

    from dpo_fast import parallel
    from dpo_fast.evaluation.comparison import claim, compare, prepare
    from dpo_fast.evaluation.sides import is_run, read_run
    from dpo_fast.training import run_folder

    started = time.perf_counter()
    run = read_run(config.policy) if is_run(config.policy) else None
    models, sides = _sides(config)
    comparison = None
    if config.prompts or config.dataset_name is None:
        comparison = _comparison(config, run, models, sides)
    reference = None if config.dataset_name is None else _reference(config, run, models, sides)
    out = config.output_dir or Path("evaluations", _folder_name(config, sides))
    for name, model in models.items():
        say(f"{name}: {model}, {model.steps} steps, guidance {model.guidance:g}, {model.resolution} pixels a side")

    show_log()
    ranks, held = parallel.start("none"), ExitStack()
    try:
        # everything that may be refused comes before everything that takes long
        held_out = None if reference is None else _open_pairs(config, ranks)
        ranks.on_main(lambda: held.enter_context(run_folder.hold(out)))
        ranks.on_main(lambda: claim(out, _settings(config, sides, models, comparison)))
        pairs = result = implicit = None
        if comparison is not None:
            comparison, pairs = prepare(comparison, out, ranks)
            result = compare(comparison, pairs, out, ranks, config.batch_size)
        if reference is not None:
            implicit = _implicit(config, run, models[sides[1].name], reference, held_out, ranks)
        if ranks.is_main:
            _tell(out, result, pairs, implicit)
            print(f"\n{time.perf_counter() - started:.0f} s: {out}", flush=True)
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); lower --batch_size", any_rank=True)
    finally:
        held.close()
        ranks.close()
    return 0


def _tell(
    out: Path,
    result: "tuple[Findings, Scored] | None",
    pairs: "ImagePairs | None",
    implicit: "ImplicitAccuracy | None",
) -> None:
    """Write and print what was found."""
    from dpo_fast.evaluation.comparison import REPORT, SUMMARY, write
    from dpo_fast.files import write_json

    if result is None:
        write_json(out / SUMMARY, {"implicit": implicit.for_summary()})
        print(f"\n{implicit}", flush=True)
        return
    findings, scored = result
    write(out, findings, scored, pairs, implicit)
    print("", findings, *([implicit] if implicit is not None else []), sep="\n\n", flush=True)
    print(f"\nreport: {out / REPORT}", flush=True)


def _sides(config: EvaluateConfig) -> "tuple[dict[str, ModelSource], tuple[Side, Side]]":
    """The models that are generated from, settled, and base and policy."""
    from dpo_fast.evaluation.comparison import Side, is_images
    from dpo_fast.evaluation.sides import is_run, models_of

    policy, baseline = config.policy, config.baseline
    if not (is_run(policy) or baseline not in (None, "base")):
        what = "is a folder of images" if is_images(policy) else "is no run of dpo_fast.train"
        raise BadInput(f"--policy {policy} {what}, so its base is not known: name a --baseline to compare it with")
    folders = [path for path in (baseline, policy) if path not in (None, "base") and is_images(path)]
    named = [path for path in (policy, baseline) if path not in folders]
    if not named:
        refuse_idle(
            config,
            (*OF_GENERATION, "resolution", "is_turbo", "mixed_precision"),
            "is of generated images: leave it out",
        )
    models = {} if not named else models_of(config, named[0], named[1] if len(named) > 1 else "none")
    left, sides = list(models), []
    for path in (baseline, policy):
        if path in folders:
            folder = user_path(path)
            name = folder.resolve().name
            taken = name in models or (sides and name == sides[0].name)
            sides.append(Side(f"{name}-images" if taken else name, folder))
        else:
            sides.append(Side(left.pop(0)))
    return models, tuple(sides)


def _comparison(
    config: EvaluateConfig, run: "TrainConfig | None", models: "dict[str, ModelSource]", sides: "tuple[Side, Side]"
) -> "Comparison":
    """What the flags ask to be compared; what they leave out is as in the run's own evaluation."""
    from dpo_fast.evaluation.comparison import Comparison
    from dpo_fast.evaluation.generation import wanted_of
    from dpo_fast.scorers import MODULE_OF, check_names

    given = config.prompts
    if not given and run is not None and run.eval_prompts is not None:
        given = (str(run.eval_prompts),)
    prompts = read_prompts(
        given,
        people=config.slice == "people",
        most=config.max_prompts,
        where=Where(config.cache_dir, config.hub_token),
    )
    scorers = tuple(dict.fromkeys(config.scorers)) or (run.eval_scorers if run is not None else ())
    if not scorers:
        raise BadInput(f"no scorer is named: give --scorers, the one that leads first, of {', '.join(MODULE_OF)}")
    check_names(scorers)
    seeds = (0,) if config.seeds is None else seeds_of(config.seeds)
    if config.seeds is None and run is not None and not config.prompts and run.eval_images:
        seeds = tuple(range(max(1, run.eval_images // len(read_prompts(given)))))
    where = config.scorer_models or (run and run.scorer_models)
    return Comparison(
        *sides,
        wanted_of(config, models, prompts, seeds),
        all_images=not models and config.seeds is None,
        prompt_set=_in_words(config, prompts),
        scorers=scorers,
        scoring={
            "where": where and user_path(where),
            "cache_dir": config.cache_dir,
            "token": config.hub_token,
        },
        compare_medians=config.compare == "medians",
    )


def _in_words(config: EvaluateConfig, prompts: list[Prompt]) -> str:
    words = ", ".join(dict.fromkeys(prompt.source for prompt in prompts))
    if config.slice is not None:
        words += f", only {config.slice}"
    return words if config.max_prompts is None else f"{words}, {len(prompts)} evenly spread"


def _reference(
    config: EvaluateConfig, run: "TrainConfig | None", models: "dict[str, ModelSource]", sides: "tuple[Side, Side]"
) -> "ModelSource":
    """What the implicit reward of the policy is measured against."""
    from dpo_fast.evaluation.sides import models_of

    base, policy = sides
    if policy.folder is not None:
        raise BadInput(f"--dataset_name: {config.policy} is a folder of images, which has no implicit reward")
    if run is not None:
        return next(iter(models_of(config, config.policy, "base").values()))
    if base.folder is not None:
        raise BadInput(f"--dataset_name: the reference of {config.policy} is not known: name it with --baseline")
    return models[base.name]


def _folder_name(config: EvaluateConfig, sides: "tuple[Side, Side]") -> str:
    base, policy = (side.name for side in sides)
    if config.dataset_name is not None and not config.prompts:
        return f"{policy}-on-{Path(config.dataset_name).stem}"
    return f"{policy}-against-{base}"


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


def _settings(
    config: EvaluateConfig,
    sides: "tuple[Side, Side]",
    models: "dict[str, ModelSource]",
    comparison: "Comparison | None",
) -> dict[str, object]:
    """What an evaluation's folder is of."""
    settings: dict[str, object] = {
        title: {"name": side.name, "of": str(models[side.name] if side.folder is None else side.folder)}
        for title, side in zip(("baseline", "policy"), sides, strict=True)
    }
    if comparison is not None:
        texts = [prompt.text for prompt in comparison.wanted.prompts]
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()
        settings["prompts"] = f"{comparison.prompt_set}: {len(texts)} of digest {digest}"
        settings["seeds"] = "all" if comparison.all_images else list(comparison.wanted.seeds)
    settings["held_out"] = config.dataset_name
    return settings


if __name__ == "__main__":
    leave(main())
