"""Between two log lines nothing in a training step reads a value off the device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.training.trainer import Trainer
from tests.helpers.runs import flags_for, opened

_aten = torch.ops.aten
# On a GPU each of these waits for it: a number for the CPU, or a size that depends on values.
WAITING = {
    _aten._local_scalar_dense,
    _aten.item,
    _aten.is_nonzero,
    _aten.nonzero,
    _aten.equal,
    _aten.masked_select,
    _aten.unique_dim,
    _aten._unique2,
    _aten.repeat_interleave,
}


class Waits(TorchDispatchMode):
    """Counts what would wait; `unseen` counts what no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.overloadpacket in WAITING and "output_size" not in kwargs:
            self.found[str(op)] += 1
        if op.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_):
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]):
                self.found[f"{op} with a mask"] += 1
        return op(*args, **kwargs)


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    mode = Waits()
    with monkeypatch.context() as patch, mode:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            original = getattr(torch.Tensor, name)

            def noted(self, *args, original=original, name=name, **kwargs):
                mode.found[f"Tensor.{name}"] += 1
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, noted)
        yield mode.found


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
    ],
)
def test_a_wait_is_seen(monkeypatch, wait):
    x = torch.randn(3)
    with waits(monkeypatch) as found:
        x.exp().sum().clamp(min=1)
    assert not found
    with waits(monkeypatch) as found:
        wait(x)
    assert found


VARIANTS = {
    "lora": [],
    "full": ["--tuning", "full", "--gradient_accumulation_steps", 2, "--use_ema"],
    "fp16": ["--mixed_precision", "fp16", "--gradient_checkpointing", "--proportion_empty_prompts", 0.5],
    "bf16": ["--tuning", "full", "--mixed_precision", "bf16", "--gradient_checkpointing", "selective"],
    "kto": ["--objective", "kto"],
    "sft": ["--objective", "sft"],
    "soft labels": ["--soft_labels"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_waits_for_nothing(sdxl_path, pairs, tmp_path, monkeypatch, name):
    trainer = Trainer(opened(flags_for(sdxl_path, pairs, tmp_path / "run", *VARIANTS[name])), [])
    trainer.train_step()  # what is made once may wait
    passes = trainer.config.gradient_accumulation_steps
    trainer.run.batches = iter([next(trainer.run.batches) for _ in range(passes)])  # the loader's own work
    with waits(monkeypatch) as found:
        trainer.train_step()
    assert not found
