"""Cached reference errors: the same training as with a reference that is run, computed once, refused when foreign."""

import gc
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast import cache as cache_command
from dpo_fast.caching import score_reference
from dpo_fast.caching.recipe import read_recipe
from dpo_fast.caching.ref_errors import BLOCK
from dpo_fast.forward import CachedErrors, FrozenCopy
from dpo_fast.models import Family
from dpo_fast.store import Store, Writer, begin_folder, writing
from dpo_fast.train import main
from dpo_fast.training.trainer import Trainer
from tests.caching.test_cache_command import contents, held, refused
from tests.helpers import pipelines, slow_build
from tests.helpers.pairs import pickapic, write_table
from tests.helpers.runs import assert_same_state, flags_for, lines, opened, start, train, weights

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TWICE = ["--max_train_steps", 12]  # of two pairs each: twelve pairs twice
MIXED = ["--hflip", "--proportion_empty_prompts", 0.4]
# With cached errors the margin is a difference of fp32 numbers near 1: a few 1e-7 of them, times beta / 2 = 2500.
MARGIN_ROUNDING = 5e-3


@pytest.fixture(autouse=True)
def log():
    """What is logged goes to this test's stderr, not to that of the test which first opened the log."""
    logging.getLogger("dpo_fast").handlers.clear()


@pytest.fixture
def where(tmp_path):
    """Flags that name a cache of the test's own."""
    return ["--latent_cache_dir", tmp_path / "cache"]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def recipes(cache: Path) -> list[Path]:
    return sorted(cache.glob("reference-*/recipe.json"))


def opened_store(recipe: Path) -> Store:
    return Store(recipe.parents[1], read_recipe(recipe))


def all_errors(cache: Path) -> dict[bytes, np.ndarray]:
    """Key -> float32 [BLOCK, 2] of the only reference of a cache."""
    (recipe,) = recipes(cache)
    store = opened_store(recipe)
    return {
        key: shard.records[i].view(np.float32).reshape(BLOCK, 2)
        for shard in store.shards
        for i, key in enumerate(shard.keys)
    }


def drawn(run) -> list[tuple]:
    return [
        (pair, draw, timestep, dropped)
        for batch in run.batches
        for pair, draw, timestep, dropped in zip(
            *(column.tolist() for column in (batch.pair_id, batch.draw, batch.timesteps, batch.dropped)), strict=True
        )
    ]


# ---- the same training -------------------------------------------------------------------------------------------

VARIANTS = {
    "lora": [],
    "full": ["--tuning", "full"],
    "real time ids": ["--time_ids", "real"],
    "kto": ["--objective", "kto"],
    "streamed": ["--streaming"],
}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", VARIANTS)
def test_with_a_draw_for_every_visit_it_trains_as_with_a_reference(sdxl_path, pairs, tmp_path, where, name):
    rate = 1e-5
    more = [*VARIANTS[name], *MIXED, *TWICE, *where, "--learning_rate", rate]
    online = train(sdxl_path, pairs, tmp_path / "online", *more)
    cached = train(sdxl_path, pairs, tmp_path / "cached", *more, "--cached_reference", 2)
    for one, other in zip(lines(online), lines(cached), strict=True):
        # from the second step on the weights differ too, by what rounding does to Adam's steps
        allowed = MARGIN_ROUNDING + 2e-3 * one["margin_rms"]
        assert other["margin"] == pytest.approx(one["margin"], abs=allowed)
        assert other["loss"] == pytest.approx(one["loss"], abs=allowed)
    assert lines(online)[0]["margin_rms"] == 0.0 and lines(cached)[0]["margin_rms"] < MARGIN_ROUNDING
    moved, apart = [], []
    for key, weight in weights(online, 12).items():
        moved.append(weight.abs().sum().item() if "lora_B" in key else 0.0)
        apart.append((weight - weights(cached, 12)[key]).abs().flatten())
    apart = torch.cat(apart)
    # Adam's first steps are lr * sign(gradient): a gradient that is all rounding may take either sign, few do
    assert apart.max() <= 2 * 12 * rate and apart.mean() < 0.05 * rate
    if name == "lora":
        assert sum(moved) > 0


