"""One process or two, one batch split or another: the same draws, and the same weights up to the order of sums."""

import json

import pytest
import torch

from dpo_fast.parallel import memory_order
from dpo_fast.training.trainer import Trainer
from tests.helpers.runs import STEPS, assert_same_state, flags_for, lines, opened, start, train, weights

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def draws_of_a_step(run) -> list[tuple]:
    """What every pair of the first step is trained with, in order."""
    rows = []
    for _ in range(run.config.gradient_accumulation_steps):
        batch = next(run.batches)
        for i, pair in enumerate(batch.pair_id.tolist()):
            images = batch.pixels[[i, len(batch.pair_id) + i]]
            rows.append((pair, int(batch.draw[i]), int(batch.timesteps[i]), bool(batch.dropped[i]), int(images.sum())))
    return rows


def test_draws_are_the_same_for_every_batch_split(sdxl_path, pairs, tmp_path):
    found = []
    for batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        split = ["--train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        more = ["--hflip", "--random_crop", "--no-cache", "--proportion_empty_prompts", 0.5]
        found.append(draws_of_a_step(opened(flags_for(sdxl_path, pairs, tmp_path / f"{batch}", *split, *more))))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4


def test_batch_splits_train_alike(sdxl_path, pairs, tmp_path):
    results = []
    for batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        out = tmp_path / f"{batch}"
        split = ["--train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        results.append((lines(train(sdxl_path, pairs, out, *split)), weights(out)))
    for line, other in zip(results[0][0], results[1][0] + results[2][0], strict=False):
        assert other["loss"] == pytest.approx(line["loss"], abs=2e-3)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=2e-3)
    for _, other in results[1:]:
        for name, weight in results[0][1].items():
            # Adam first steps by lr * sign(gradient): where a gradient is all rounding, 2 lr apart a step
            assert (weight - other[name]).abs().max() <= 2 * STEPS * 1e-5


@pytest.mark.parametrize("more", [["--tuning", "full"], ["--tuning", "full", "--mixed_precision", "bf16"]])
def test_gradients_of_a_step_lie_as_the_parameters_they_are_reduced_like(sdxl_path, pairs, tmp_path, more):
    """So none is transposed on its way into a bucket; those of convolutions are channels_last."""
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *more)
    trainer = Trainer(opened(flags), flags)
    sums = []
    trainer.ranks.sum_ = lambda tensors, like: sums.append((tensors, like))
    trainer.train_step()
    ((tensors, like),) = sums
    masters = trainer.masters.masters
    assert len(tensors) == len(like) == len(masters) + 2  # loss and reward
    assert all(a is b for a, b in zip(like, masters, strict=False))
    assert all(t.permute(memory_order(p)).is_contiguous() for t, p in zip(tensors, like, strict=True))
    assert any(not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


@pytest.mark.exhaustive
def test_two_processes_train_as_one(sdxl_path, pairs, tmp_path):
    """With the same micro-batches the sums are the same sums, so the weights agree to the bit."""
    one = train(sdxl_path, pairs, tmp_path / "one", "--gradient_accumulation_steps", 2, "--objective", "kto")
    two = tmp_path / "two"
    process = start(*flags_for(sdxl_path, pairs, two, "--objective", "kto"), launcher=TORCHRUN)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert "2 x cpu" in error and "(2 processes x 2 x 1)" in error
    assert_same_state(one, two)
    for a, b in zip(lines(one), lines(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["pairs_seen"] == 4 * STEPS


@pytest.mark.exhaustive
def test_a_problem_of_one_rank_ends_both(sdxl_path, pairs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("here")
    process = start(*flags_for(sdxl_path, pairs, tmp_path / "full"), launcher=TORCHRUN)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("dpo_fast: error: --output_dir") == 1
