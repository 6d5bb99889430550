"""Callbacks: which calls come when, what they see, and how they stop and end a run."""

import json
import subprocess
import sys

import pytest

from dpo_fast.errors import BadInput
from dpo_fast.training.callbacks import Callback, checked
from dpo_fast.training.trainer import Stopped, Trainer
from tests.helpers.pairs import write_pickapic
from tests.helpers.runs import assert_same_state, environment, flags_for, lines
from tests.helpers.runs import opened as opened_run
from tests.helpers.runs import train as train_alone
from tests.runs.test_distributed import TORCHRUN
from tests.runs.test_no_waiting import waits

MORE = ("--learning_rate", 1e-3)
AGAIN = ("--resume_from_checkpoint", "auto")


class Notes(Callback):
    """Notes every call, as (method, step, values)."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def on_start(self, trainer):
        self.calls.append(("start", trainer.run.step))

    def on_step(self, trainer):
        self.calls.append(("step", trainer.run.step))

    def on_log(self, trainer, metrics):
        self.calls.append(("log", trainer.run.step, metrics))

    def on_validate(self, trainer, accuracy, picture):
        assert picture.is_file()
        self.calls.append(("validate", trainer.run.step, accuracy))

    def on_save(self, trainer, checkpoint):
        assert (checkpoint / "state.json").is_file()
        self.calls.append(("save", trainer.run.step, checkpoint.name))

    def on_end(self, trainer, error):
        self.calls.append(("end", trainer.run.step, error))

    def of(self, method: str) -> list[tuple]:
        return [values for name, *values in self.calls if name == method]


class At(Callback):
    """Does something at one call of a method, the `number`-th."""

    def __init__(self, method: str, number: int, work) -> None:
        def call(trainer, *values):
            self.count += 1
            if self.count == number:
                work(trainer)

        self.count = 0
        setattr(self, method, call)


def trainer_of(flags: list[str], *callbacks: Callback) -> Trainer:
    return Trainer(opened_run(flags), flags, callbacks=callbacks)


def test_the_calls_of_a_run_and_of_the_one_that_goes_on(sdxl_path, tmp_path):
    data = write_pickapic(tmp_path / "pairs.parquet", n=24, captions=[f"scene {i // 3}" for i in range(24)])
    more = [*MORE, "--run_validation", "--validation_steps", 3, "--validation_fraction", 0.3, "--sampling_steps", 1]
    more += ["--checkpointing_steps", 2, "--validation_prompts", "a cat", "--log_every", 2]
    flags = flags_for(sdxl_path, data, tmp_path / "run", *more)
    notes, second = Notes(), Notes()
    trainer_of(flags, notes, second).train()
    assert [call[:2] for call in notes.calls] == [
        ("start", 0),
        ("step", 1), ("log", 1),
        ("step", 2), ("log", 2), ("save", 2),
        ("step", 3), ("validate", 3),
        ("step", 4), ("log", 4), ("validate", 4), ("save", 4),
        ("end", 4),
    ]  # fmt: skip
    assert second.calls == notes.calls
    assert [metrics for _, metrics in notes.of("log")] == lines(tmp_path / "run")
    kept = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [accuracy for _, accuracy in notes.of("validate")] == [line["validation_accuracy"] for line in kept]
    assert notes.of("save") == [[2, "checkpoint-2"], [4, "checkpoint-4"]] and notes.of("end") == [[4, None]]

    after = Notes()
    trainer_of([*flags, *map(str, AGAIN), "--max_train_steps", "6"], after).train()
    assert after.of("start") == [[4]] and after.of("step") == [[5], [6]] and after.of("end") == [[6, None]]


def test_a_run_is_the_same_with_callbacks_that_only_look(sdxl_path, pairs, tmp_path):
    class Looking(Callback):
        def on_step(self, trainer):
            self.seen = [parameter.sum() for parameter in trainer.unet.parameters()]

        def on_log(self, trainer, metrics):
            metrics["loss"] = None  # a copy

    flags = flags_for(sdxl_path, pairs, tmp_path / "watched", *MORE)
    trainer_of(flags, Looking()).train()
    train_alone(sdxl_path, pairs, tmp_path / "alone", *MORE)
    assert_same_state(tmp_path / "watched", tmp_path / "alone")
    assert all(line["loss"] is not None for line in lines(tmp_path / "watched"))


def test_the_call_after_a_step_waits_for_nothing(sdxl_path, pairs, tmp_path, monkeypatch):
    class Looking(Callback):
        def on_step(self, trainer):
            self.norm, self.loss = trainer.grad_norm, trainer.sums.state()

    trainer = trainer_of(flags_for(sdxl_path, pairs, tmp_path / "run"), Looking(), Callback())
    trainer.train_step()
    with waits(monkeypatch) as found:
        trainer.callbacks.call("on_step", trainer)
    assert not found


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("method", "number", "step"), [("on_step", 2, 2), ("on_log", 3, 3), ("on_save", 1, 2)])
def test_a_callback_may_stop_a_run_which_goes_on_to_the_same_result(sdxl_path, pairs, tmp_path, method, number, step):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *MORE, "--checkpointing_steps", 2)
    notes = Notes()
    with pytest.raises(Stopped, match=rf"^stopped \(enough\) after step {step}: saved as .*checkpoint-{step};") as stop:
        trainer_of(flags, At(method, number, lambda trainer: trainer.stop("enough")), notes).train()
    assert stop.value.reason == "enough"
    assert notes.of("step")[-1] == [step] and notes.of("end") == [[step, stop.value]]
    assert not (tmp_path / "run" / "summary.json").exists()
    trainer_of([*flags, *AGAIN]).train()
    train_alone(sdxl_path, pairs, tmp_path / "whole", *MORE)
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_a_stopped_run_can_be_ended_where_it_is(sdxl_path, pairs, tmp_path):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *MORE)
    with pytest.raises(Stopped):
        trainer_of(flags, At("on_step", 2, lambda trainer: trainer.stop("enough"))).train()
    trainer_of([*flags, *AGAIN, "--max_train_steps", "2"]).train()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_stop_at_the_last_step_leaves_the_result_to_the_next_command(sdxl_path, pairs, tmp_path):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *MORE)
    with pytest.raises(Stopped):
        trainer_of(flags, At("on_save", 1, lambda trainer: trainer.stop("enough"))).train()
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and not (tmp_path / "run" / "summary.json").exists()
    trainer_of([*flags, *AGAIN]).train()
    assert (tmp_path / "run" / "summary.json").is_file()


class Planted(Exception):
    pass


def planted(trainer) -> None:
    raise Planted("by a callback")


@pytest.mark.drawn(2)
@pytest.mark.parametrize("method", ["on_start", "on_step", "on_log", "on_save", "on_end"])
def test_an_exception_ends_the_run_and_what_was_saved_is_whole(sdxl_path, pairs, tmp_path, method, caplog):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *MORE, "--checkpointing_steps", 2)
    notes, further = Notes(), At("on_end", 1, planted)
    number = 3 if method in ("on_step", "on_log") else 1
    with pytest.raises(Planted) as error:
        trainer_of(flags, notes, further, At(method, number, planted), after := Notes()).train()
    assert error.value.of_this_rank
    if method == "on_end":  # the run was done, and `further` failed first
        assert notes.of("end") == [[4, None]] and (tmp_path / "run" / "summary.json").is_file()
        return
    assert [type(found) for _, found in notes.of("end")] == [Planted]
    assert bool(after.calls) == (method != "on_start")  # those that were not started are not ended
    assert "At.on_end failed" in caplog.text
    assert not (tmp_path / "run" / "summary.json").exists()
    if method != "on_start":
        trainer_of([*flags, *AGAIN]).train()
        train_alone(sdxl_path, pairs, tmp_path / "whole", *MORE)
        assert_same_state(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (Callback(), "must be a list of Callback objects"),
        (Callback, "must be a list of Callback objects"),
        (None, "must be a list of Callback objects"),
        ([Callback(), Notes], r"callbacks\[1\] .* is no Callback: make an object of it, Notes\(\)"),
        (["x"], r"callbacks\[0\] \('x'\) is no Callback: derive it from Callback"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, said):
    with pytest.raises(BadInput, match=said):
        checked(callbacks)


SCRIPT = """
import sys
import dpo_fast
import torch.distributed as dist

