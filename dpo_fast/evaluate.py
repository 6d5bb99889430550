"""`python -m dpo_fast.evaluate`: did it work? A policy against its base, another model or anybody's images.

    python -m dpo_fast.evaluate --policy RUN --prompts partiprompts --scorers pickscore hpsv2.1 aesthetic
    python -m dpo_fast.evaluate --policy RUN --dataset_name PAIRS    the implicit-reward accuracy; no image is made
    accelerate launch --num_processes 8 -m dpo_fast.evaluate ...     every process its share

Into OUTPUT_DIR: report.html, summary.json, scores.parquet, and what was generated and scored: the same command goes on
from there. Exit status: 0 done, 2 bad input, 130 interrupted, 1 a fault of ours.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.door import guarded, refuse, say, show_log
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.evaluate_options import EvaluateConfig, parse
from dpo_fast.evaluation.generate_options import seeds_of
from dpo_fast.evaluation.prompts import Prompt, Where, read_prompts

if TYPE_CHECKING:
    from dpo_fast.config import TrainConfig
    from dpo_fast.evaluation.evaluating import Comparison, Side
    from dpo_fast.evaluation.implicit import ImplicitAccuracy
    from dpo_fast.evaluation.models import ModelSource
    from dpo_fast.parallel import Ranks


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        kept="images and scores that were made stay; the same command goes on from there",
        go_on="make room, or name another --output_dir, then start the same command again",
    )


def _run(config: EvaluateConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import parallel
    from dpo_fast.evaluation import evaluating
    from dpo_fast.evaluation.models import is_run, read_run

    started = time.perf_counter()
    run = read_run(config.policy) if is_run(config.policy) else None
    models, sides = _sides(config)
    comparison = None
    if config.prompts or config.dataset_name is None:
        comparison = _comparison(config, run, models, sides)
    reference = None if config.dataset_name is None else _reference(config, run, models, sides)
    names = [side.name for side in sides]
    out = config.output_dir or Path("evaluations", f"{names[1]}-against-{names[0]}")
    for name, model in models.items():
        say(f"{name}: {model}, {model.steps} steps, guidance {model.guidance:g}, {model.resolution} pixels a side")

    show_log()
    ranks = parallel.start("none")
    try:
        ranks.on_main(lambda: evaluating.claim(out, _settings(config, sides, models)))
        implicit = None
        if reference is not None:
            implicit = _implicit(config, run, models[names[1]], reference, ranks)
            if implicit is not None:
                evaluating.add_to_summary(out, {"implicit": implicit.for_summary()})
                print(f"\n{implicit}", flush=True)
        if comparison is not None:
            result = evaluating.compare(comparison, out, ranks)
            if result is not None:
                evaluating.write(out, *result, implicit)
                print(f"\n{result[0]}", flush=True)
        if ranks.is_main:
            wrote = evaluating.REPORT if comparison is not None else evaluating.SUMMARY
            print(f"\n{time.perf_counter() - started:.0f} s: {out / wrote}", flush=True)
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); lower --batch_size", any_rank=True)
    finally:
        ranks.close()
    return 0


def _sides(config: EvaluateConfig) -> "tuple[dict[str, ModelSource], tuple[Side, Side]]":
    """The models that are generated from, settled, and base and policy."""
    from dpo_fast.evaluation.evaluating import Side, is_images
    from dpo_fast.evaluation.models import is_run, models_of

    policy, baseline = config.policy, config.baseline
    if not (is_run(policy) or baseline not in (None, "base")):
        what = "is a folder of images" if is_images(policy) else "is no run of dpo_fast.train"
        raise BadInput(f"--policy {policy} {what}, so its base is not known: name a --baseline to compare it with")
    folders = [path for path in (baseline, policy) if path not in (None, "base") and is_images(path)]
    named = [path for path in (policy, baseline) if path not in folders]
    models = {} if not named else models_of(config, named[0], named[1] if len(named) > 1 else "none")
    left = list(models)
    sides = [
        Side(Path(path).expanduser().resolve().name, Path(path).expanduser()) if path in folders else Side(left.pop(0))
        for path in (baseline, policy)
    ]
    if sides[0].name == sides[1].name:
        sides[0] = Side(f"baseline-{sides[0].name}", sides[0].folder)
    return models, tuple(sides)


def _comparison(
    config: EvaluateConfig, run: "TrainConfig | None", models: "dict[str, ModelSource]", sides: "tuple[Side, Side]"
) -> "Comparison":
    """What the flags ask to be compared; what they leave out is as in the run's own evaluation."""
    from dpo_fast.evaluation.evaluating import Comparison
    from dpo_fast.evaluation.generating import wanted_of
    from dpo_fast.evaluation.scorers import MODULE_OF, check_names

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
        seeds = tuple(range(max(1, run.eval_images // len(prompts))))
    return Comparison(
        *sides,
        wanted_of(config, models, prompts, seeds),
        all_images=not models and config.seeds is None,
        prompt_set=_in_words(config, prompts),
        scorers=scorers,
        scoring={
            "where": config.scorer_models and config.scorer_models.expanduser(),
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
    from dpo_fast.evaluation.models import models_of

    base, policy = sides
    if policy.folder is not None:
        raise BadInput(f"--dataset_name: {config.policy} is a folder of images, which has no implicit reward")
    if run is not None:
        return models_of(config, config.policy, "base")["base"]
    if base.folder is not None:
        raise BadInput(f"--dataset_name: the reference of {config.policy} is not known: name it with --baseline")
    return models[base.name]


def _implicit(
    config: EvaluateConfig, run: "TrainConfig | None", policy: "ModelSource", reference: "ModelSource", ranks: "Ranks"
) -> "ImplicitAccuracy | None":
    """The implicit-reward accuracy, on the main rank."""
    from dpo_fast.data import build_index, open_source
    from dpo_fast.evaluation.implicit import accuracy, implicit_rewards

    source = open_source(
        config.dataset_name,
        config_name=config.dataset_config_name,
        split=config.dataset_split_name,
        image_columns=config.image_columns,
        label_column=config.label_column,
        caption_column=config.caption_column,
        cache_dir=config.cache_dir,
        token=config.hub_token,
        max_rows=config.max_pairs,
    )
    sets = build_index(source, seed=0, max_bad_fraction=config.max_bad_fraction, progress=ranks.is_main)
    as_trained = {}
    if run is not None:
        as_trained = {name: getattr(run, name) for name in ("time_ids", "min_timestep", "max_timestep")}
    say(f"{source.description}: {len(sets.train)} pairs, {sets.ties_dropped} ties left out, {sets.bad_rows} bad rows")
    rewards = implicit_rewards(
        policy,
        reference,
        source,
        sets.train,
        ranks,
        draws=config.draws,
        seed=0,
        batch_size=max(1, config.batch_size // 2),
        num_workers=config.dataloader_num_workers,
        beta=None if run is None else run.beta_dpo,
        max_bad_fraction=config.max_bad_fraction,
        **as_trained,
    )
    return None if rewards is None else accuracy(rewards)


def _settings(
    config: EvaluateConfig, sides: "tuple[Side, Side]", models: "dict[str, ModelSource]"
) -> dict[str, dict[str, str]]:
    """What an evaluation's folder is of."""
    return {
        title: {"name": side.name, "of": str(models[side.name] if side.folder is None else side.folder)}
        for title, side in zip(("baseline", "policy"), sides, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
