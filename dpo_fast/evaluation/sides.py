"""What an evaluation compares: two sides, each a run's result, its base, any pipeline or a folder of images."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from dpo_fast.command_line import parse
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.evaluate_options import BATCH_SIZE, BY_PEOPLE, OF_GENERATION, EvaluateConfig, refuse_idle
from dpo_fast.evaluation.generate_options import GenerateConfig, seeds_of
from dpo_fast.evaluation.generation import ImageRequest, wanted_of
from dpo_fast.evaluation.halving import in_two
from dpo_fast.evaluation.image_names import image_files
from dpo_fast.evaluation.prompts import SETS, Prompt, Where, is_set, narrowed, read_prompts
from dpo_fast.files import exists, user_path
from dpo_fast.models.load import family_of
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.opened import settled
from dpo_fast.models.source import ModelSource, base_of, result_of
from dpo_fast.models.trained import check_trained
from dpo_fast.scorers import MODULE_OF, check_names
from dpo_fast.training import checkpoint
from dpo_fast.training.run_folder import SUMMARY, check_config, check_result, read_summary


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model whose images are generated, or a folder of images."""

    name: str
    folder: Path | None = None  # None: generated


@dataclass(frozen=True)
class Comparison:
    """What is compared, and by which scorers."""

    base: Side
    policy: Side
    wanted: ImageRequest  # prompts, seeds, and the models to generate with
    all_images: bool  # two folders: as many images of a prompt as both have; else one per seed
    prompt_set: str  # in words
    scorers: Sequence[str]
    scoring: Mapping[str, object]  # keywords of load_scorer: where its files are
    compare_medians: bool
    training: Mapping[str, str] = field(default_factory=dict)  # how the policy was trained from the base
    trained_towards_the_first: bool = False  # the policy was trained from the base, towards the first scorer


def is_run(path: str) -> bool:
    """Whether `path` is an output folder of `python -m dpo_fast.train`."""
    return exists(Path(path, "config.yaml")) and Path(path, "config.yaml").is_file()


def is_checkpoint(path: str) -> bool:
    """Whether `path` is a checkpoint in an output folder of `python -m dpo_fast.train`."""
    folder = Path(os.path.abspath(path))
    return checkpoint.is_named_so(folder) and exists(folder) and folder.is_dir() and is_run(str(folder.parent))


def is_trained(path: str) -> bool:
    """Whether `path` is a run's output folder or one of its checkpoints, so that its base is known."""
    return is_run(path) or is_checkpoint(path)


def read_run(path: str) -> TrainConfig:
    """Return the configuration of a finished run, or of the run, finished or not, that a checkpoint is of.

    Raises BadInput if the result, or the checkpoint, is missing or damaged.
    """
    if is_checkpoint(path):
        check_trained(Path(path))
        return _read_config(Path(os.path.abspath(path)).parent)
    check_result(Path(path))
    config = _read_config(Path(path))
    result = Path(path, WEIGHT_NAME if config.tuning == "lora" else "model_index.json")
    if not result.is_file():
        held = checkpoint.all_of(Path(path))
        other = f"name one of its checkpoints, such as {held[-1]}" if held else "name another"
        raise BadInput(f"the run {path} has no result yet ({result.name}): let it finish, or {other}")
    return config


def _read_config(folder: Path) -> TrainConfig:
    check_config(folder)
    return parse(["--config", str(folder / "config.yaml")])[0]


