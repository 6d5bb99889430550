"""Ours: the real training step, opened from flags as a user's run is, reading from the cache."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.step.cases import CASES, RANK
from benchmarks.step.plain import Seen
from benchmarks.step.work import BETA, Settings
from dpo_fast.command_line import parse
from dpo_fast.parallel import Ranks
from dpo_fast.training.run import Run, open_run
from dpo_fast.training.trainer import Trainer

CHOSEN_STEPS = 10_000  # of the run for which "ours-chosen" chooses


def flags(
    folder: Path, name: str, *, compiled: bool, cached_reference: bool = False, chosen: bool = False
) -> list[str]:
    """Return the run's command line; with `cached_reference` every visit of a pair has its own draw.

    chosen: as a long run chooses on this machine, instead of as `compiled` says.
    """
    settings = Settings.read(folder)
    case = CASES[settings.case]
    values = {
        "pretrained_model_name_or_path": folder / "model",
        "dataset_name": folder / "pairs.parquet",
        "latent_cache_dir": folder / "cache",
        "output_dir": folder / name,
        "resolution": case.resolution,
        "tuning": case.tuning,
        "rank": RANK,
        "mixed_precision": {"fp32": "no"}.get(settings.dtype, settings.dtype),
        "train_batch_size": settings.batch_size,
        "pairs_per_step": case.pairs,
        "max_train_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "constant",
        "beta_dpo": BETA,
        "compile": "regional" if compiled else "off",
        "seed": 0,
    }
    if cached_reference:
        values["cached_reference"] = settings.steps
    if chosen:
        values |= {"max_train_steps": CHOSEN_STEPS, "compile": "auto"}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*words, *["--is_turbo"] * case.turbo, *["--no-prove"] * (not chosen)]


def opened(folder: Path, argv: list[str]) -> Run:
    """Open the run of the command line `argv`."""
    config, _ = parse(argv)
    device = torch.device(Settings.read(folder).device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    return open_run(config, Ranks(accelerator, 0, 1, device, None))


class Ours:
    """`Trainer.train_step`, with nothing added while it is timed."""

    cached_reference = False
    chosen = False

    def __init__(self, folder: Path, name: str = "ours") -> None:
        compiled = Settings.read(folder).compiled
        argv = flags(folder, name, compiled=compiled, cached_reference=self.cached_reference, chosen=self.chosen)
        self.trainer = Trainer(opened(folder, argv), argv)
        self.clock = self.trainer.clock

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.clock.waited

    def step(self) -> None:
        self.trainer.train_step()

    def observed_step(self) -> Seen:
        """Run a step and return what it computed."""
        terms = []
        loss = self.trainer.loss

        def noted(*arguments):
            terms.append(loss(*arguments))
            return terms[-1]

        self.trainer.loss = noted
        try:
            self.trainer.train_step()
        finally:
            del self.trainer.loss
        return Seen.joined([Seen(t.policy_error, t.ref_error, t.margin, self.trainer.grad_norm) for t in terms])


class OursCached(Ours):
    """The same without a reference model, whose errors are computed while opening."""

    cached_reference = True

    def __init__(self, folder: Path, name: str = "ours-cached") -> None:
        super().__init__(folder, name)


class OursChosen(Ours):
    """The same with the defaults of a long run: what is proven and fastest on this machine."""

    chosen = True

    def __init__(self, folder: Path, name: str = "ours-chosen") -> None:
        super().__init__(folder, name)
        for line in self.trainer.run.chosen.lines:
            print(f"ours-chosen: {line}", file=sys.stderr, flush=True)
