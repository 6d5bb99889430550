"""What a run reports: lines on the terminal, metrics.jsonl, validation.jsonl and the trackers, and its summary."""

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from dpo_fast.config import public
from dpo_fast.data.images import SAME
from dpo_fast.hub_revisions import public_name, revision_of
from dpo_fast.models import compiles, programs_made, revisions
from dpo_fast.models.source import base_of
from dpo_fast.objectives import find_objective
from dpo_fast.training import hub
from dpo_fast.training.metrics import LOGS, Clock, Extent, MetricsFile, PairSums, for_trackers, overoptimised
from dpo_fast.training.run import ENDED, Run

OVEROPTIMISED_LINES = 3  # consecutive lines that show it before it is reported: one may be chance


class Progress:
    """The reports of an opened `run`: every rank calls the methods, the main rank writes.

    `clock` times the steps between two log lines; the trainer pauses it for anything but training.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.ranks = run, run.config, run.ranks
        self.clock = Clock(run.step)
        self.seconds_before = run.notes.get("seconds", 0.0)  # spent by earlier processes of this run
        self.timed_from = 0 if "seconds" in run.notes else run.step  # the step from which the time counts
        self.last_line: dict[str, object] = run.notes.get("last_line", {})
        self.overoptimised_lines = run.overoptimised_lines  # consecutive
        self.programs: int | None = None  # compiled by the last log line; None before the first
        self.started = time.perf_counter()
        # replaced in `reporting`
        self.metrics: MetricsFile | None = None
        self.validations: MetricsFile | None = None
        self.bar = tqdm(disable=True)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Within the block the progress bar, the logs and the trackers are open."""
        run, config, main = self.run, self.config, self.ranks.is_main
        if main and config.report_to != "none":
            shown = hub.public_config(public(config))
            self.ranks.start_trackers(run.folder / config.logging_dir, config.tracker_name, shown)
        held_out = main and config.run_validation and run.validation is not None
        self.metrics, self.validations = (
            MetricsFile(run.folder / name if kept else Path(os.devnull), run.step, run.logs.get(name))
            for name, kept in zip(LOGS, (main, held_out), strict=True)
        )
        self.bar = tqdm(total=config.max_train_steps, initial=run.step, unit="step", disable=not main)
        self.started = time.perf_counter()
        try:
            yield
        finally:
            with ExitStack() as ends:  # close every one, even if another fails
                for end in (self.ranks.end_trackers, self.validations.close, self.metrics.close, self.bar.close):
                    ends.callback(end)

    def say(self, message: str) -> None:
        """Print `message` to stderr, from the main rank."""
        if self.ranks.is_main:
            tqdm.write("\n".join(f"dpo_fast: {line}" for line in message.splitlines()), file=sys.stderr)

    def log(self, sums: PairSums, grad_norm: torch.Tensor) -> dict[str, object]:
        """Read the device's sums (which waits for it), write a line of metrics and return it."""
        run, config, masters = self.run, self.config, self.run.masters
        means = sums.read(self.ranks.sum_)
        norm = grad_norm.item()
        seconds, waited = self.clock.read(run.step)
        line = {
            "step": run.step,
            **means,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": masters.lr(run.step - 1),
            "step_time": seconds,
            "data_wait": waited,
            "pairs_per_second": config.pairs_per_step / seconds,
            "peak_memory_gib": peak_memory_gib(self.ranks.device),
            "skipped_updates": int(masters.skipped.item()),
        }
        self.last_line = line
        if run.step == 1:
            # with cached errors the margin was measured at the start, and that value is kept
            run.notes = {"loss_first": line["loss"], "initial_margin_rms": line["margin_rms"]} | run.notes
        self._check_programs()
        if self.ranks.is_main:
            self.metrics.write(line)
            self.ranks.accelerator.log(for_trackers(line), step=run.step)
            shown = ("loss", "implicit_accuracy", "grad_norm")
            self.bar.set_postfix({name: f"{line[name]:.4g}" for name in shown if line[name] is not None})
            self._check_overoptimised(line)
        return line

    def log_validation(self, accuracy: float) -> None:
        """Write the held-out implicit accuracy. Only the main rank calls this."""
        step = self.run.step
        self.validations.write({"step": step, "validation_accuracy": accuracy})
        self.ranks.accelerator.log({"validation_accuracy": accuracy}, step=step)
        self.say(f"step {step}: held-out implicit accuracy {accuracy:.4f}")

    def log_picture(self, sheet: Image.Image) -> None:
        """Send the picture of the samples to the trackers. Only the main rank calls this."""
        self.ranks.track_picture("samples", sheet, self.run.step)

    def extents(self) -> dict[str, Extent]:
        """Return name of a log -> its extent so far, for a checkpoint."""
        return {log.path.name: extent for log in (self.metrics, self.validations) if (extent := log.extent())}

    def seconds(self) -> float:
        """Wall time in seconds spent on this run so far, over all processes that continued it."""
        return self.seconds_before + time.perf_counter() - self.started

    def _check_overoptimised(self, line: dict[str, object]) -> None:
        self.overoptimised_lines = self.overoptimised_lines + 1 if overoptimised(line) else 0
        if self.overoptimised_lines == OVEROPTIMISED_LINES and "overoptimised_at" not in self.run.notes:
            self.run.notes["overoptimised_at"] = self.run.step
            self.say(
                f"step {self.run.step}: over-optimisation: accuracy is {line['implicit_accuracy']:.2f} while the policy"
                " has become worse than the reference on both images. Raise --beta_dpo or lower --learning_rate,"
                " and look at samples before trusting the loss"
            )

    def _check_programs(self) -> None:
        """Report once if a program was compiled after the first step, which takes time and changes rounding."""
        if not compiles(self.config.compile):
            return
        made = programs_made()
        if self.programs is not None and made > self.programs and "compiled_again_at" not in self.run.notes:
            self.run.notes["compiled_again_at"] = self.run.step
            self.say(
                f"step {self.run.step}: {made - self.programs} more programs were compiled since the first step;"
                " TORCH_LOGS=recompiles shows why"
            )
        self.programs = made

    # ---- before the first step and after the last ---------------------------------------------------------------

    def overview(self) -> str:
        """Describe what is about to happen, in a few lines."""
        run, config, masters, family = self.run, self.config, self.run.masters, self.run.family
        trained = sum(master.numel() for master in masters.masters)
        precision = "fp32" if config.mixed_precision == "no" else f"{config.mixed_precision} with fp32 masters"
        held_out = f", {len(run.validation)} held out" if run.validation is not None else ""
        if config.streaming:
            pairs = "pairs: streamed"
        else:
            pairs = f"pairs: {len(run.sets.train)} of {run.sets.rows} rows{held_out}, {run.sets.left_out}"
        return "\n".join(
            (
                f"{family.name} {config.tuning} on {self.ranks.world_size} x {self.ranks.device.type},"
                f" {precision}, {trained:,} parameters trained",
                pairs,
                f"cache: {self._cache_overview()}",
                f"reference: {self._reference_overview()}",
                f"steps: {run.step} to {config.max_train_steps}, each {config.pairs_per_step} pairs"
                f" ({self.ranks.world_size} processes x {config.train_batch_size} x"
                f" {config.gradient_accumulation_steps}) at {config.resolution} px,"
                f" {len(family.timesteps)} timesteps ({family.timesteps[0]} to {family.timesteps[-1]})",
                *(f"choice: {line}" for line in run.chosen.lines),
                f"objective: {config.objective}, beta {config.beta_dpo:g}, lr {masters.base_lr:g}, seed {config.seed}",
                f"output: {run.folder}",
            )
        )

    def _cache_overview(self) -> str:
        """Describe what came from the cache, or that there is none."""
        counts = self.run.cached
        if counts is None:
            return "none, images and captions are encoded at every visit"
        kept = "; encoders kept for the samples" if self.config.run_validation else ""
        return (
            f"{counts.image_uses} images are {counts.images} different ones, {counts.captions} captions"
            f" {counts.prompts}; encoded now {counts.images_encoded} and {counts.prompts_encoded}{kept}"
        )

    def _reference_overview(self) -> str:
        """Describe where the reference's errors come from."""
        run = self.run
        if run.scored is None:
            return "run at every visit" if find_objective(self.config.objective).needs_reference else "none"
        return (
            f"cached errors at {run.scored.errors.draws} draws, {run.scored.pair_draws} pairs in all,"
            f" {run.scored.scored_now} computed now in {run.scored.seconds:.0f} s; the first margins are"
            f" {run.start.initial_margin_rms:.2g} rms, {run.start.noise_floor:.2g} is rounding"
        )

    def summary(self) -> dict[str, object]:
        """Return the fields of summary.json, except the result's files and where it was uploaded."""
        run, config, line = self.run, self.config, self.last_line
        seconds = self.seconds()
        steps = run.step - self.timed_from
        return {
            "steps": run.step,
            "pairs_seen": run.step * config.pairs_per_step,
            "seconds": seconds,  # over all processes that trained: those killed count up to their last checkpoint
            "pairs_per_second": steps * config.pairs_per_step / seconds,
            "loss_first": run.notes.get("loss_first"),
            "loss_last": line.get("loss"),
            "implicit_accuracy": line.get("implicit_accuracy"),
            "validation_accuracy": run.notes.get("validation_accuracy"),
            "validation_accuracy_ci95": run.notes.get("validation_accuracy_ci95"),
            "ties_dropped": run.sets.ties_dropped,
            "unlabelled": run.sets.unlabelled,
            "contradicted": run.sets.contradicted,  # None: images were not compared
            "duplicates": run.sets.duplicates,
            "captions_cut": run.captions_cut,  # pairs whose captions are longer than the text encoders take
            "bad_rows": len(run.bad_rows),
            "identical_images": sum(bad.reason.endswith(SAME) for bad in run.bad_rows.values()),  # of the bad rows
            "initial_margin_rms": run.notes.get("initial_margin_rms"),
            "skipped_updates": int(run.masters.skipped.item()),
            "overoptimised_at": run.notes.get("overoptimised_at"),
            "looks": (run.notes.get("watch") or {}).get("looks"),  # of --eval_every
            "ended_early": run.notes.get(ENDED),  # by --stop_when_worse: at which step, and the step of the result
            "choices": run.notes.get("choices"),  # tables of what was proven and timed on this machine, and chosen
            "revisions": self._revisions(),
        }

    def _revisions(self) -> dict[str, str]:
        """Name of each input of the run -> its revision on the hub, or a digest of its files."""
        dataset = self.config.dataset_name
        return revisions(base_of(self.config)) | {public_name(dataset): revision_of(dataset, kind="dataset")}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: the allocator's on a GPU, the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