def test_the_draws_are_those_of_a_run_with_a_reference(sdxl_path, pairs, tmp_path, where):
    more = [*MIXED, *TWICE, *where]
    online = drawn(opened(flags_for(sdxl_path, pairs, tmp_path / "online", *more)))
    enough = drawn(opened(flags_for(sdxl_path, pairs, tmp_path / "enough", *more, "--cached_reference", 5)))
    assert enough == online and len(online) == 24


def test_fewer_draws_than_visits_recur(sdxl_path, pairs, tmp_path, where):
    more = [*MIXED, *where, "--max_train_steps", 30, "--cached_reference", 2]
    visits: dict[int, list[tuple]] = {}
    for pair, *rest in drawn(opened(flags_for(sdxl_path, pairs, tmp_path / "run", *more))):
        visits.setdefault(pair, []).append(tuple(rest))
    for of_pair in visits.values():
        assert [draw for draw, *_ in of_pair] == [0, 1, 0, 1, 0]
        assert of_pair[0] == of_pair[2] == of_pair[4] and of_pair[1] == of_pair[3]
        assert of_pair[0][1] != of_pair[1][1]


def test_the_held_out_pairs_are_measured_without_a_reference(sdxl_path, tmp_path, where, monkeypatch):
    data = write_table(tmp_path / "pairs.parquet", pickapic(captions=[f"scene {i // 3}" for i in range(12)]))
    more = [*where, *MIXED, "--run_validation", "--validation_fraction", 0.3, "--learning_rate", 1e-3]
    online = train(sdxl_path, data, tmp_path / "online", *more)
    monkeypatch.delattr("dpo_fast.forward.AdapterOff.__call__")
    cached = train(sdxl_path, data, tmp_path / "cached", *more, "--cached_reference", 4)
    assert summary(cached)["validation_accuracy"] == pytest.approx(summary(online)["validation_accuracy"], abs=0.051)
    low, high = summary(cached)["validation_accuracy_ci95"]
    assert 0 <= low < summary(cached)["validation_accuracy"] < high <= 1


@pytest.mark.drawn(1)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_no_reference_is_held_and_none_is_run(sdxl_path, pairs, tmp_path, where, tuning, monkeypatch):
    calls, flops = [], {}
    denoise = Family.denoise
    monkeypatch.setattr(Family, "denoise", lambda self, *a: calls.append(torch.is_grad_enabled()) or denoise(self, *a))
    for name, more in (("online", []), ("cached", ["--cached_reference", 1])):
        flags = flags_for(sdxl_path, pairs, tmp_path / name, "--tuning", tuning, *where, *more)
        run = opened(flags)
        trainer = Trainer(run, flags)
        calls.clear()
        with FlopCounterMode(display=False) as counter:
            trainer.train_step()
        flops[name] = counter.get_total_flops()
        assert calls == ([False, True] if name == "online" else [True])
        if name == "cached":
            gc.collect()
            assert isinstance(run.reference, CachedErrors)
            assert not any(isinstance(thing, FrozenCopy) for thing in gc.get_objects())
        del run, trainer
    assert flops["online"] / flops["cached"] > (1.3 if tuning == "full" else 1.4)


# ---- what is computed, and how often -----------------------------------------------------------------------------


def computed(model: Path, data: Path, out: Path, *more: object) -> int:
    return opened(flags_for(model, data, out, *more)).scored.scored_now


@pytest.mark.exhaustive
def test_more_draws_compute_only_the_new_ones(sdxl_path, pairs, tmp_path, where):
    long = [*where, "--max_train_steps", 24]  # four visits
    assert computed(sdxl_path, pairs, tmp_path / "1", *long, "--cached_reference", 1) == 12
    before = all_errors(tmp_path / "cache")
    assert computed(sdxl_path, pairs, tmp_path / "2", *long, "--cached_reference", 3) == 24
    after = all_errors(tmp_path / "cache")
    assert len(after) == 3 and all(np.array_equal(after[key], before[key], equal_nan=True) for key in before)
    others = ([], ["--beta_dpo", 100], ["--learning_rate", 1e-3, "--rank", 2], ["--objective", "ipo"])
    for number, more in enumerate(others):
        assert computed(sdxl_path, pairs, tmp_path / f"3{number}", *long, "--cached_reference", 2, *more) == 0
    assert computed(sdxl_path, pairs, tmp_path / "4", *long, "--cached_reference", 9) == 12  # four visits, no more
    assert computed(sdxl_path, pairs, tmp_path / "5", *long, "--cached_reference", 2, "--tuning", "full") == 0


