"""`dpo_fast.train`: a run from its settings to its result, as `python -m dpo_fast.train` makes it."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_fast import output_folder, parallel
from dpo_fast.api.options import check_alone
from dpo_fast.command_line import command_of, parse_settings
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput, out_of_memory
from dpo_fast.evaluation.findings import REPORT, Findings
from dpo_fast.evaluation.prompts import Prompt
from dpo_fast.evaluation.run_evaluation import PICTURE, add_to_summary, check_request, evaluate_run
from dpo_fast.evaluation.watching import Watch
from dpo_fast.files import NO_HOME, has_home
from dpo_fast.locks import Hold
from dpo_fast.models.compiling import settings_kept
from dpo_fast.objectives import Objective, Pairs, Settings, registered
from dpo_fast.parallel import Ranks
from dpo_fast.presets import DEFAULT_BETA, PRESETS
from dpo_fast.training import plan
from dpo_fast.training.callbacks import Callback, checked
from dpo_fast.training.resume import AlreadyDone
from dpo_fast.training.run import Run, open_run, settle
from dpo_fast.training.run_folder import read_summary
from dpo_fast.training.trainer import Stopped, Trainer

logger = logging.getLogger(__name__)

OwnObjective = Objective | Callable[[Pairs, Settings], torch.Tensor] | str | None
MORE_MEMORY = (
    "lower --train_batch_size (with --pairs_per_step the result stays the same), or add --gradient_checkpointing, or"
    " --mixed_precision bf16, or --tuning lora"
)


@dataclass(frozen=True)
class TrainResult:
    """What came of a run: the same on every rank."""

    folder: Path  # the output folder
    summary: dict[str, object]  # the content of summary.json; of a stopped run the numbers so far, which no file has
    findings: Findings | None = None  # of the evaluation, if this call made one
    stopped: str | None = None  # why a callback stopped the run; None: it is done

    def __str__(self) -> str:
        """Text for the terminal."""
        summary, findings = self.summary, self.findings
        accuracy = summary["implicit_accuracy"]
        lines = [] if findings is None else [f"{findings}\n"]
        if self.stopped is not None:
            lines.append(f"stopped after step {summary['steps']}: {self.stopped}")
        first, last = (summary[name] for name in ("loss_first", "loss_last"))
        change = "no loss" if first is None or last is None else f"loss {first:.4f} -> {last:.4f}"
        lines.append(
            f"{change}, implicit accuracy {'none' if accuracy is None else f'{accuracy:.3f}'},"
            f" training {summary['seconds']:.0f} s"
            + (f", evaluation {summary['evaluation_seconds']:.0f} s" if findings is not None else "")
        )
        if findings is None:
            return "\n".join([*lines, f"folder: {self.folder}"])
        lines.append(f"before over after: {self.folder / PICTURE}")
        return "\n".join([*lines, f"report: {self.folder / REPORT}"])


def train(
    config: TrainConfig | str | Path | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    objective: OwnObjective = None,
    **settings: object,
) -> TrainResult:
    """Train a run to its end, with its evaluation if it asks for one, and return what came of it.

    The run is described by `settings`, flags of `python -m dpo_fast.train` by name (`preset="shapes",
    max_train_steps=10`), which give what the same flags give there; or by `config`, either a TrainConfig or a YAML
    recipe's path, which settings override. callbacks: called as the run goes, on every rank (`Callback`). objective: a
    name, or your own loss: an `Objective` or a function of (pairs, settings). Its name is recorded as python:NAME in
    config.yaml and checkpoints, and resuming needs it again.

    Under `accelerate launch` every process calls this. Ctrl-C and the signals of a scheduler, if this is the main
    thread, stop the run after the step in progress. Whatever this changes in the process is restored at the end.

    Raises BadInput, before long work, for settings, data or a folder that cannot be used, and for problems that only
    training shows; Interrupted, with the state saved, after a signal; OSError for a disk that is full or fails; and
    what a callback raises.
    """
    callbacks = checked(callbacks)
    with _resolved(config, objective, settings) as resolved:
        return train_resolved(resolved, callbacks)


@contextmanager
def opened_run(
    config: TrainConfig | str | Path | None = None,
    *,
    objective: OwnObjective = None,
    **settings: object,
) -> Iterator[Run]:
    """Open a run, described as for `train`, for a loop of your own: `Trainer(run).train_step()`.

    Within the block this process holds the output folder. Raises BadInput as `train` does, and AlreadyDone if
    resume_from_checkpoint="auto" finds nothing left to do.
    """
    with _resolved(config, objective, settings) as resolved, _joined(resolved) as (resolved, ranks, _):
        yield open_run(resolved, ranks)


@contextmanager
def _resolved(
    config: TrainConfig | str | Path | None, objective: OwnObjective, settings: dict[str, object]
) -> Iterator[TrainConfig]:
    """Yield the configuration that a caller described; within the block an objective of the caller's is known."""
    if not has_home():
        raise BadInput(NO_HOME)  # libraries would create a folder named ~
    with registered(None if isinstance(objective, str) else objective) as name:
        if (chosen := name or objective) is not None:
            if isinstance(config, TrainConfig):
                config = _with_objective(config, chosen)
            else:
                settings = {**settings, "objective": chosen}
        if isinstance(config, (str, Path)):
            settings = {**settings, "config": config}
        elif config is not None:
            check_alone(config, TrainConfig, settings)
            settings = _settings_of(config)
        resolved, notes = parse_settings(settings)
        for note in notes:
            logger.warning(note)
        if resolved.dry_run:
            raise BadInput("dry_run only prints, and is of the command: python -m dpo_fast.train --dry_run")
        yield resolved