def model_sources(
    policy: str,
    baseline: str | None = None,
    *,
    turbo: bool = False,
    **overriding: object,
) -> dict[str, ModelSource]:
    """Return name -> model with its settings filled in: the baseline, if there is one, and then the policy.

    policy: a run's folder, a checkpoint in it, or a pipeline (folder, hub id, .safetensors). baseline: the same, or
    `base` (what the run started from), or `none`; None: base for a run or checkpoint, else none. turbo: pipelines named
    here are SDXL-Turbo (a run records it itself). overriding: fields of ModelSource, for both models; None: the run's
    value, or the model's default. A baseline of the policy's family is sampled like the policy, and both compute in one
    dtype (fp16 without a run).
    Raises BadInput for the baseline `base` of a policy that is not a run.
    """
    config = read_run(policy) if is_trained(policy) else None
    given = {name: value for name, value in overriding.items() if value is not None}
    precision = config.mixed_precision if config else "fp16"

    def source(path: str) -> ModelSource:
        if is_trained(path):
            of, folder = config if path == policy else read_run(path), Path(_tidy(path))
            at = is_checkpoint(path)
            found = replace(base_of(of), trained=str(folder)) if at else result_of(of, folder)
            return replace(found, **{"mixed_precision": precision, **given})
        return ModelSource(**{"path": _tidy(path), "turbo": turbo, "mixed_precision": precision, **given})

    name, aligned = _folder_name(policy), settled(source(policy))
    if baseline is None:
        baseline = "none" if config is None else "base"
    if baseline == "none":
        return {name: aligned}
    if baseline == "base" and config is None:
        raise BadInput(f"--baseline base needs a run as --policy, but {policy} holds no config.yaml; name the baseline")
    if baseline == "base":
        other_name, other = "base", replace(base_of(config), **given)
    else:
        other_name, other = _folder_name(baseline), source(baseline)
        if family_of(other) is family_of(aligned):
            other = replace(
                other,
                steps=aligned.steps,
                guidance=aligned.guidance,
                resolution=aligned.resolution,
                max_token_length=aligned.max_token_length,
            )
    if other_name.lower() == name.lower():
        other_name = f"baseline-{name}"
    return {other_name: settled(other), name: aligned}


def models_of(config: GenerateConfig, policy: str, baseline: str | None) -> dict[str, ModelSource]:
    """Call `model_sources` with the flags of generation."""
    return model_sources(
        policy,
        baseline,
        turbo=config.is_turbo,
        mixed_precision=config.mixed_precision,
        steps=config.sampling_steps,
        guidance=config.sampling_guidance,
        resolution=config.resolution,
        max_token_length=config.max_token_length,
        cache_dir=config.cache_dir,
        token=config.hub_token,
    )


def _tidy(path: str) -> str:
    """Normalise the path of an existing file or folder; return a hub id unchanged."""
    return os.path.normpath(path) if exists(Path(path)) else path


def _folder_name(path: str) -> str:
    """The last part of a path or hub id, in characters that every file system accepts."""
    last = Path(path).resolve().name if exists(Path(path)) else path.rsplit("/", 1)[-1]
    if is_checkpoint(path):  # other runs have one of this name, too
        last = f"{Path(os.path.abspath(path)).parent.name}-{last}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last.removesuffix(".safetensors")) or "model"


def is_images(path: str) -> bool:
    """Whether `path` is a folder of images, not a run or pipeline. Raises BadInput if several models share it."""
    folder = user_path(path)
    others = ("config.yaml", "model_index.json")
    if not exists(folder) or not folder.is_dir() or any((folder / name).is_file() for name in others):
        return False
    if (folder / "images.json").is_file():
        raise BadInput(f"{path} holds the images of several models: name one of the folders in it")
    return bool(image_files(folder))