def test_the_command_computes_ahead_what_a_run_then_finds(sdxl_path, pairs, tmp_path, where, capfd):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *where, *TWICE)
    assert cache_command.main(["reference", "--draws", "2", *flags]) == 0
    assert "12 pairs at 2 draws, 24 of 24 computed now" in capfd.readouterr().err
    train(sdxl_path, pairs, tmp_path / "run", *where, *TWICE, "--cached_reference", 2)
    assert "2 draws, 24 pairs in all, 0 computed now" in capfd.readouterr().err
    assert cache_command.main(["verify", "--latent_cache_dir", str(where[1])]) == 0


@pytest.mark.exhaustive
@pytest.mark.faults
def test_a_run_waits_for_another_that_scores(sdxl_path, pairs, tmp_path, where, caplog):
    """It then computes what the other has not."""
    train(sdxl_path, pairs, tmp_path / "one", *where, "--cached_reference", 1)
    (folder,) = (tmp_path / "cache").glob("reference-*")
    with held(folder, 3) as process:
        train(sdxl_path, pairs, tmp_path / "two", *where, *TWICE, "--cached_reference", 2)
        assert process.wait(timeout=10) == 0
    (told,) = (record.message for record in caplog.records if "waiting" in record.message)
    assert f"process {process.pid} on " in told


def test_errors_stay_right_when_labels_change(sdxl_path, tmp_path, where):
    columns = pickapic(n=12)
    other = {**columns, "label_0": [1 - label for label in columns["label_0"]]}
    more = [*where, *MIXED, "--max_train_steps", 6, "--cached_reference", 1, "--train_batch_size", 12]
    runs = []
    for name, table in (("one", columns), ("other", other)):
        data = write_table(tmp_path / name / "pairs.parquet", table)
        runs.append(opened(flags_for(sdxl_path, data, tmp_path / f"run-{name}", *more)))
    assert [run.scored.scored_now for run in runs] == [12, 0]
    one, exchanged = (next(run.batches) for run in runs)
    assert torch.equal(one.pair_id, exchanged.pair_id)
    assert torch.equal(one.ref_errors, exchanged.ref_errors.view(2, -1).flip(0).flatten())
    assert not torch.equal(one.ref_errors, exchanged.ref_errors)


def test_changed_pairs_are_computed_and_the_others_are_not(sdxl_path, tmp_path, where, monkeypatch):
    monkeypatch.setattr("dpo_fast.caching.ref_errors.BLOCK", 4)
    monkeypatch.setattr("dpo_fast.caching.score_reference.BLOCK", 4)
    fields = (score_reference.FIELDS[0].__class__("errors", (4, 2), "float32"),)
    monkeypatch.setattr("dpo_fast.caching.score_reference.FIELDS", fields)
    columns, more = pickapic(n=12), [*where, "--max_train_steps", 6, "--cached_reference", 1]
    assert computed(sdxl_path, write_table(tmp_path / "a.parquet", columns), tmp_path / "1", *more) == 12
    columns["caption"][5] = "something else"
    assert computed(sdxl_path, write_table(tmp_path / "b.parquet", columns), tmp_path / "2", *more) == 4


