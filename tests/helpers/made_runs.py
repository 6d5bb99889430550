"""Folders as training, sweeps and evaluations leave them, made up in a moment: no model, no images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dpo_fast.checksums import signed_text, write_signed_json
from dpo_fast.config import TrainConfig, public, to_yaml
from dpo_fast.evaluation.findings import About, judge
from dpo_fast.evaluation.scored import Scored, write_scores
from dpo_fast.evaluation.signals import MEANING, Signal
from dpo_fast.statistics import Interval, interval95

SAMPLED = {"Family": "sd15", "Sampler": "DDIMScheduler", "Steps": "50", "Guidance": "7.5", "Resolution": "512"}
PROVENANCE = {"dtype": "float32", "revisions": {"owner/scorer": "1" * 40}}


def scores(
    gain: float,
    *,
    prompts: Sequence[str] = tuple(f"prompt {number}" for number in range(30)),
    images: int = 2,  # of each prompt
    scorers: Sequence[str] = ("beauty",),
    noise: int = 0,  # of the base's images: equal numbers give equal scores
    training: int = 0,  # seed of what is peculiar to the policy
) -> Scored:
    """Scores of a base, which `noise` determines, and of a policy that is better by `gain` on average."""
    rows = len(prompts) * images
    base, policy = {}, {}
    for number, name in enumerate(scorers):
        generator = torch.Generator().manual_seed(1000 * noise + number)
        base[name] = torch.randn(rows, generator=generator, dtype=torch.float64)
        generator = torch.Generator().manual_seed(7_000_000 + 1000 * training + number)
        policy[name] = base[name] + gain + 0.5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return Scored([prompts[row // images] for row in range(rows)], [row % images for row in range(rows)], base, policy)


def about(
    policy: str = "run",
    *,
    settings: Mapping[str, str] = SAMPLED,
    base: str = "files 0123456789abcdef",
    scorers: Mapping[str, Mapping[str, object]] | None = None,
) -> About:
    models = {"base": {"model": base}, "policy": {policy: "files fedcba9876543210"}}
    return About("base", policy, "a set", "1 May", dict(settings), models=models, scorers=dict(scorers or {}))


def numbers(of: Scored, settings_of: About | None = None, *, medians: bool = False, sharper: float = 0.1):
    """The findings of an evaluation with these scores, with one signal."""
    change = Interval(sharper * 100, sharper * 100 - 5, sharper * 100 + 5)
    signals = [Signal("sharpness", MEANING["sharpness"], 100.0, 100.0 * (1 + sharper), change)]
    known = settings_of or about(scorers={name: PROVENANCE for name in of.scorers})
    return judge(of, signals, known, compare_medians=medians, resamples=500)


def run(
    folder: Path,
    of: Scored | None = None,  # None: not evaluated
    *,
    steps: int = 20,
    done: int | None = None,  # None: all, and the result is written
    lines: int = 20,
    losses: Sequence[float] | None = None,
    held_out: float | None = 0.6,
    settings_of: About | None = None,
    medians: bool = False,
    summary: Mapping[str, object] = {},
    **settings: object,
) -> Path:
    """A run's folder; `settings` are flags of training."""
    folder.mkdir(parents=True)
    flags = {"pretrained_model_name_or_path": "model", "dataset_name": "pairs.parquet", "beta_dpo": 5000.0}
    flags |= {"seed": 1, "pairs_per_step": 4, "max_train_steps": steps, "mixed_precision": "no", "output_dir": folder}
    config = TrainConfig(**flags | settings)
    (folder / "config.yaml").write_text(signed_text(to_yaml(config)))
    reached = steps if done is None else done
    lines = min(lines, reached)
    logged = [reached * (number + 1) // lines for number in range(lines)]
    values = losses or [0.69 - 0.01 * number / lines for number in range(lines)]
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": loss, "margin": 0.1, "implicit_accuracy": 0.5 + 0.1 * (step % 2)}) + "\n"
            for step, loss in zip(logged, values, strict=False)
        )
    )
    if held_out is not None:
        (folder / "validation.jsonl").write_text(json.dumps({"step": reached, "validation_accuracy": held_out}) + "\n")
    if done is not None:
        return folder
    content = {
        "steps": steps,
        "pairs_seen": steps * 4,
        "seconds": 12.0,
        "loss_last": values[-1],
        "implicit_accuracy": 0.55,
        "validation_accuracy": held_out,
        "validation_accuracy_ci95": None if held_out is None else interval95(held_out, 100),
        "overoptimised_at": None,
    }
    if of is not None:
        content |= numbers(of, settings_of, medians=medians).numbers()
        write_scores(folder / "scores.parquet", of)
    write_signed_json(folder / "summary.json", {**content, **summary})
    return folder


def evaluation(folder: Path, of: Scored, *, trained: Mapping[str, object] | None = None) -> Path:
    """An evaluation's folder. trained: settings of the run that it is of; None: the policy is no run."""
    folder.mkdir(parents=True)
    write_signed_json(folder / "evaluation.json", {"policy": {"name": "run", "of": "/elsewhere/run"}})
    summary = numbers(of).for_summary()
    if trained is not None:
        flags = {"pretrained_model_name_or_path": "model", "dataset_name": "pairs.parquet", "beta_dpo": 5000.0}
        flags |= {"seed": 1, "pairs_per_step": 4, "max_train_steps": 20, "mixed_precision": "no"}
        summary["run"] = public(TrainConfig(**flags | trained))
    write_signed_json(folder / "summary.json", summary)
    write_scores(folder / "scores.parquet", of)
    return folder