def sides_of(config: EvaluateConfig) -> tuple[dict[str, ModelSource], tuple[Side, Side]]:
    """Return the models to generate with, settled, and (base, policy). Raises BadInput if the baseline is not known."""

    policy, baseline = config.policy, config.baseline
    if not (is_trained(policy) or baseline not in (None, "base")):
        what = "is a folder of images" if is_images(policy) else "is no run of dpo_fast.train"
        raise BadInput(f"--policy {policy} {what}, so its base is not known: name a --baseline to compare it with")
    folders = [path for path in (baseline, policy) if path not in (None, "base") and is_images(path)]
    named = [path for path in (policy, baseline) if path not in folders]
    if not named:
        refuse_idle(
            config,
            (*OF_GENERATION, "resolution", "max_token_length", "is_turbo", "mixed_precision"),
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


def comparison_of(
    config: EvaluateConfig,
    run: TrainConfig | None,
    models: dict[str, ModelSource],
    sides: tuple[Side, Side],
    in_training: Sequence[Prompt] | None = None,  # the prompts of the run's own evaluation; None: they are read
) -> Comparison:
    """Build the comparison that the flags ask for; what they leave out is as in the run's own evaluation."""
    where, people = Where(config.cache_dir, config.hub_token), config.slice == "people"
    seeds, without_last = (0,) if config.seeds is None else seeds_of(config.seeds), frozenset()
    if config.prompts or run is None or run.eval_prompts is None:
        prompts = read_prompts(config.prompts, people=people, most=config.max_prompts, where=where)
    else:
        every = in_training or prompts_in_training(run, where)
        if config.seeds is None and run.eval_images:
            asked, seeds, without_last = seeds_in_training(every, run.eval_images)
            every = [prompt for prompt in every if prompt.text in asked]
        prompts = narrowed([every], people=people, most=config.max_prompts)
    scorers = tuple(dict.fromkeys(config.scorers)) or (run.eval_scorers if run is not None else ())
    if scorers == (BY_PEOPLE,):
        scorers = ()
    elif not scorers:
        raise BadInput(f"no scorer is named: give --scorers, the one that leads first, of {', '.join(MODULE_OF)}")
    check_names(scorers)
    with_base = run is not None and config.baseline in (None, "base")
    return Comparison(
        *sides,
        wanted_of(config, models, prompts, seeds, without_last),
        all_images=not models and config.seeds is None,
        prompt_set=_in_words(config, prompts),
        scorers=scorers,
        scoring=scoring_of(config, run),
        compare_medians=config.compare == "medians",
        training=_training(run, config.policy) if with_base else {},
        trained_towards_the_first=with_base and scorers[:1] == run.eval_scorers[:1],
    )


def prompts_in_training(run: TrainConfig, where: Where) -> list[Prompt]:
    """Return all prompts of a run's own evaluation. Raises BadInput if they cannot be read.

    Of a run with --eval_every these are half of its prompts: those that had no say in when it ended.
    """
    prompts = prompts_of_run(run, where)
    if run.eval_every is None:
        return prompts
    _, judging = in_two([prompt.text for prompt in prompts])
    if not judging:
        raise BadInput(
            f"--eval_every needs at least 2 prompts, half to look at and half to judge by, and --eval_prompts"
            f" {run.eval_prompts} has 1"
        )
    return [prompt for prompt in prompts if prompt.text in set(judging)]


def prompts_of_run(run: TrainConfig, where: Where) -> list[Prompt]:
    """Return all prompts that a run names. Raises BadInput if they cannot be read."""
    given, where = str(run.eval_prompts), where._replace(flag="--eval_prompts")
    if not is_set(given) and not exists(user_path(given)):  # a path must not be taken for the text of a prompt
        raise BadInput(
            f"--eval_prompts {given} cannot be read: it is no file and no set ({', '.join(SETS)}); name a text file,"
            " one prompt a line"
        )
    return read_prompts([given], where=where)


def batch_size_of(config: EvaluateConfig, run: TrainConfig | None) -> int:
    """How many images are generated and scored at once: by default as many as in the run's own evaluation."""
    return config.batch_size or (run.eval_batch_size if run is not None else BATCH_SIZE)


def seeds_in_training(prompts: Sequence[Prompt], images: int) -> tuple[set[str], tuple[int, ...], frozenset[str]]:
    """Share out `images` among prompts, which are taken in turn, each time with the next seed.

    Returns the prompts that get any, the seeds, and the prompts that do not get the last seed.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    rounds, rest = divmod(images, len(texts))
    asked = texts if rounds else texts[:rest]
    return set(asked), tuple(range(rounds + (rest > 0))), frozenset(texts[rest:] if rounds and rest else ())


def scoring_of(config: EvaluateConfig, run: TrainConfig | None) -> dict[str, object]:
    """The keywords of `load_scorer` that say where its files are."""
    where = config.scorer_models or (run and run.scorer_models)
    return {"where": where and user_path(where), "cache_dir": config.cache_dir, "token": config.hub_token}


def _training(run: TrainConfig, policy: str) -> dict[str, str]:
    """How a run was trained, for the report, and of which step the policy's weights are if that is not the last."""
    how = f"{run.tuning}, {run.objective}, beta {run.beta_dpo:g}, learning rate {run.learning_rate:g}"
    about = {"Trained": f"{how}, {run.max_train_steps} steps of {run.pairs_per_step} pairs, seed {run.seed}"}
    if (point := point_of(policy)) is not None:
        about["Weights"] = f"of step {point.step}" + (f" at strength {point.strength:g}" if point.strength != 1 else "")
    return about


class Point(NamedTuple):
    """Weights between those of a run's base and those of a checkpoint, or beyond them."""

    step: int
    strength: float = 1.0  # 0: the base, 1: the checkpoint

    @property
    def name(self) -> str:
        return f"step-{self.step}-x{self.strength:g}"


def point_of(policy: str) -> Point | None:
    """The point of a checkpoint, of a run that was ended early, and of a pick; None where the last step says it."""
    if is_checkpoint(policy):
        return Point(checkpoint.step_of(Path(os.path.abspath(policy))))
    if not is_run(policy) or not Path(policy, SUMMARY).is_file():
        return None
    summary = read_summary(Path(policy))
    if summary.get("ended_early"):
        return Point(summary["ended_early"]["result_of"])
    return Point(summary["steps"], summary["strength"]) if "strength" in summary else None


def _in_words(config: EvaluateConfig, prompts: list[Prompt]) -> str:
    words = ", ".join(dict.fromkeys(prompt.source for prompt in prompts))
    if config.slice is not None:
        words += f", only {config.slice}"
    return words if config.max_prompts is None else f"{words}, {len(prompts)} evenly spread"


def reference_of(
    config: EvaluateConfig, run: TrainConfig | None, models: dict[str, ModelSource], sides: tuple[Side, Side]
) -> ModelSource:
    """The model that the policy's implicit reward is measured against. Raises BadInput if there is none."""

    base, policy = sides
    if policy.folder is not None:
        raise BadInput(f"--dataset_name: {config.policy} is a folder of images, which has no implicit reward")
    if run is not None:
        return next(iter(models_of(config, config.policy, "base").values()))
    if base.folder is not None:
        raise BadInput(f"--dataset_name: the reference of {config.policy} is not known: name it with --baseline")
    return models[base.name]


def evaluation_name(config: EvaluateConfig, sides: tuple[Side, Side]) -> str:
    base, policy = (side.name for side in sides)
    if config.dataset_name is not None and not config.prompts:
        return f"{policy}-on-{Path(config.dataset_name).stem}"
    return f"{policy}-against-{base}"


def settings_of(
    config: EvaluateConfig,
    sides: tuple[Side, Side],
    models: dict[str, ModelSource],
    comparison: Comparison | None,
) -> dict[str, object]:
    """The settings that identify an evaluation's folder."""
    settings: dict[str, object] = {
        title: {"name": side.name, "of": str(models[side.name] if side.folder is None else side.folder)}
        for title, side in zip(("baseline", "policy"), sides, strict=True)
    }
    if comparison is not None:
        texts = [prompt.text for prompt in comparison.wanted.prompts]
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()
        settings["prompts"] = f"{comparison.prompt_set}: {len(texts)} of digest {digest}"
        settings["seeds"] = "all" if comparison.all_images else list(comparison.wanted.seeds)
        if comparison.wanted.without_last:
            settings["images"] = sum(len(comparison.wanted.seeds_of(text)) for text in texts)
    settings["held_out"] = config.dataset_name
    return settings