@pytest.mark.exhaustive
def test_two_ranks_give_the_errors_and_the_weights_of_one(sdxl_path, pairs, tmp_path):
    """With the same micro-batches the sums are the same sums."""
    more = [*MIXED, "--max_train_steps", 6, "--cached_reference", 2]
    split = ["--gradient_accumulation_steps", 2, "--latent_cache_dir", tmp_path / "c1"]
    one = train(sdxl_path, pairs, tmp_path / "one", *more, *split)
    flags = flags_for(sdxl_path, pairs, tmp_path / "two", *more, "--latent_cache_dir", tmp_path / "c2")
    process = start(*flags, launcher=TORCHRUN)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    a, b = all_errors(tmp_path / "c1"), all_errors(tmp_path / "c2")
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key], equal_nan=True) for key in a)
    assert len(list((tmp_path / "c2").glob("reference-*/shard-*.bin"))) == 2  # one a rank
    assert_same_state(one, tmp_path / "two", 6)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.faults
def test_killed_again_and_again_it_ends_with_the_same_files(sdxl_path, pairs, tmp_path, monkeypatch, capfd, seed):
    """kill -9 at random moments while it computes; then every file is compared."""
    draws, size = 60, 8 * BLOCK * 7  # seven records a shard

    def command(cache: Path) -> list[str]:
        flags = flags_for(sdxl_path, pairs, tmp_path / "no-run", "--latent_cache_dir", cache)
        return ["reference", "--draws", str(draws), *flags]

    def state(cache: Path) -> int:
        return slow_build.written(cache, "reference-*/*.*")

    peaceful = slow_build.started(size, command(tmp_path / "peace"))
    peaceful.join()
    assert peaceful.exitcode == 0
    cache, whole, grown = tmp_path / "killed", state(tmp_path / "peace"), []
    chance = random.Random(seed)
    for _ in range(4):
        before = state(cache)
        target = before + chance.uniform(0.01, 0.15) * whole
        process = slow_build.started(size, command(cache))
        while process.is_alive() and state(cache) <= target:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        grown.append(state(cache) - before)
    assert sum(growth > 0 for growth in grown) >= 2
    monkeypatch.setattr(writing, "SHARD_BYTES", size)
    capfd.readouterr()
    assert cache_command.main(command(cache)) == 0
    said = capfd.readouterr().err
    assert f" of {8 * draws} computed now" in said and f"{8 * draws} of {8 * draws} computed now" not in said
    peace, killed = contents(tmp_path / "peace"), contents(cache)
    assert peace.keys() == killed.keys()
    assert [name for name in peace if peace[name] != killed[name]] == []


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.drawn(1)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_resuming_gives_the_weights_of_a_run_that_was_not_interrupted(sdxl_path, pairs, tmp_path, where, tuning):
    more = [*where, "--tuning", tuning, "--learning_rate", 1e-3, "--checkpointing_steps", 6, "--cached_reference", 2]
    whole = train(sdxl_path, pairs, tmp_path / "whole", *more, *TWICE)
    train(sdxl_path, pairs, tmp_path / "parts", *more, "--max_train_steps", 6)
    shutil.rmtree(next((tmp_path / "cache").glob("reference-*")))  # computed again from the base, not from the policy
    train(sdxl_path, pairs, tmp_path / "parts", *more, *TWICE, "--resume_from_checkpoint", "latest")
    assert_same_state(whole, tmp_path / "parts", 12)
    assert summary(tmp_path / "parts")["initial_margin_rms"] < MARGIN_ROUNDING


@pytest.mark.exhaustive
def test_at_a_resume_the_draws_may_only_change_what_is_to_come(sdxl_path, pairs, tmp_path, where, capfd):
    more = [*where, "--checkpointing_steps", 6]
    folder = train(sdxl_path, pairs, tmp_path / "run", *more, *TWICE, "--cached_reference", 1)  # visited twice
    longer = [*more, "--max_train_steps", 18, "--resume_from_checkpoint", "latest"]
    for draws in (["--cached_reference", 2], []):
        flags = flags_for(sdxl_path, pairs, folder, *longer, *draws)
        refused(lambda flags=flags: main(flags), ["--cached_reference was 1", "give 1 again"], capfd)
    other = train(sdxl_path, pairs, tmp_path / "other", *more, *TWICE, "--cached_reference", 2)
    flags = flags_for(sdxl_path, pairs, other, *longer, "--cached_reference", 1)
    refused(lambda: main(flags), ["--cached_reference was 2"], capfd)
    train(sdxl_path, pairs, other, *longer, "--cached_reference", 3)
    assert lines(other)[-1]["step"] == 18