class Stop(dpo_fast.Callback):
    def on_step(self, trainer):
        if trainer.ranks.rank == 1 and trainer.run.step == 2:
            trainer.stop("rank 1 has seen enough")

model, pairs, out = sys.argv[1:]
settings = dict(pretrained_model_name_or_path=model, dataset_name=pairs, resolution=64, train_batch_size=1,
                max_train_steps=4, dataloader_num_workers=0, seed=0, output_dir=out, learning_rate=1e-3)
stopped = dpo_fast.train(**settings, callbacks=[Stop()])
assert stopped.stopped == "rank 1 has seen enough" and stopped.summary["steps"] == 2
assert not dist.is_initialized()  # so that a process can make many runs
done = dpo_fast.train(**settings, resume_from_checkpoint="latest")
assert done.stopped is None and done.summary["steps"] == 4 and done.summary["pairs_seen"] == 8
print(f"{done.summary['loss_last']:.6f}\\n", end="")  # one write: two processes print
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_stop_on_one_rank_stops_all_and_a_process_can_make_many_runs(sdxl_path, pairs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *TORCHRUN, str(script), str(sdxl_path), str(pairs), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = done.stdout.split()
    assert len(losses) == 2 and losses[0] == losses[1]
    assert "stopped (rank 1" not in done.stderr  # it is in the log, which the user shows or not
    one = train_alone(
        sdxl_path, pairs, tmp_path / "one", *MORE, "--train_batch_size", 1, "--gradient_accumulation_steps", 2
    )
    assert_same_state(one, tmp_path / "two")
