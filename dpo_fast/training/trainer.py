"""The trainer: one optimizer step on one screen, and what happens around the steps."""

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image

from dpo_fast.checksums import write_signed_json
from dpo_fast.cli import acknowledge, on_signals
from dpo_fast.config import public
from dpo_fast.data import BadRow, Batch, validation_loader, write_report
from dpo_fast.data.images import SAME
from dpo_fast.data.pairs import faulty, too_many_bad
from dpo_fast.errors import BadInput, mark_of_this_rank
from dpo_fast.files import write_text
from dpo_fast.forward import Predictions, conditioning_of, predict
from dpo_fast.kernels import dispatch
from dpo_fast.locks import Hold
from dpo_fast.models import (
    Conditioning,
    nonfinite_rows,
    nonfinite_tensors,
    not_compiled,
    sampling,
)
from dpo_fast.models.trained import read_trained
from dpo_fast.objectives import Terms, evaluate, find_objective
from dpo_fast.pictures import before_after, save_png
from dpo_fast.statistics import interval95
from dpo_fast.training import checkpoint, hub, run_folder
from dpo_fast.training.callbacks import Callback, Callbacks, checked
from dpo_fast.training.exports import write_result
from dpo_fast.training.metrics import PairSums
from dpo_fast.training.model_card import model_card
from dpo_fast.training.progress import Progress
from dpo_fast.training.run import COUNTS, ENDED, Run, sample_settings

MANY_SKIPPED = 0.2  # fraction of skipped updates above which a finished run warns
REPEAT_SECONDS = 2.0  # signals within this time count as one: a scheduler and a launcher may both send it
# Signals that ask a run to stop: Ctrl-C, a scheduler's end, Slurm's warning before that, a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and the message says where."""