def _with_objective(config: TrainConfig, name: str) -> TrainConfig:
    """Return `config` with another objective, whose default beta replaces a preset's if that is on another scale."""
    beta = config.beta_dpo
    if DEFAULT_BETA.get(name) != DEFAULT_BETA["dpo"] and beta == PRESETS.get(config.preset, {}).get("beta_dpo"):
        beta = None
    return dataclasses.replace(config, objective=name, beta_dpo=beta)


def _settings_of(config: TrainConfig) -> dict[str, object]:
    """Return all fields of a TrainConfig. Raises BadInput for one that names a recipe, which it does not read."""
    if config.config is not None:
        raise BadInput(
            f"TrainConfig(config={str(config.config)!r}) does not read the file: dpo_fast.train takes its path"
        )
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "config"}


def dry_run(config: TrainConfig) -> None:
    """Print what the run of a resolved configuration would train on and take; nothing is trained or written.

    Raises BadInput for whatever the run itself would refuse.
    """
    with _joined(config, holds=False) as (config, ranks, _):
        prompts = check_request(config, ranks) if config.eval_scorers else []
        try:
            plan.dry_run(config, ranks, images=config.eval_images or len(prompts))
        except AlreadyDone as done:
            logger.info(str(done))


@contextmanager
def _joined(config: TrainConfig, *, holds: bool = True) -> Iterator[tuple[TrainConfig, Ranks, Hold | None]]:
    """Join the launched processes and, with `holds`, hold the output folder. Yields the settled configuration."""
    with settings_kept(), parallel.joined(config.report_to) as ranks, ExitStack() as held:
        config, hold = settle(config, ranks), None
        if holds:
            hold = ranks.on_main(lambda: held.enter_context(output_folder.hold(config.output_dir)))
        yield config, ranks, hold


def train_resolved(config: TrainConfig, callbacks: tuple[Callback, ...] = ()) -> TrainResult:
    """Train the run of a configuration that `command_line.parse` has resolved. The rest is as for `train`."""
    command, remedy = command_of(config), MORE_MEMORY
    with _joined(config) as (config, ranks, hold):  # also while evaluating
        folder, trainer = config.output_dir, None
        try:
            prompts = check_request(config, ranks) if config.eval_scorers else None
            if config.eval_every is not None:
                callbacks = (Watch(config), *callbacks)
            trainer = Trainer(open_run(config, ranks), command, hold, callbacks)
            trainer.train()
            config, trainer = trainer.run.config, None  # free its memory before the evaluation loads models
            summary = ranks.from_main(lambda: read_summary(folder))
            if prompts is None:
                return TrainResult(folder, summary)
            remedy = "the training is done: the same command with --resume_from_checkpoint auto --eval_batch_size 1"
            return _evaluated(config, prompts, ranks)
        except AlreadyDone as done:
            logger.info(str(done))
            return TrainResult(folder, ranks.from_main(lambda: read_summary(folder)))
        except Stopped as stop:
            logger.info(str(stop))
            return TrainResult(folder, ranks.from_main(trainer.progress.summary), stopped=stop.reason)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, remedy) from error


def _evaluated(config: TrainConfig, prompts: list[Prompt], ranks: Ranks) -> TrainResult:
    """Compare a finished run with its base. Every rank calls this."""
    started = time.perf_counter()
    findings = ranks.share(evaluate_run(config, prompts, ranks))
    folder = config.output_dir
    summary = ranks.from_main(lambda: add_to_summary(folder, findings, time.perf_counter() - started))
    return TrainResult(folder, summary, findings)