# ---- refused, warned, stopped ------------------------------------------------------------------------------------


@pytest.fixture
def scored(sdxl_path, pairs, tmp_path, where):
    """Flags of a run of which everything is cached."""
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *where, "--cached_reference", 2, *TWICE)
    opened(flags)
    shutil.rmtree(tmp_path / "run")
    return flags


@pytest.mark.parametrize(
    "more, said",
    [
        (["--seed", 1], "seed: 0 -> 1"),
        (["--hflip"], "hflip: False -> True"),
        (["--proportion_empty_prompts", 0.5], "proportion_empty_prompts: 0.0 -> 0.5"),
        (["--prediction_type", "v_prediction"], "prediction_type: epsilon -> v_prediction"),
        (["--zero_terminal_snr", "on"], "schedule:"),
        (["--max_timestep", 500], "timesteps: [0, 999, 1000] -> [0, 499, 500]"),
        (["--mixed_precision", "bf16"], "dtype: float32 -> bfloat16"),
        (["--resolution", 32], "resolution: 64 -> 32"),
        (["other weights"], "reference: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_under_other_facts_it_says_what_differs_and_computes_anew(scored, tmp_path, capfd, more, said):
    flags = [*scored, *map(str, more)]
    if more == ["other weights"]:
        other = pipelines.make_sdxl(tmp_path / "sdxl", seed=1)
        flags = [*scored, "--pretrained_model_name_or_path", str(other)]
    before = len(recipes(tmp_path / "cache"))
    capfd.readouterr()
    assert main([*flags, "--max_train_steps", "6"]) == 0
    error = capfd.readouterr().err
    assert said in error and "they are computed anew" in error and "12 computed now" in error
    assert len(recipes(tmp_path / "cache")) == before + 1


@pytest.mark.exhaustive
def test_an_edited_recipe_and_a_damaged_record_are_refused(scored, tmp_path, capfd):
    (recipe,) = recipes(tmp_path / "cache")
    good = recipe.read_text()
    value = json.loads(good)
    value["facts"]["seed"] = 7
    recipe.write_text(json.dumps(value))
    refused(lambda: main(scored), ["facts.seed: 0 -> 7", "delete the folder"], capfd)
    recipe.write_text(good)
    (shard,) = recipe.parent.glob("shard-*.bin")
    data = bytearray(shard.read_bytes())
    data[random.randrange(12 * 8)] ^= 1 << random.randrange(8)
    shard.write_bytes(data)
    refused(lambda: main(scored), [str(shard), "damaged", "verify --remove"], capfd)
    assert cache_command.main(["verify", "--remove", "--latent_cache_dir", str(tmp_path / "cache")]) == 0
    assert main(scored) == 0
    (shard,) = recipe.parent.glob("shard-*.bin")
    os.truncate(shard, 100)
    flags = [str(flag) for flag in scored]
    refused(lambda: main([*flags, "--overwrite"]), [shard.stem, "dpo_fast.cache reference --draws K"], capfd)
    at = flags.index("--cached_reference")
    assert cache_command.main(["reference", "--draws", "2", *flags[:at], *flags[at + 2 :]]) == 0
    assert main([*flags, "--overwrite"]) == 0


def rewritten(recipe: Path, change) -> None:
    """Every record and meta as `change` gives them, with checksums that fit."""
    store, records = opened_store(recipe), []
    for shard in store.shards:
        for i, key in enumerate(shard.keys):
            records.append((key, *change(shard.records[i].view(np.float32).copy(), dict(shard.meta[i]))))
    text = recipe.read_text()
    shutil.rmtree(recipe.parent)
    begin_folder(store.folder.parent, store.recipe)
    assert recipe.read_text() == text
    with Writer(store.folder.parent, store.recipe, 0) as writer:
        for key, record, meta in records:
            writer.add(key, record.tobytes(), meta)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("fault", ["of another model", "columns exchanged", "draws exchanged"])
def test_errors_that_are_not_the_references_stop_the_run_at_once(scored, tmp_path, capfd, fault, seed):
    random_ = np.random.default_rng(seed)
    (recipe,) = recipes(tmp_path / "cache")

    def poisoned(errors, meta):
        if fault == "of another model":
            errors *= 1 + 1e-4 * random_.standard_normal(errors.shape).astype(np.float32)
        elif fault == "columns exchanged":
            errors = errors.reshape(-1, 2)[:, ::-1].copy()
        return errors, meta

    rewritten(recipe, poisoned)
    if fault == "draws exchanged":
        store = opened_store(recipe)
        (index,) = recipe.parent.glob("shard-*.json")
        keys = store.shards[0].keys
        records = [store.shards[0].records[i].copy() for i in range(2)]
        index.unlink()
        index.with_suffix(".bin").unlink()
        with Writer(store.folder.parent, store.recipe, 0) as writer:
            for key, record in zip(keys, reversed(records), strict=True):
                writer.add(key, record.tobytes(), {})
    said = ["--cached_reference", "rounding explains", "prune", recipe.parent.name]
    refused(lambda: main(scored), said, capfd)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    prune = ["prune", "--latent_cache_dir", str(tmp_path / "cache"), "--name", recipe.parent.name, "--yes"]
    assert cache_command.main(prune) == 0
    assert main(scored) == 0


def test_other_numerics_are_told_with_a_sample_computed_again(scored, tmp_path, capfd):
    (recipe,) = recipes(tmp_path / "cache")
    rewritten(recipe, lambda errors, meta: (errors, {**meta, "torch": "2.0.0", "device": "NVIDIA GeForce 256"}))
    capfd.readouterr()
    assert main(scored) == 0
    error = capfd.readouterr().err
    assert f"torch: 2.0.0 -> {torch.__version__}" in error and "device: NVIDIA GeForce 256 -> cpu" in error
    assert "of 24 computed again the margins differ by" in error
    assert summary(tmp_path / "run")["initial_margin_rms"] < MARGIN_ROUNDING


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--no-cache", "--cached_reference", 2], ["--cached_reference", "--no-cache"]),
        (["--objective", "sft", "--cached_reference", 2], ["--cached_reference", "sft", "no reference"]),
        (["--cached_reference", 0], ["--cached_reference (0)", "at least 1"]),
    ],
)
def test_what_cannot_be_had_is_refused(sdxl_path, pairs, tmp_path, capfd, argv, said):
    refused(lambda: main(flags_for(sdxl_path, pairs, tmp_path / "run", *argv)), said, capfd)


def test_the_command_wants_draws_and_a_seed(sdxl_path, pairs, tmp_path, capfd):
    flags = flags_for(sdxl_path, pairs, tmp_path / "run")
    refused(lambda: cache_command.main(["reference", *flags]), ["--draws K"], capfd)
    at = flags.index("--seed")
    refused(lambda: cache_command.main(["reference", "--draws", "2", *flags[:at], *flags[at + 2 :]]), ["--seed"], capfd)


@pytest.mark.exhaustive
def test_too_few_draws_for_few_pairs_are_told(sdxl_path, pairs, tmp_path, where, capfd):
    train(sdxl_path, pairs, tmp_path / "few", *where, "--max_train_steps", 24, "--cached_reference", 1)
    said = capfd.readouterr().err
    assert "--cached_reference 1: 12 pairs are visited up to 4 times each" in said and "at least 2 draws" in said
    train(sdxl_path, pairs, tmp_path / "enough", *where, "--max_train_steps", 24, "--cached_reference", 2)
    assert "are visited up to" not in capfd.readouterr().err


def test_errors_that_are_not_finite_are_refused(sdxl_path, pairs, tmp_path, where, capfd, monkeypatch):
    denoise = Family.denoise

    def overflowing(self, unet, noisy, timesteps, conditioning):
        out = denoise(self, unet, noisy, timesteps, conditioning)
        out[1] = torch.inf
        return out

    monkeypatch.setattr(Family, "denoise", overflowing)
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", *where, "--cached_reference", 1)
    refused(lambda: main(flags), ["not finite", "--mixed_precision"], capfd)