class Stopped(Interrupted):
    """A callback asked the run to stop, and no signal did. `reason`: what the callback said."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Trainer:
    """Trains an opened `run`. `argv` are the flags of a command line for it, for the model card; `hold` is the main
    rank's hold on the output folder, None if nobody else writes there; `callbacks` are called as the run goes.
    """

    def __init__(
        self,
        run: Run,
        argv: Sequence[str] = (),
        hold: Hold | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.run, self.argv, self.hold, self.callbacks = run, [*argv], hold, Callbacks(checked(callbacks))
        self.config, self.ranks, self.family = run.config, run.ranks, run.family
        self.unet, self.masters, self.reference = run.family.unet, run.masters, run.reference
        self.objective = find_objective(run.config.objective)
        self.sums = PairSums(run.ranks.device, run.family.schedule.num_train_timesteps)
        if run.sums and run.ranks.is_main:
            self.sums.load_state(run.sums)
        self.nonfinite_pair = torch.tensor(-1, device=run.ranks.device)  # id of a pair whose latents are not finite
        self.nonfinite_caption = self.nonfinite_pair.clone()  # id of a pair whose caption's embedding is not finite
        run.notes.setdefault("trained", run.step > 0)  # whether any pair had weight; earlier versions did not record it
        self.bad_at_start = {bad.row for bad in run.sets.bad}  # empty for a stream
        self.grad_norm = torch.zeros((), device=run.ranks.device)
        self.progress = Progress(run)
        self.clock, self.say = self.progress.clock, self.progress.say
        self.bad_rows_met: list[BadRow] = []  # by this rank, since they were last shared
        self.signal: str | None = None
        self.signalled_at = 0.0
        self.stop_reason: str | None = None  # of a callback
        self.problem: BadInput | None = None
        self.saved_at = time.monotonic()
        self.save_asked = False  # by a callback
        self.base_samples: list[Image.Image] = []  # only on the main rank of a run that validates

    # ---- one step ----------------------------------------------------------------------------------------------

    def train_step(self) -> bool:
        """Take one optimizer step over `pairs_per_step` pairs. Returns False if asked to stop before it was complete.

        Does not synchronise CPU and GPU, except for optimizers that cannot skip an update on the device
        (`MasterOptimizer`) and, without the cache, to copy the captions' tokens.
        """
        passes = self.config.gradient_accumulation_steps
        sums_before = self.sums.state()
        loss = torch.zeros(1, device=self.ranks.device)
        reward = torch.zeros(1, device=self.ranks.device)
        for _ in range(passes):
            if self._is_to_stop():
                self.masters.drop_gradients()
                self.sums.load_state(sums_before)
                return False
            # draw: the loader has drawn each pair's timestep, flip, crop and dropout
            batch = self._next_batch()
            latents, conditioning = self.encode(batch)
            # noise, reference, policy: one draw for both images and both models
            predictions = self.predict(batch, latents, conditioning)
            # loss
            terms = self.loss(predictions, batch)
            self._count(self.sums, terms, batch)
            loss += terms.loss.detach() / passes
            if terms.implicit_reward is not None:
                rewards = terms.implicit_reward.view(2, -1) * batch.weight
                reward += rewards.sum() / (2 * batch.weight.sum()).clamp(min=1) / passes
            # backward: gradients are summed in fp32
            (terms.loss * self.masters.loss_scale).backward()
            self.masters.accumulate()
        # step: one reduction over the ranks, then clip and update, or skip
        self.masters.reduce(self.ranks, loss, reward)
        self.grad_norm = self.masters.step(self.run.step, loss[0], self.ranks.world_size * passes)
        self.run.kl = (reward[0] / self.ranks.world_size).nan_to_num(0.0, 0.0).clamp(min=0)
        self.run.step += 1
        return True

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[torch.Tensor, Conditioning]:
        """Return latents fp16 [2B,C,h,w] and conditioning [B,...]; a dropped caption is the model's empty prompt."""
        if batch.latents is not None:  # from the cache
            latents, encoded = batch.latents, batch.conditioning
        else:
            latents = self.family.encode_images(batch.pixels, self.config.vae_encode_batch_size)
            nonfinite = nonfinite_rows(latents).view(2, -1).any(0)
            self.nonfinite_pair = torch.maximum(self.nonfinite_pair, torch.where(nonfinite, batch.pair_id, -1).max())
            encoded = self.family.encode_prompts(batch.captions)
            for embeddings in encoded.values():
                bad = torch.where(nonfinite_rows(embeddings), batch.pair_id, -1).max()
                self.nonfinite_caption = torch.maximum(self.nonfinite_caption, bad)
        return latents, conditioning_of(self.family, batch, encoded)

    def predict(self, batch: Batch, latents: torch.Tensor, conditioning: Conditioning) -> Predictions:
        """Return the predictions of policy and reference for a micro-batch encoded by `encode`."""
        seed = self.config.seed
        return predict(self.family, self.unet, self.reference, batch, latents, conditioning, seed)

    def loss(self, predictions: Predictions, batch: Batch) -> Terms:
        """Evaluate the objective on a micro-batch."""
        config = self.config
        settings = self.objective.settings.of(
            beta=config.beta_dpo, label_smoothing=config.label_smoothing, kl=self.run.kl
        )
        return evaluate(self.objective, *predictions, settings, label=batch.label, weight=batch.weight)

    # ---- around the steps --------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to max_train_steps, then write the result.

        Raises Interrupted after a signal or a callback's request (then Stopped), once the state is saved, and BadInput
        for problems that only training shows.
        """
        config, run = self.config, self.run
        trains = run.step < self.last_step
        self.say(self.progress.overview() if trains else f"all {run.step} steps are done: writing the result")
        backend = dispatch.backend(config.backend) if config.backend != "auto" else nullcontext()
        with backend, self._watch_signals(), self.progress.reporting(), self.callbacks.around(self):
            if config.run_validation and trains:
                with not_compiled():
                    self._sample_base()
            self.clock.restart(run.step)
            while run.step < self.last_step:
                try:
                    whole = self.train_step()
                except Exception as error:  # perhaps from a pair only this rank read
                    mark_of_this_rank(error)
                    raise
                if not whole:
                    self._stop()
                self.progress.bar.update()
                self.callbacks.call("on_step", self)
                last = run.step == self.last_step
                if run.step == 1 or run.step % config.log_every == 0 or last:
                    self.log()
                    self._raise_problems()
                validating = config.run_validation and (run.step % config.validation_steps == 0 or last)
                saving = run.step % config.checkpointing_steps == 0 or last or self.save_asked or self._minutes_are_up()
                if validating or saving:
                    self.finish_queued_work()
                with self.clock.paused(), not_compiled():
                    if validating:
                        self.validate()
                    if saving:
                        self.save()
            if self._is_to_stop():
                self._stop()  # the saved state is enough: the command that resumes writes the result
            with not_compiled():
                self.finish()
        if config.eval_scorers and self.ranks.any(self.signal is not None):
            raise Interrupted(f"{self.signal or 'stopped'} before the evaluation; {self._go_on()}")

    def stop(self, reason: str) -> None:
        """Ask the run to stop after the step in progress, as a signal does: the state is saved, no result is written.

        For callbacks; any rank may call it. `reason` is what `Stopped` and `TrainResult.stopped` say.
        """
        self.stop_reason = self.stop_reason or str(reason) or "no reason was given"

    def save_soon(self) -> None:
        """Save a checkpoint of the step in progress, once its line of metrics is written. Every rank calls this."""
        self.save_asked = True

    def end_with(self, step: int) -> None:
        """End the training after the step in progress, with the weights of checkpoint `step` as the result.

        For callbacks, which call it on every rank, of a run with `--stop_when_worse`.
        """
        self.run.notes[ENDED] = {"at": self.run.step, "result_of": step}
        self.say(f"ended after step {self.run.step}: the result is that of step {step}")

    @property
    def last_step(self) -> int:
        """The step after which the result is written."""
        return self.run.last_step

    def log(self) -> None:
        """Write a line of metrics and check for problems. Between steps, this is where the CPU waits for the device."""
        line = self.progress.log(self.sums, self.grad_norm)
        self._check_health(line)
        self._share_bad_rows()
        self.callbacks.call("on_log", self, {**line})
        self.clock.restart(self.run.step)

    def validate(self) -> None:
        """Measure the held-out implicit accuracy and draw the before-over-after picture, for the weights to export."""
        run, accuracy = self.run, None
        with self.masters.showing_export():
            if run.validation is not None and self.objective.has_margin:
                accuracy = self._held_out_accuracy()
                if accuracy is None:
                    self.say(f"step {run.step}: no held-out pair could be decoded")
                else:
                    run.notes["validation_accuracy"] = accuracy
                    # a pair's draws are not independent, so the sample size is the number of pairs
                    run.notes["validation_accuracy_ci95"] = interval95(accuracy, len(run.validation))
            if self.ranks.is_main:
                after = self._sample()
        picture = run.folder / "samples" / f"step-{run.step}.png"
        if self.ranks.is_main:
            sheet = before_after(self.base_samples, after, run.prompts)
            save_png(sheet, picture)
            self.progress.log_picture(sheet)
            if accuracy is not None:
                self.progress.log_validation(accuracy)
        self.ranks.wait()
        self.callbacks.call("on_validate", self, accuracy, picture)

    @torch.no_grad()
    def _held_out_accuracy(self) -> float | None:
        sums = PairSums(self.ranks.device, self.family.schedule.num_train_timesteps)
        batches = validation_loader(
            self.run.validation,
            batch_size=self.config.train_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            num_workers=self.config.dataloader_num_workers,
            pin_memory=self.ranks.device.type == "cuda",
        )
        for batch in batches:
            self.bad_rows_met += [BadRow(row, "", reason) for row, reason in batch.bad]
            batch = batch.to(self.ranks.device, non_blocking=True)
            predictions = self.predict(batch, *self.encode(batch))
            self._count(sums, self.loss(predictions, batch), batch)
        return sums.read(self.ranks.sum_)["implicit_accuracy"]

    def save(self) -> None:
        """Write checkpoint-N on the main rank. Every rank calls this."""
        run = self.run
        self._share_bad_rows()
        self.ranks.on_main(self._check_hold)
        run.notes["trained"] |= self.ranks.any(self.sums.had_pairs())
        sums = self.sums.state()
        self.ranks.sum_(list(sums.values()))
        if self.ranks.is_main:
            files, values = self.masters.state()
            files["counters"]["kl"] = run.kl
            files["metrics"] = sums
            run.notes |= {"seconds": self.progress.seconds(), "last_line": self.progress.last_line}
            state = {
                "step": run.step,
                "pairs_seen": run.step * self.config.pairs_per_step,
                "config": public(self.config),
                "fingerprints": run.fingerprints,
                "optimizer_values": values,
                "notes": run.notes,
                "counts": {name: getattr(run.sets, name) for name in COUNTS},
                "overoptimised_lines": self.progress.overoptimised_lines,
                "bad_rows": [list(bad) for bad in run.bad_rows.values()],
                "logs": self.progress.extents(),
            }
            checkpoint.save(run.folder, run.step, files, state)
            self._prune()
        self.ranks.wait()
        self.saved_at, self.save_asked = time.monotonic(), False
        self.callbacks.call("on_save", self, checkpoint.folder_of(run.folder, run.step))

    def finish(self) -> None:
        """Write the result, summary.json and the model card, and upload them if asked.

        Raises BadInput, on every rank, if no pair or no update reached the weights or if they are not finite.
        """
        run, config = self.run, self.config
        self.ranks.on_main(self._check_hold)
        self._check_result()
        if self.ranks.is_main:
            result = run_folder.publish(run.folder, self._export)
            summary = self.progress.summary() | {"result": result}
            counts = {"rows": run.sets.rows, "ties_dropped": run.sets.ties_dropped, "bad_rows": len(run.bad_rows)}
            sampler = self.family.sampler
            scheduler = (sampler.kind.__name__, sampler.changes) if sampler.changes else None
            pipeline = self.family.pipeline_class
            home = "diffusers" if pipeline.__module__.startswith("diffusers.") else pipeline.__module__
            card = model_card(public(config), summary, counts, pipeline.__name__, self.argv, scheduler, home)
            write_text(run.folder / "README.md", card)
            self._prune()  # a process killed earlier may not have
            write_signed_json(run.folder / run_folder.SUMMARY, summary)  # last: it marks the run as finished
            late = [bad for row, bad in run.bad_rows.items() if row not in self.bad_at_start]
            if late:
                same = sum(bad.reason.endswith(SAME) for bad in late)
                self.say(
                    f"{len(late)} rows were left out when they were met, {same} of them with identical images:"
                    f" {run.report_path} lists them"
                )
            self.say(f"done, the result is in {run.folder}")
            if config.push_to_hub:
                summary["uploaded"] = hub.push(run.folder, config.hub_model_id, config.hub_token)
                write_signed_json(run.folder / run_folder.SUMMARY, summary)
                self.say(f"uploaded to {summary['uploaded']}")
        self.ranks.wait()

    # ---- small parts -------------------------------------------------------------------------------------------

    def _next_batch(self) -> Batch:
        with self.clock.waiting():
            batch = next(self.run.batches)
        self.bad_rows_met += [BadRow(row, "", reason) for row, reason in batch.bad]
        return batch.to(self.ranks.device, non_blocking=True)

    def _share_bad_rows(self) -> None:
        """Share the bad rows met in training, and set `problem` if there are too many. Every rank calls this.

        Pairs whose images do not decode have weight 0; a stream leaves out the other bad rows when it meets them.
        """
        run, allowed = self.run, self.config.max_bad_fraction
        known = len(run.bad_rows)
        for rows in self.ranks.gather([*self.bad_rows_met, *run.sets.bad]):
            run.bad_rows |= {bad.row: bad for bad in rows if bad.row not in run.bad_rows}
        self.bad_rows_met = []
        if len(run.bad_rows) == known and run.report_path.exists():
            return
        if self.ranks.is_main:
            write_report(run.report_path, run.bad_rows.values())
        rows = max(run.sets.rows, 1000) if self.config.streaming else run.sets.rows  # a stream may just have begun
        bad = faulty(run.bad_rows.values())
        if len(bad) > allowed * rows:
            self.problem = too_many_bad(bad, rows, allowed, run.report_path)

    def _prune(self) -> None:
        """Delete checkpoints beyond the limit, except the one that may become the result."""
        best = (self.run.notes.get("watch") or {}).get("best")
        checkpoint.prune(self.run.folder, self.config.checkpoints_total_limit, best and best["step"])

    def _result(self) -> dict[str, torch.Tensor]:
        """Return name -> fp32 weight to publish."""
        ended = self.run.notes.get(ENDED)
        if ended is None:
            return self.masters.export()
        return read_trained(checkpoint.folder_of(self.run.folder, ended["result_of"])).weights

    def finish_queued_work(self) -> None:
        """Wait for the device, so that queued training work counts as training time."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def _count(self, sums: PairSums, terms: Terms, batch: Batch) -> None:
        delta = None if terms.ref_error is None else terms.policy_error.detach() - terms.ref_error
        sums.add(terms.loss, terms.margin, delta, batch.timesteps, batch.weight)

    def _check_health(self, line: dict[str, object]) -> None:
        """Set `problem` if going on would be a waste; called at log lines, where the host waits anyway."""
        bad_pair = int(self.nonfinite_pair.item())
        in_a_row = int(self.masters.skipped_in_a_row.item())
        if bad_pair >= 0:
            self.problem = self.family.not_finite(bad_pair)
        elif (bad_caption := int(self.nonfinite_caption.item())) >= 0:
            self.problem = self.family.text_not_finite(f"row {bad_caption}")
        elif in_a_row >= self.config.max_skipped_updates:
            self.problem = BadInput(
                f"step {line['step']}: the last {in_a_row} updates were not finite and were skipped"
                f" (loss {line['loss']}, loss scale {self.masters.loss_scale.item():g}); lower --learning_rate,"
                " or use --mixed_precision bf16 or no, and go on from an earlier checkpoint"
            )

    def _check_result(self) -> None:
        """Raise BadInput if the trained weights are not worth publishing."""
        run, skipped = self.run, int(self.masters.skipped.item())
        instead = (
            f"; nothing was published, {checkpoint.folder_of(run.folder, run.step)} holds the state. Lower"
            " --learning_rate, or use --mixed_precision bf16 or no, and start again in another --output_dir"
        )
        if not run.notes["trained"]:
            raise BadInput(
                f"no pair could be trained on: those of all {run.step} steps have identical images or do not decode"
                f" ({run.report_path} lists them); nothing was published. Mend the data set, and start again in another"
                " --output_dir"
            )
        if skipped == run.step:
            raise BadInput(f"no update was finite: all {run.step} were skipped, so the model has not changed{instead}")
        if bad := nonfinite_tensors(self._result().items()):
            raise BadInput(f"{len(bad)} trained tensors are not finite, first {bad[0]}{instead}")
        if skipped > MANY_SKIPPED * run.step:
            self.say(f"warning: {skipped} of {run.step} updates were not finite and were skipped")

    def _raise_problems(self) -> None:
        """Raise BadInput on every rank if any of them met a problem."""
        self.ranks.on_main(self._check_hold)
        problems = self.ranks.gather(self.problem and str(self.problem))
        if any(problems):
            raise BadInput(next(filter(None, problems)))

    def _check_hold(self) -> None:
        """Raise BadInput if this run no longer holds the output folder."""
        if self.hold is not None and self.hold.lost is not None:
            raise BadInput(
                f"--output_dir {self.run.folder}: the lease on the folder was lost ({self.hold.lost}), and another"
                " process may write there now; if none does, --resume_from_checkpoint auto goes on"
            )

    def _minutes_are_up(self) -> bool:
        """Whether --checkpointing_minutes have passed since the last save, by the main rank's clock."""
        minutes = self.config.checkpointing_minutes
        if minutes is None:
            return False
        return self.ranks.any(self.ranks.is_main and time.monotonic() - self.saved_at >= 60 * minutes)

    def _go_on(self) -> str:
        return f"the same command with --output_dir {self.run.folder} --resume_from_checkpoint auto goes on"

    def _is_to_stop(self) -> bool:
        """Whether a signal or a callback on any rank asks for it. Every rank calls this."""
        return self.ranks.any(self.signal is not None or self.stop_reason is not None)

    def _stop(self) -> None:
        """Save the state after the last complete step and raise Interrupted. Every rank calls this."""
        run = self.run
        signals, reasons = (
            [*filter(None, one)] for one in zip(*self.ranks.gather((self.signal, self.stop_reason)), strict=True)
        )
        if not self.ranks.share(checkpoint.folder_of(run.folder, run.step).is_dir()):
            self.finish_queued_work()
            self.save()
        saved = f"after step {run.step}: saved as {checkpoint.folder_of(run.folder, run.step)}; {self._go_on()}"
        if signals:
            raise Interrupted(f"{signals[0]} {saved}")
        raise Stopped(f"stopped ({reasons[0]}) {saved}", reasons[0])

    @contextmanager
    def _watch_signals(self) -> Iterator[None]:
        """A signal of STOP_SIGNALS ends the run after the micro-batch in progress; a second one ends it at once.

        Signals that the process was started to ignore (nohup) stay ignored.
        """

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

        def ask(number: int, frame: object) -> None:
            name = signal.Signals(number).name
            if self.signal is not None:
                if time.monotonic() - self.signalled_at > REPEAT_SECONDS:
                    if callable(before[number]):  # the command's own: its interruption cannot be lost
                        before[number](number, frame)
                    raise KeyboardInterrupt
                return
            self.signal, self.signalled_at = name, time.monotonic()
            if self.ranks.is_main:
                acknowledge(f"{name}: stopping after the micro-batch in progress, then saving; again ends it at once")

        with on_signals(STOP_SIGNALS, ask):
            yield

    def _sample_base(self) -> None:
        """Get the base model's samples for all later comparisons: drawn at step 0, read back on a resume."""
        run = self.run
        if self.ranks.is_main:
            of_run = (self.family, run.prompts, sample_settings(self.config), run.fingerprints["base weights"])
            self.base_samples = sampling.base_samples(*of_run, again=run.step == 0)
        self.ranks.wait()

    def _sample(self) -> list[Image.Image]:
        """Draw one image per prompt with the UNet's current weights."""
        return sampling.run_samples(self.family, self.run.prompts, sample_settings(self.config))

    def _export(self, folder: Path) -> None:
        """Write the trained weights (the EMA's if there is one) in the formats of --export."""
        weights, run = self._result(), self.run
        if self.config.tuning == "full":
            weights = self.unet.state_dict() | weights
        counts = {
            "pairs_seen": run.step * self.config.pairs_per_step,
            "base_weights": run.fingerprints["base weights"],
            "base_sha256": run.base_sha256,
        }
        write_result(self.family, folder, self.config, weights, counts)
