"""Watch a run while it trains: compare its images with the base's every so often, and end it when they get worse.

The prompts are the half of the run's that `dpo_fast.pick` picks by; the evaluation at the end takes the other half, so
that what stopped a run does not judge it.
"""

import hashlib
import json
from collections.abc import Mapping

import torch

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.formats import difference
from dpo_fast.evaluation.generation import noise_seed
from dpo_fast.evaluation.halving import in_two
from dpo_fast.evaluation.prompts import Where
from dpo_fast.evaluation.sides import prompts_of_run
from dpo_fast.files import user_path
from dpo_fast.models import not_compiled
from dpo_fast.models.sampling import sample
from dpo_fast.scorers import load_scorer
from dpo_fast.statistics import Bootstrap, win_rate
from dpo_fast.training.callbacks import Callback
from dpo_fast.training.trainer import Trainer

NOTE = "watch"  # in a run's notes, which its checkpoints keep


class Watch(Callback):
    """Compares by the first scorer of the run every `eval_every` steps; every rank makes its share of the images."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises BadInput for prompts that cannot be read."""
        self.config, self.scorer = config, config.eval_scorers[0]
        prompts = [prompt.text for prompt in prompts_of_run(config, Where(config.cache_dir, config.hub_token))]
        texts, _ = in_two(prompts)
        images = config.eval_every_images
        self.texts = [texts[k % len(texts)] for k in range(images)]  # of each image: in turn, each time a further seed
        self.seeds = [noise_seed(text, k // len(texts)) for k, text in enumerate(self.texts)]

    def on_start(self, trainer: Trainer) -> None:
        """Say what the looks will cost, and look at the base, unless an earlier process of this run did."""
        run, every = trainer.run, self.config.eval_every
        if run.step >= trainer.last_step:
            return
        if (note := run.notes.get(NOTE)) is not None:
            self._check_same(note)
            return
        if run.step:
            raise BadInput(
                f"--eval_every {every}: this run was begun without it, and its base is no longer at hand; leave it out,"
                " and use dpo_fast.pick when the run is done"
            )
        looks = -(-self.config.max_train_steps // every)
        prompts = len(set(self.texts))
        trainer.say(
            f"every {every} steps {len(self.texts)} images of {prompts} prompts are scored by {self.scorer}:"
            f" {looks} looks and the base, {(looks + 1) * len(self.texts)} images in all"
        )
        base = self._scores(trainer).tolist()
        run.notes[NOTE] = {**self._images(), "base": base, "best": None, "looks": []}

    def _images(self) -> dict[str, object]:
        """What a look's scores are of: those of two looks can be compared if this is the same."""
        prompts = hashlib.blake2b(json.dumps(self.texts).encode(), digest_size=8).hexdigest()
        return {"scorer": self.scorer, "images": len(self.texts), "prompts": prompts}

    def _check_same(self, note: Mapping[str, object]) -> None:
        """Raise BadInput if the looks so far were at other images, or by another scorer."""
        flags = {"scorer": "eval_scorers", "images": "eval_every_images", "prompts": "eval_prompts"}
        for name, now in self._images().items():
            if (before := note.get(name, now)) != now:
                change = "differs" if name == "prompts" else f"was {before} and is {now}"
                raise BadInput(
                    f"--{flags[name]} {change}, so that looks before and after cannot be compared: give what the run"
                    " was begun with, or leave --eval_every out"
                )

    def on_step(self, trainer: Trainer) -> None:
        """Look, save the best so far, and end the run if it has become worse than that."""
        run = trainer.run
        if run.step % self.config.eval_every and run.step != self.config.max_train_steps:
            return
        note, scores = run.notes[NOTE], self._scores(trainer)
        base, over_prompts = torch.tensor(note["base"], dtype=torch.float64), Bootstrap(self.texts)
        gain, rate = over_prompts.mean(scores - base), win_rate(base, scores, self.texts, over_prompts)
        note["looks"].append({"step": run.step, "gain": [*gain], "win_rate": [*rate[:3]]})
        best = note["best"]
        is_best = best is None or scores.mean().item() > sum(best["scores"]) / len(best["scores"])
        said = f"step {run.step}: {self.scorer} {difference(gain)}, win rate {rate}"
        if is_best:
            note["best"] = {"step": run.step, "scores": scores.tolist()}
            trainer.say(f"{said}; the best so far")
            trainer.save_soon()
        else:
            lost = over_prompts.mean(scores - torch.tensor(best["scores"], dtype=torch.float64))
            trainer.say(f"{said}; {difference(lost)} against step {best['step']}, the best so far")
            if self.config.stop_when_worse and lost.high < 0:
                trainer.end_with(best["step"])
        if trainer.ranks.is_main:
            values = {f"eval_gain_{self.scorer}": gain.value, f"eval_win_rate_{self.scorer}": rate.rate}
            trainer.ranks.accelerator.log(values, step=run.step)

    def _scores(self, trainer: Trainer) -> torch.Tensor:
        """Score images of the weights that would be exported now: fp64 [images], the same on every rank."""
        ranks, config, family = trainer.ranks, self.config, trainer.family
        mine = range(ranks.rank, len(self.texts), ranks.world_size)
        texts = [self.texts[k] for k in mine]
        scores = torch.zeros(len(mine), dtype=torch.float64)
        trainer.finish_queued_work()
        with trainer.clock.paused(), not_compiled(), trainer.masters.showing_export():
            if texts:
                images = sample(
                    family,
                    texts,
                    [self.seeds[k] for k in mine],
                    resolution=trainer.config.resolution,
                    steps=config.sampling_steps,
                    guidance=config.sampling_guidance,
                    batch_size=config.eval_batch_size,
                )
                where = config.scorer_models and user_path(config.scorer_models)
                scorer = load_scorer(
                    self.scorer, ranks.device, where=where, cache_dir=config.cache_dir, token=config.hub_token
                )
                batches = range(0, len(texts), config.eval_batch_size)
                parts = [slice(first, first + config.eval_batch_size) for first in batches]
                scores = torch.cat([scorer.score(images[part], texts[part]) for part in parts]).double().cpu()
        found = torch.zeros(len(self.texts), dtype=torch.float64)
        for rank, of_rank in enumerate(ranks.gather(scores.tolist())):
            found[rank :: ranks.world_size] = torch.tensor(of_rank, dtype=torch.float64)
        if not found.isfinite().all():
            text = self.texts[int((~found.isfinite()).nonzero()[0])]
            raise BadInput(
                f"step {trainer.run.step}: {self.scorer} gives an image of {text!r:.80} no finite score: lower"
                " --learning_rate, or take another scorer"
            )
        return found
