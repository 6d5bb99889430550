"""Compare a finished run with its base on the same prompts and seeds, and keep the results in the run's folder."""

from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.config import TrainConfig
from dpo_fast.evaluation.findings import About, Findings, judge
from dpo_fast.evaluation.generation import versions
from dpo_fast.evaluation.prompts import read_lines
from dpo_fast.evaluation.report.page import page
from dpo_fast.evaluation.scored import Scored, write_scores
from dpo_fast.evaluation.signals import measure
from dpo_fast.files import user_path, write_text
from dpo_fast.models import Family
from dpo_fast.models.load import revisions
from dpo_fast.models.opened import OneAtATime
from dpo_fast.models.sampling import sample
from dpo_fast.models.source import ModelSource, base_of, result_of
from dpo_fast.parallel import Ranks
from dpo_fast.pictures import before_after, save_png, to_picture
from dpo_fast.scorers import Scorer, check_names, load_scorer, provenance

COLUMNS = 8  # of samples.png
SEED_STRIDE = 1_000_003  # so that runs with neighbouring seeds start their images from different noise


class Evaluation:
    """The evaluation that `--eval_scorers` asks for; its scorers, their files and the prompts are checked up front.

    Every scorer is loaded on the main rank's CPU and released again, so that an unavailable one is reported before
    training, which then has the GPU to itself. Raises BadInput, on every rank, for unusable scorers or prompts.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.names = list(dict.fromkeys(config.eval_scorers))
        check_names(self.names)
        lines = read_lines(config.eval_prompts, "--eval_prompts")
        self.prompts = [lines[k % len(lines)] for k in range(config.eval_images or len(lines))]

        def check() -> None:
            for name in self.names:
                _scorer(name, config, torch.device("cpu")).check(lines)

        ranks.on_main(check)

    def compare(self, config: TrainConfig, ranks: Ranks) -> Findings | None:
        """Compare the run of `config` (resolved) with its base, loading the exported result as a user would.

        Every rank generates its share. The main rank returns the findings, the others None; it also writes samples.png,
        scores.parquet and report.html into the run's folder.
        """
        seeds = [(config.seed * SEED_STRIDE + k) % 2**63 for k in range(len(self.prompts))]
        source, models = base_of(config), OneAtATime(ranks.device)
        base = self._generate(config, ranks, models, source, seeds, "base")
        about = _about(config, models.open(source), ranks.device)
        policy = self._generate(config, ranks, models, result_of(config, config.output_dir), seeds, "policy")
        del models  # free its memory before the scorers load
        if not ranks.is_main:
            return None
        self._show(base, policy, config.output_dir / "samples.png")
        scores = {}
        for name in self.names:
            scores[name] = self._score(_scorer(name, config, ranks.device), base, policy, config.eval_batch_size)
        scored = Scored(
            self.prompts,
            seeds,
            {name: of_base for name, (of_base, _) in scores.items()},
            {name: of_policy for name, (_, of_policy) in scores.items()},
        )
        findings = judge(scored, measure(base, policy, self.prompts), about)
        write_scores(config.output_dir / "scores.parquet", scored)
        write_text(config.output_dir / "report.html", page(findings, scored, base, policy))
        return findings

    def _generate(
        self,
        config: TrainConfig,
        ranks: Ranks,
        models: OneAtATime,
        source: ModelSource,
        seeds: list[int],
        title: str,
    ) -> Tensor:
        """Generate this rank's share; return all images, uint8 [N,3,H,W], on the main rank."""
        family, mine = models.open(source), slice(ranks.rank, None, ranks.world_size)
        images = sample(
            family,
            self.prompts[mine],
            seeds[mine],
            resolution=config.resolution,
            steps=config.sampling_steps,
            guidance=config.sampling_guidance,
            batch_size=config.eval_batch_size,
            describe=f"generating, {title}" if ranks.is_main else None,
        )
        whole = torch.empty(len(self.prompts), *images.shape[1:], dtype=torch.uint8)
        for rank, part in enumerate(ranks.gather(images)):
            whole[rank :: ranks.world_size] = part
        return whole

    def _score(self, scorer: Scorer, base: Tensor, policy: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """Return the scores of base and policy, fp64 [N] each."""
        parts = [slice(k, k + batch_size) for k in range(0, len(self.prompts), batch_size)]
        return tuple(
            torch.cat([scorer.score(images[part], self.prompts[part]) for part in parts]) for images in (base, policy)
        )

    def _show(self, base: Tensor, policy: Tensor, path: Path) -> None:
        """Save the first images of some evenly spread prompts, not selected by score: the base's above the policy's."""
        distinct = list(dict.fromkeys(self.prompts))
        shown = distinct[:: max(1, len(distinct) // COLUMNS)][:COLUMNS]
        rows = [self.prompts.index(prompt) for prompt in shown]
        save_png(before_after(*([to_picture(images[row]) for row in rows] for images in (base, policy)), shown), path)


def add_to_summary(folder: Path, findings: Findings, seconds: float) -> dict[str, object]:
    """Add the findings, and the seconds they took, to the run's summary.json and return it."""
    path = folder / "summary.json"
    summary = read_signed_json(path, "the training command with --resume_from_checkpoint latest writes it again")
    summary |= findings.numbers() | {"evaluation_seconds": seconds}
    write_signed_json(path, summary)
    return summary


def _scorer(name: str, config: TrainConfig, device: torch.device) -> Scorer:
    return load_scorer(name, device, **_files(config), token=config.hub_token)


def _files(config: TrainConfig) -> dict[str, object]:
    """The keyword arguments that say where the scorers' files are."""
    return {"where": config.scorer_models and user_path(config.scorer_models), "cache_dir": config.cache_dir}


def _about(config: TrainConfig, base: Family, device: torch.device) -> About:
    steps = config.sampling_steps or base.sampling_steps
    guidance = base.sampling_guidance if config.sampling_guidance is None else config.sampling_guidance
    trained = f"{config.tuning}, {config.objective}, beta {config.beta_dpo:g}, learning rate {config.learning_rate:g}"
    return About(
        base="its base",
        policy=config.output_dir.resolve().name,
        prompt_set=config.eval_prompts.name,
        date=date.today().isoformat(),
        settings={
            "Base": base_of(config).shown(),
            "Trained": f"{trained}, {config.max_train_steps} steps of {config.pairs_per_step} pairs",
            "Seed": str(config.seed),
            "Sampler": f"{type(base.pipeline.scheduler).__name__}, {steps} steps",
            "Guidance": f"{guidance:g}",
            "Resolution": f"{config.resolution} x {config.resolution}",
            "Precision": str(base.dtype).removeprefix("torch."),
            "Versions": versions(),
        },
        trained_towards_the_first=True,
        models={"base": revisions(base_of(config)), "policy": revisions(result_of(config, config.output_dir))},
        scorers={name: provenance(name, device, **_files(config)) for name in dict.fromkeys(config.eval_scorers)},
    )
