"""What a run warns of: each warning at its threshold, true, with a remedy that ends it; and no preset warns."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.command_line import parse
from dpo_fast.config import TrainConfig
from dpo_fast.presets import PRESETS
from dpo_fast.statistics import interval95
from dpo_fast.train import main
from dpo_fast.training import advice, memory_fit
from dpo_fast.training.advice import Visits, disk_need, pairs_that_tell
from dpo_fast.training.costs import costs_of
from dpo_fast.training.memory_fit import Fit, cheapest_fit, fit_of
from tests.helpers.pairs import write_pickapic
from tests.helpers.runs import flags_for

CPU = torch.device("cpu")
GIB = 2**30


def settled(*flags: object) -> TrainConfig:
    """A configuration with its pairs a step and an output folder, as a run of one process has."""
    named = [] if "--preset" in flags else ["--pretrained_model_name_or_path", "m", "--dataset_name", "d"]
    config = parse([*named, *map(str, flags)])[0]
    pairs = config.pairs_per_step or config.train_batch_size * config.gradient_accumulation_steps
    return replace(
        config,
        pairs_per_step=pairs,
        gradient_accumulation_steps=pairs // config.train_batch_size,
        output_dir=config.output_dir or Path("out"),
    )


def visits(config: TrainConfig, pairs: int | None, exact: bool = True) -> Visits:
    return Visits(config.max_train_steps, pairs, config.max_train_steps * config.pairs_per_step, exact)


# ---- passes ----------------------------------------------------------------------------------------------------------


def test_too_many_passes():
    config = settled("--preset", "sdxl-lora")  # 2000 steps of 16 pairs
    said = advice.of_passes(config, visits(config, 20))
    assert said.startswith("2000 steps of 16 pairs pass 1,600 times over 20 pairs") and "--max_train_steps 62" in said
    fewer = replace(config, max_train_steps=62)
    assert advice.of_passes(fewer, visits(fewer, 20)) is None
    assert advice.of_passes(replace(config, max_train_steps=63), visits(replace(config, max_train_steps=63), 20))
    assert advice.of_passes(config, visits(config, 640)) is None and advice.of_passes(config, visits(config, 639))
    whole = settled("--preset", "sdxl")  # a step of 2048 pairs
    assert "a smaller --pairs_per_step and fewer --max_train_steps" in advice.of_passes(whole, visits(whole, 20))


def test_too_few_passes():
    config = settled("--max_train_steps", 100)  # 400 visits
    said = advice.of_passes(config, visits(config, 10_000))
    assert (
        "see only 400 of 10,000 pairs: --max_train_steps 2500 sees each once" in said and "--max_train_samples" in said
    )
    assert advice.of_passes(config, visits(config, 4000)) is None and advice.of_passes(config, visits(config, 4001))


def test_of_a_stream_only_what_is_certain_is_said():
    config = settled("--preset", "sdxl-lora")
    assert "over at most 20 pairs" in advice.of_passes(config, visits(config, 20, exact=False))
    assert advice.of_passes(config, visits(config, None)) is None


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_warns_of_its_own_settings_on_its_own_pairs(preset):
    config = settled("--preset", preset)
    seen = visits(config, 913 if preset == "shapes" else 850_000)
    assert advice.of_passes(config, seen) is None
    assert advice.of_warm_up(config, config.max_train_steps) is None
    assert advice.of_rate(config) is None
    assert advice.of_draws(replace(config, cached_reference=-(-seen.visited // seen.pairs)), seen) is None


def test_draws_that_recur():
    config = settled("--cached_reference", 1, "--max_train_steps", 100, "--train_batch_size", 4)
    said = advice.of_draws(config, visits(config, 20))
    assert (
        "20 pairs are visited up to 20 times each" in said and "at least 10 draws, and with 20 no draw recurs" in said
    )
    assert advice.of_draws(replace(config, cached_reference=9), visits(config, 20))
    assert advice.of_draws(replace(config, cached_reference=10), visits(config, 20)) is None
    assert advice.of_draws(replace(config, cached_reference=None), visits(config, 20)) is None
    many = settled("--cached_reference", 1, "--max_train_steps", 10_000)
    assert advice.of_draws(many, visits(many, 10_000)) is None and advice.of_draws(many, visits(many, 9_999))


# ---- learning rate ---------------------------------------------------------------------------------------------------


def test_a_run_that_ends_within_its_warm_up():
    config = settled("--lr_scheduler", "constant_with_warmup")  # 500 steps of warm-up
    said = advice.of_warm_up(config, 101)
    assert "the run ends after 101 steps, within the warm-up, at 20% of its learning rate" in said
    assert "--lr_warmup_steps 10 " in said
    assert advice.of_warm_up(config, 500) and advice.of_warm_up(config, 501) is None
    assert advice.of_warm_up(settled(), 10) is None  # constant: no warm-up


def test_the_share_of_the_rate_that_is_named_is_reached():
    from dpo_fast.training.optim import rate_schedule

    config = settled("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 40)
    factor = rate_schedule(config, 1.0, 11)(10)
    assert f"at {factor:.0%} of its learning rate" in advice.of_warm_up(config, 11)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        (["--preset", "sdxl", "--pairs_per_step", 16], "1.6e-07"),
        (["--scale_lr", "--pairs_per_step", 2048], "0.02048"),
        (["--scale_lr", "--learning_rate", 1e-4, "--train_batch_size", 16], "0.0016"),
    ],
)
def test_a_scaled_rate_far_from_every_preset(flags, rate):
    said = advice.of_rate(settled(*flags))
    assert f"which gives {rate}; the presets train at 1e-05 to 3e-05" in said
    assert "--no_scale_lr --learning_rate 1e-05" in said
    assert advice.of_rate(settled(*flags, "--no_scale_lr", "--learning_rate", 1e-5)) is None


def test_a_rate_that_is_given_as_it_is_is_never_doubted():
    assert advice.of_rate(settled("--learning_rate", 0.5)) is None
    lora = settled("--scale_lr", "--learning_rate", 5e-4 / 4, "--train_batch_size", 4)  # docs/alignment.md's LoRA
    assert advice.of_rate(lora) is None


# ---- model -----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_rank_above_a_layers_width(sdxl_path):
    def said(rank: int) -> str | None:
        config = settled("--pretrained_model_name_or_path", sdxl_path, "--dataset_name", "d", "--rank", rank)
        return advice.of_rank(config, costs_of(config, "cpu"))

    ranks = costs_of(settled("--pretrained_model_name_or_path", sdxl_path), "cpu").unet.ranks
    assert said(min(ranks)) is None
    above = said(min(ranks) + 1)
    assert f"--rank {min(ranks) + 1}: {ranks.count(min(ranks))} of the {len(ranks)} adapted layers" in above
    assert f"--rank {min(ranks)} is enough" in above


def test_how_many_held_out_pairs_tell_a_published_accuracy_from_chance():
    enough = pairs_that_tell(0.61)
    assert interval95(0.61, enough)[0] > 0.5 >= interval95(0.61, enough - 1)[0]
    config = settled("--run_validation", "--validation_fraction", 0.1)
    assert f"{enough} tell 0.61" in advice.of_held_out(config, enough - 1)
    assert advice.of_held_out(config, enough) is None
    assert "holds out 2 pairs, whose accuracy is known to +-0.41 only" in advice.of_held_out(config, 2)


@pytest.mark.parametrize(
    ("precision", "fast", "device", "said"),
    [
        ("fp16", "bf16", "cpu", "gradients of fp16 convolutions on a CPU: a step takes many times as long"),
        ("fp16", None, "cpu", "--mixed_precision no is faster"),
        ("bf16", None, "cpu", "PyTorch has no fast bf16 code for this CPU"),
        ("bf16", "bf16", "cpu", None),
        ("no", None, "cpu", None),
        ("fp16", "bf16", "cuda", None),
    ],
)
def test_half_precision_that_a_cpu_is_slow_in(monkeypatch, precision, fast, device, said):
    monkeypatch.setattr(advice, "half_precision", lambda _: fast)
    found = advice.of_precision(settled("--mixed_precision", precision), torch.device(device))
    assert found is None if said is None else said in found
    assert ("or bf16 to halve the memory" in (found or "")) == (
        precision == "fp16" and fast == "bf16" and device == "cpu"
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(monkeypatch, free: float) -> None:
    monkeypatch.setattr(memory_fit, "memory_of", lambda _: (free, 2 * free))


@pytest.mark.parametrize(("share", "verdict"), [(0.99, "too large"), (1.01, "tight"), (1.19, "tight"), (1.21, "fits")])
def test_what_fits(sd15_path, monkeypatch, share, verdict):
    costs = costs_of(settled("--pretrained_model_name_or_path", sd15_path), "cpu")
    memory(monkeypatch, share * costs.needed)
    assert fit_of(costs, CPU).verdict == verdict
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the processes of a host share its memory
    assert fit_of(costs, CPU).verdict == "too large" and "shared by 2 processes" in str(fit_of(costs, CPU))


def test_memory_that_is_not_known_is_not_judged(sd15_path, monkeypatch):
    config = settled("--pretrained_model_name_or_path", sd15_path)
    monkeypatch.setattr(memory_fit, "memory_of", lambda _: None)
    assert advice.of_memory(config, ranks(), costs_of(config, "cpu")) is None


def ranks(world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(device=CPU, world_size=world_size, is_main=True)


def applied(config: TrainConfig, flags: str) -> TrainConfig:
    """A configuration with further flags, as a user would give them."""
    words = ["--pretrained_model_name_or_path", str(config.pretrained_model_name_or_path), "--tuning", config.tuning]
    words += ["--resolution", str(config.resolution), "--mixed_precision", config.mixed_precision]
    words += ["--train_batch_size", str(config.train_batch_size), "--pairs_per_step", str(config.pairs_per_step)]
    return settled(*words, "--dataset_name", "d", *flags.split())


@pytest.mark.exhaustive
def test_the_cheapest_flags_fit_and_cheaper_ones_do_not(sd15_path, monkeypatch):
    monkeypatch.setattr(memory_fit, "half_precision", lambda _: "bf16")
    flags = ["--tuning", "full", "--resolution", 256, "--train_batch_size", 6, "--pairs_per_step", 12]
    config = settled("--pretrained_model_name_or_path", sd15_path, *flags, "--dataset_name", "d")
    needs, found = [], []
    free = 1.25 * costs_of(config, "cpu").needed
    while True:  # less and less memory
        memory(monkeypatch, free)
        cheapest = cheapest_fit(config, ranks(), costs_of(config, "cpu"))
        if cheapest is None:
            break
        remedy, needed = cheapest
        found.append(remedy)
        needs.append(needed)
        assert needed == fit_of(costs_of(applied(config, remedy), "cpu"), CPU).needed
        assert Fit(needed, free, free, "").verdict == "fits"
        free = 1.2 * needed - 1
    assert found[0] == "" and found[1] == "--train_batch_size 4 --pairs_per_step 12"  # 5 does not divide 12
    assert needs == sorted(needs, reverse=True) and "--tuning lora" in found[-1]
    first = [
        next(i for i, flags in enumerate(found) if word in flags) for word in ("selective", "full", "bf16", "8bit")
    ]
    assert first == sorted(first)


def test_a_run_that_does_not_fit_is_told_what_would(sd15_path, monkeypatch):
    config = settled("--pretrained_model_name_or_path", sd15_path, "--train_batch_size", 8, "--resolution", 256)
    costs = costs_of(config, "cpu")
    memory(monkeypatch, costs.needed / 2)
    said = advice.of_memory(config, ranks(), costs)
    assert said.startswith("the run needs ") and "; --train_batch_size 2 --pairs_per_step 8 needs " in said
    memory(monkeypatch, 1.1 * costs.needed)
    assert advice.of_memory(config, ranks(), costs).startswith("memory is tight: the run needs at least ")
    memory(monkeypatch, 1000)
    assert advice.of_memory(config, ranks(), costs).endswith(
        "no flag makes it fit: free memory, or take a larger device"
    )


# ---- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "every", "limit", "checkpoints"),
    [(2000, 500, None, 4), (2001, 500, None, 5), (10, 500, None, 1), (2000, 500, 2, 3), (2000, 500, 8, 4)],
)
def test_the_checkpoints_that_there_are_at_once(sd15_path, steps, every, limit, checkpoints):
    limits = [] if limit is None else ["--checkpoints_total_limit", limit]
    config = settled("--pretrained_model_name_or_path", sd15_path, "--checkpointing_steps", every, *limits)
    costs = costs_of(config, "cpu")
    need = disk_need(config, costs, steps, images=3)
    pictures = 6 * 3 * costs.resolution**2
    assert need == (checkpoints, checkpoints * costs.checkpoint + costs.result + pictures)


def test_a_disk_that_does_not_hold_all_checkpoints(sd15_path, monkeypatch):
    config = settled("--pretrained_model_name_or_path", sd15_path, "--checkpointing_steps", 1)
    costs = costs_of(config, "cpu")
    free = costs.result + 5.5 * costs.checkpoint
    monkeypatch.setattr(advice, "free_bytes", lambda _: free)
    assert advice.of_disk(config, costs, 5) is None
    said = advice.of_disk(config, costs, 6)
    assert "6 checkpoints and the result take" in said and "; --checkpoints_total_limit 4 fits" in said
    assert "5 checkpoints, the result and the evaluation's images take" in advice.of_disk(
        config, costs, 5, images=10**6
    )
    assert advice.of_disk(replace(config, checkpoints_total_limit=4), costs, 100) is None
    assert advice.of_disk(replace(config, checkpoints_total_limit=5), costs, 100) is not None
    free = costs.result + 1.5 * costs.checkpoint
    assert "; another --output_dir fits" in advice.of_disk(config, costs, 6)


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_logs_its_warnings_before_it_loads_the_model(sd15_path, tmp_path, monkeypatch, caplog):
    """Two pairs, fp16 on a CPU, and too little memory."""
    from dpo_fast.training import run

    class Loading(Exception):
        pass

    def load(*_: object) -> None:
        raise Loading

    memory(monkeypatch, 1000)
    monkeypatch.setattr(run, "load_model", load)
    data = write_pickapic(tmp_path / "pairs.parquet", n=2)
    more = ["--max_train_steps", 51, "--mixed_precision", "fp16"]
    with pytest.raises(Loading):
        main(flags_for(sd15_path, data, tmp_path / "out", *more))
    said = [message for message in caplog.messages if message.startswith("warning: ")]
    assert len(said) == 3
    assert "51 steps of 2 pairs pass 51 times over 2 pairs" in said[0]
    assert "--mixed_precision fp16: the training really computes in fp16 here" in said[1]
    assert "of memory, but only" in said[2]
