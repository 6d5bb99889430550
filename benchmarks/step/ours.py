"""Ours: the real training step, opened from flags as a user's run is, reading from the cache."""

from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.step.cases import CASES, RANK
from benchmarks.step.plain import Seen
from benchmarks.step.work import BETA, Settings
from dpo_fast.config import TrainConfig, parse
from dpo_fast.opening import Run, open_run
from dpo_fast.parallel import Ranks
from dpo_fast.trainer import Trainer


def flags(folder: Path, name: str, compiled: bool) -> list[str]:
    """The command line of the run."""
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
        "seed": 0,
    }
    if "compile" in {field.name for field in fields(TrainConfig)}:
        values["compile"] = "regional" if compiled else "off"
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*words, "--is_turbo"] if case.turbo else words


def opened(folder: Path, name: str, *, compiled: bool) -> Run:
    """The run as the command line opens it."""
    config, _ = parse(flags(folder, name, compiled))
    device = torch.device(Settings.read(folder).device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    return open_run(config, Ranks(accelerator, 0, 1, device, None))


class Ours:
    """`Trainer.train_step`, nothing added while it is timed."""

    def __init__(self, folder: Path, *, compiled: bool = True, name: str = "ours") -> None:
        self.trainer = Trainer(opened(folder, name, compiled=compiled), flags(folder, name, compiled))
        self.clock = self.trainer.clock

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.clock.waited

    def step(self) -> None:
        self.trainer.train_step()

    def observed_step(self) -> Seen:
        """A step, and what it computed."""
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
