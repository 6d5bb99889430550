"""A finished run against its base: the same prompts and seeds through both, every scorer's verdict, and a picture."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dpo_fast.config import TrainConfig
from dpo_fast.evaluation.models import OneAtATime, base_of, result_of
from dpo_fast.evaluation.prompts import read_lines
from dpo_fast.evaluation.scorers import load_scorer
from dpo_fast.evaluation.signals import LESS_DIVERSE
from dpo_fast.evaluation.statistics import WinRate, diversity, win_rate
from dpo_fast.files import write_json
from dpo_fast.models import Family
from dpo_fast.parallel import Ranks
from dpo_fast.sampling import before_after, sample, save_png, to_picture

COLUMNS = 8  # of samples.png
SEED_STRIDE = 1_000_003  # so that the images of neighbouring seeds of a run start from other noise


@dataclass(frozen=True)
class Judged:
    """One scorer's means over the images of base and policy, and how often the policy's image is the better one."""

    name: str
    base: float
    policy: float
    win_rate: WinRate


@dataclass(frozen=True)
class Comparison:
    """What an evaluation found. `scores` are in the order asked for: the first is the one that was trained towards."""

    scores: list[Judged]
    diversity_base: float | None  # None: no prompt has two images
    diversity_policy: float | None
    images: int
    prompts: int  # distinct
    seconds: float

    def for_summary(self) -> dict[str, object]:
        """The keys this adds to summary.json."""
        first = self.scores[0]
        return {
            "scorer": first.name,
            "win_rate": first.win_rate.rate,
            "win_rate_ci95": [first.win_rate.low, first.win_rate.high],
            "score_base": first.base,
            "score_policy": first.policy,
            "prompts": self.prompts,
            "images": self.images,
            "diversity_base": self.diversity_base,
            "diversity_policy": self.diversity_policy,
            "scores": {s.name: {**asdict(s), "win_rate": s.win_rate._asdict()} for s in self.scores},
            "evaluation_seconds": self.seconds,
        }

    def __str__(self) -> str:
        rows = [f"{'':14}{'base':>8}{'policy':>9}   win rate [95% interval]"]
        for s in self.scores:
            rows.append(f"{s.name:14}{s.base:8.4f}{s.policy:9.4f}   {s.win_rate}")
        if self.diversity_base is not None:
            rows.append(f"{'diversity':14}{self.diversity_base:8.4f}{self.diversity_policy:9.4f}")
        return "\n".join([*rows, *self.warnings()])

    def warnings(self) -> list[str]:
        """Signs that the policy was spoilt rather than aligned, each in one line."""
        first, *others = self.scores
        found = []
        if first.win_rate.high < 0.5:
            found.append(
                f"over-optimisation: the policy loses on {first.name}, what it was trained towards; raise --beta_dpo,"
                " lower --learning_rate, take fewer steps"
            )
        for s in others:
            if s.win_rate.high < 0.5:
                found.append(f"paid for with {s.name}: the policy wins only {s.win_rate}")
        if self.diversity_base and self.diversity_policy < LESS_DIVERSE * self.diversity_base:
            found.append(f"diversity is {self.diversity_policy / self.diversity_base:.0%} of the base's")
        return found


class Evaluation:
    """What `--eval_scorers` asks for, checked before any training: the scorers and the prompts."""

    def __init__(self, config: TrainConfig) -> None:
        self.scorers = {name: load_scorer(name) for name in config.eval_scorers}
        lines = read_lines(config.eval_prompts, "--eval_prompts")
        self.prompts = [lines[k % len(lines)] for k in range(config.eval_images or len(lines))]
        for scorer in self.scorers.values():
            scorer.check(lines)

    def compare(self, config: TrainConfig, ranks: Ranks) -> Comparison | None:
        """Evaluate what the run of `config` (resolved) exported, from its folder as a user would load it.

        The main rank gets the comparison and writes samples.png; every rank generates its share.
        """
        started = time.perf_counter()
        mine = slice(ranks.rank, None, ranks.world_size)
        models = OneAtATime(ranks.device)
        base = self._generate(config, ranks, models.open(base_of(config)), mine, "base")
        policy = self._generate(config, ranks, models.open(result_of(config, config.output_dir)), mine, "policy")
        if not ranks.is_main:
            return None
        scores = []
        for name, scorer in self.scorers.items():
            before, after = scorer.score(base, self.prompts), scorer.score(policy, self.prompts)
            rate = win_rate(before, after, self.prompts)
            scores.append(Judged(name, before.mean().item(), after.mean().item(), rate))
        distinct = list(dict.fromkeys(self.prompts))
        shown = distinct[:: max(1, len(distinct) // COLUMNS)][:COLUMNS]  # their first images, whatever these are like
        rows = [self.prompts.index(prompt) for prompt in shown]
        sheet = before_after(*([to_picture(images[row]) for row in rows] for images in (base, policy)), shown)
        save_png(sheet, config.output_dir / "samples.png")
        return Comparison(
            scores,
            diversity(base, self.prompts),
            diversity(policy, self.prompts),
            images=len(self.prompts),
            prompts=len(set(self.prompts)),
            seconds=time.perf_counter() - started,
        )

    def _generate(self, config: TrainConfig, ranks: Ranks, family: Family, mine: slice, title: str) -> torch.Tensor:
        """All images uint8 [N,3,H,W] on the main rank."""
        images = sample(
            family,
            self.prompts[mine],
            [(config.seed * SEED_STRIDE + k) % 2**63 for k in range(len(self.prompts))][mine],
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


def add_to_summary(folder: Path, comparison: Comparison) -> dict[str, object]:
    """Add the findings to the run's summary.json and return it."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) | comparison.for_summary()
    write_json(folder / "summary.json", summary)
    return summary
