"""Implicit rewards of policies against the definition in float64, and what is made of them."""

import copy
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_fast import draws, parallel
from dpo_fast.data import VALIDATION_DRAWS, PairIndex, build_index
from dpo_fast.data.images import crop_corner, scaled, to_pixels
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.implicit import ImplicitAccuracy, ImplicitRewards, accuracy, implicit_rewards, noise_levels
from dpo_fast.evaluation.report.charts import bars
from dpo_fast.evaluation.sides import model_sources, read_run
from dpo_fast.kernels.reference import normal_noise
from dpo_fast.models.opened import OneAtATime, settled
from dpo_fast.models.source import ModelSource, base_of
from tests.helpers import pipelines
from tests.helpers.pairs import open_pairs, pickapic, write_table
from tests.helpers.runs import environment, train
from tests.runs.test_distributed import TORCHRUN

CPU = torch.device("cpu")
SEED = 0  # of the draws, in this process and in those that tests start; see own_seed


@pytest.fixture(scope="module", autouse=True)
def own_seed() -> None:
    """The draws are other ones in each run."""
    global SEED
    SEED = random.randrange(2**31)


def measured(
    policy: ModelSource,
    reference: ModelSource,
    pairs: Path,
    *,
    ranks: parallel.Ranks | None = None,  # None: one process
    index: PairIndex | None = None,  # None: all pairs
    **more,
) -> ImplicitRewards | None:
    source = open_pairs(str(pairs))
    index = index or build_index(source, seed=0, progress=False).train
    ranks = ranks or parallel.start("none")
    given = dict(draws=4, seed=SEED, batch_size=3, num_workers=0, beta=2000.0, max_bad_fraction=0.01)
    return implicit_rewards(policy, reference, source, index, ranks, **given | more)


def first_pairs(pairs: Path, n: int) -> PairIndex:
    index = build_index(open_pairs(str(pairs)), seed=0, progress=False).train
    return index.keep(torch.arange(len(index)) < n)


@pytest.fixture(scope="session")
def moved(sdxl_path, pairs, tmp_path_factory) -> Path:
    """A LoRA run whose result differs from its base."""
    return train(sdxl_path, pairs, tmp_path_factory.mktemp("runs") / "moved", "--learning_rate", 1e-2)


@torch.no_grad()
def by_definition(policy: ModelSource, reference: ModelSource, pairs: Path, index: PairIndex, k: int):
    """Timesteps [n] and policy minus reference errors [n, 2] at draw k, one image at a time, the UNets in float64."""
    base, other = OneAtATime(CPU).open(reference), OneAtATime(CPU).open(policy)
    unets = [copy.deepcopy(family.unet).double() for family in (other, base)]
    config = base.pipeline.scheduler.config
    abar = (1 - DDPMScheduler(beta_schedule=config.beta_schedule, beta_start=config.beta_start,
                              beta_end=config.beta_end).betas.double()).cumprod(0)  # fmt: skip
    if base.timestep_grid:
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    source, found, times = open_pairs(str(pairs)), [], []
    for row, chosen, caption in zip(index.pair_id.tolist(), index.chosen.tolist(), index.captions, strict=True):
        ids, draw = torch.tensor([row]), torch.tensor([k])
        t = draws.timesteps(SEED, ids, draw, base.timesteps, grid=base.timestep_grid)
        noise = normal_noise(SEED, ids, draw, 4, 8, 8).double()
        text = base.encode_prompts([caption])
        added = None
        if base.needs_time_ids:
            added = {
                "text_embeds": text["pooled_prompt_embeds"].double(),
                "time_ids": pipelines.default_time_ids(64, 1),
            }
        images = source.image_bytes(row)
        deltas = []
        for encoded in (images[chosen], images[1 - chosen]):
            latents = base.encode_images(cut(encoded)[None]).double()
            noisy = abar[t].sqrt() * latents + (1 - abar[t]).sqrt() * noise
            v = base.schedule.prediction_type == "v_prediction"
            target = abar[t].sqrt() * noise - (1 - abar[t]).sqrt() * latents if v else noise
            errors = [
                (unet(noisy, t, text["prompt_embeds"].double(), added_cond_kwargs=added).sample - target)
                .square()
                .mean()
                for unet in unets
            ]
            deltas.append(errors[0] - errors[1])
        times.append(t)
        found.append(torch.stack(deltas))
    return torch.cat(times), torch.stack(found)


def cut(encoded: bytes) -> torch.Tensor:
    """The centre of a scaled image, as `PairTransform` has it."""
    image, _ = scaled(encoded, 64)
    return to_pixels(image, *crop_corner(image.size, 64, None), 64)


def assert_as_defined(rewards: ImplicitRewards, policy, reference, pairs: Path, index: PairIndex) -> None:
    assert rewards.pair_id.tolist() == index.pair_id.tolist() and rewards.captions == index.captions
    for k in range(rewards.timesteps.shape[1]):
        times, deltas = by_definition(policy, reference, pairs, index, k)
        assert torch.equal(rewards.timesteps[:, k], times)
        ours = torch.stack([rewards.chosen_delta[:, k], rewards.rejected_delta[:, k]], 1)
        assert deltas.abs().max() > 1e-2  # the models differ
        torch.testing.assert_close(ours, deltas, rtol=1e-3, atol=1e-4 * deltas.abs().max().item())


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_a_lora_is_measured_as_defined(moved, pairs):
    base, policy = model_sources(str(moved)).values()
    index = first_pairs(pairs, 4)
    rewards = measured(policy, base, pairs, index=index, draws=3)
    assert_as_defined(rewards, policy, base, pairs, index)
    assert rewards.levels == [(0, 249), (250, 499), (500, 749), (750, 999)] and rewards.beta == 2000


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "turbo"])
def test_a_whole_model_lends_its_unet_only(request, name, pairs, tmp_path):
    """The policy's VAE and text encoders are others than the reference's, and change nothing."""
    make = getattr(pipelines, f"make_{name}")
    reference = ModelSource(str(request.getfixturevalue(f"{name}_path")), turbo=name == "turbo")
    policy = replace(reference, path=str(make(tmp_path / "policy", seed=5)))
    index = first_pairs(pairs, 3)
    rewards = measured(policy, reference, pairs, index=index, draws=3)
    assert_as_defined(rewards, policy, reference, pairs, index)
    if name == "turbo":
        assert rewards.levels == [(249, 249), (499, 499), (749, 749)]
        assert all(sorted(row) == [249, 499, 749] for row in rewards.timesteps.tolist())


def test_v_prediction_and_the_runs_schedule(tmp_path, pairs):
    path = pipelines.make_sd15(tmp_path / "base", prediction_type="v_prediction")
    reference = ModelSource(str(path))
    policy = replace(reference, path=str(pipelines.make_sd15(tmp_path / "p", prediction_type="v_prediction", seed=2)))
    index = first_pairs(pairs, 2)
    rewards = measured(policy, reference, pairs, index=index, draws=2)
    assert_as_defined(rewards, policy, reference, pairs, index)
    other = measured(replace(policy, zero_terminal_snr="on"), reference, pairs, index=index, draws=2)
    assert not torch.allclose(other.error_delta, rewards.error_delta)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("tuning, dtype", [("lora", torch.float32), ("lora", torch.bfloat16), ("full", torch.float32)])
def test_a_policy_that_did_not_move_is_even_to_the_bit(sdxl_path, pairs, tmp_path, monkeypatch, tuning, dtype):
    monkeypatch.setattr("dpo_fast.models.opened.compute_dtype", lambda *_: dtype)
    if tuning == "lora":
        run = train(sdxl_path, pairs, tmp_path / "run", "--learning_rate", 1e-30, "--max_train_steps", 1)
        file = run / "pytorch_lora_weights.safetensors"
        state = load_file(file)
        # B is zero where training left it so; one of 1e-30 would be lost in rounding as well
        zero = {name: torch.zeros_like(value) if "lora_B" in name or ".up." in name else value
                for name, value in state.items()}  # fmt: skip
        assert any(value.any() for value in zero.values()) and any(not value.any() for value in zero.values())
        with_metadata(file, zero)
        reference, policy = model_sources(str(run)).values()
        assert policy.adapter
    else:
        reference = ModelSource(str(sdxl_path))
        policy = ModelSource(str(shutil.copytree(sdxl_path, tmp_path / "copy")))
    rewards = measured(policy, reference, pairs, batch_size=5)
    assert not rewards.error_delta.any() and not rewards.chosen_delta.any()
    found = accuracy(rewards)
    assert found.interval == found.one_draw == (0.5, 0.5, 0.5) and found.ties == found.pairs == 12
    assert {level.interval for level in found.levels} == {(0.5, 0.5, 0.5)} and not found.decided
    assert found.margin == (0, 0, 0)


def with_metadata(file: Path, state: dict[str, torch.Tensor]) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(state, file, metadata=metadata)
    (file.parent / "summary.json").unlink(missing_ok=True)  # the change is meant


def test_a_lora_is_loaded_once_and_its_reference_is_the_base(moved, pairs, monkeypatch):
    base, policy = model_sources(str(moved)).values()
    loaded = []
    load = OneAtATime._load
    monkeypatch.setattr(OneAtATime, "_load", lambda self, source: loaded.append(source) or load(self, source))
    switched = measured(policy, replace(base, steps=3, guidance=1.0), pairs)  # how it is sampled does not matter
    assert loaded == [replace(policy, adapter=None)]
    twin = replace(base, path=base.path + "/")  # the same weights by another name
    apart = measured(policy, twin, pairs)
    assert len(loaded) == 3
    torch.testing.assert_close(switched.error_delta, apart.error_delta, rtol=0, atol=1e-6)


@pytest.mark.exhaustive
def test_the_batch_changes_rounding_only(moved, pairs):
    base, policy = model_sources(str(moved)).values()
    one, many = (measured(policy, base, pairs, batch_size=size) for size in (1, 7))
    assert torch.equal(one.timesteps, many.timesteps) and one.captions == many.captions
    torch.testing.assert_close(one.error_delta, many.error_delta, rtol=1e-4, atol=1e-6)


def test_the_draws_are_trainings_and_fall_in_every_quarter(moved, pairs):
    base, policy = model_sources(str(moved)).values()
    rewards = measured(policy, base, pairs)
    assert all(sorted(row) == [0, 1, 2, 3] for row in (rewards.timesteps // 250).tolist())
    fewer = measured(policy, base, pairs, draws=2)
    assert torch.equal(fewer.error_delta, rewards.error_delta[:, :2])
    other = measured(policy, base, pairs, draws=2, seed=SEED + 1)
    assert not torch.equal(other.timesteps, fewer.timesteps)


def test_noise_levels_are_quarters_or_single_timesteps():
    def levels(first: int, after: int, grid: bool = False) -> list[tuple[int, int]]:
        return noise_levels(torch.arange(first, after), grid=grid)

    assert levels(0, 1000) == [(0, 249), (250, 499), (500, 749), (750, 999)]
    assert levels(200, 1000) == [(200, 399), (400, 599), (600, 799), (800, 999)]
    assert levels(0, 999) == [(0, 248), (249, 498), (499, 748), (749, 998)]
    assert levels(300, 303) == [(300, 300), (301, 301), (302, 302)]
    assert len(levels(0, 6, grid=True)) == 6
    everything = levels(3, 3 + int(torch.randint(4, 900, ())))
    assert [last for _, last in everything][:-1] == [first - 1 for first, _ in everything][1:]


def test_timesteps_are_limited_as_asked(moved, pairs):
    base, policy = model_sources(str(moved)).values()
    rewards = measured(policy, base, pairs, draws=2, min_timestep=300, max_timestep=302)
    assert set(rewards.timesteps.flatten().tolist()) == {300, 301} and rewards.levels == [(300, 300), (301, 301)]
    with pytest.raises(BadInput, match=r"--min_timestep \(1000\).* 0 to 999; widen"):
        measured(policy, base, pairs, min_timestep=1000)


def test_real_time_ids_are_those_of_the_images(moved, pairs):
    base, policy = model_sources(str(moved)).values()
    fixed, real = (measured(policy, base, pairs, draws=1, time_ids=kind) for kind in ("fixed", "real"))
    assert not torch.allclose(fixed.error_delta, real.error_delta)  # the images are 72 pixels wide


@pytest.mark.exhaustive
def test_training_makes_a_reward_model_and_counts_as_this_does(sd15_path, pairs, tmp_path):
    flags = ["--learning_rate", 1e-3, "--max_train_steps", 80, "--train_batch_size", 6, "--beta_dpo", 100]
    flags += [
        "--min_timestep",
        100,
        "--max_timestep",
        900,
        "--run_validation",
        "--validation_fraction",
        0.4,
        "--sampling_steps",
        1,
        "--validation_steps",
        80,
    ]
    run = train(sd15_path, pairs, tmp_path / "run", *flags)
    config = read_run(str(run))
    limits = {"min_timestep": config.min_timestep, "max_timestep": config.max_timestep}
    sets = build_index(open_pairs(str(pairs)), seed=config.seed, validation_fraction=0.4, progress=False)
    base, policy = model_sources(str(run)).values()
    assert base == settled(base_of(config))

    def found(index: PairIndex, draws: int) -> ImplicitAccuracy:
        return accuracy(
            measured(policy, base, pairs, index=index, seed=config.seed, draws=draws, beta=config.beta_dpo, **limits)
        )

    trained = found(sets.train, 8)
    assert trained.interval.value >= 0.9 and trained.margin.low > 0
    held_out = found(sets.validation, VALIDATION_DRAWS)
    said = json.loads((run / "summary.json").read_text())["validation_accuracy"]
    assert held_out.one_draw.value == pytest.approx(said) and held_out.pairs > 1


# ---- what is left out and refused --------------------------------------------------------------------------------


def test_a_bad_image_is_left_out_and_counted(moved, pairs, tmp_path):
    base, policy = model_sources(str(moved)).values()
    columns = pickapic(n=7, size=72, seed=3)
    whole = measured(policy, base, write_table(tmp_path / "whole.parquet", columns), batch_size=1)
    columns["jpg_1"][4] = columns["jpg_1"][4][:200]
    spoilt = write_table(tmp_path / "spoilt.parquet", columns)
    source = open_pairs(str(spoilt))
    index = build_index(source, seed=0, progress=False, check_pairs=2).train
    rewards = measured(policy, base, spoilt, index=index, batch_size=1, max_bad_fraction=0.2)
    assert rewards.pair_id.tolist() == [0, 1, 2, 3, 5, 6] and [bad.row for bad in rewards.bad] == [4]
    assert torch.equal(rewards.error_delta, whole.error_delta[torch.tensor([0, 1, 2, 3, 5, 6])])
    found = accuracy(rewards)
    assert (found.pairs, found.bad) == (6, 1)
    assert "1 left out: an image does not decode, or both are the same" in str(found)
    with pytest.raises(BadInput, match=r"1 of 7 rows cannot be used.*row 4"):
        measured(policy, base, spoilt, index=index, max_bad_fraction=0.1)
    nothing = index.keep(index.pair_id == 4)
    with pytest.raises(BadInput, match="none of its 1"):
        measured(policy, base, spoilt, index=nothing, max_bad_fraction=1.0)


def test_models_that_do_not_go_together_are_refused(sd15_path, sdxl_path, pairs, tmp_path, monkeypatch):
    sd15, sdxl = ModelSource(str(sd15_path)), ModelSource(str(sdxl_path))
    v = ModelSource(str(pipelines.make_sd15(tmp_path / "v", prediction_type="v_prediction")))
    with pytest.raises(BadInput, match=r"predicts epsilon and .* v_prediction: name the model"):
        measured(sd15, v, pairs)
    monkeypatch.setattr(OneAtATime, "_load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(BadInput, match="is a sd15 model and the policy sdxl"):
        measured(sdxl, sd15, pairs)
    with pytest.raises(BadInput, match="is a turbo model"):
        measured(sdxl, replace(sdxl, turbo=True), pairs)
    wide = shutil.copytree(sd15_path, tmp_path / "wide")
    config = json.loads((wide / "unet" / "config.json").read_text())
    for key, value, said in (("cross_attention_dim", 48, "takes 32 numbers a token"), ("in_channels", 9, "4 latent")):
        (wide / "unet" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BadInput, match=said):
            measured(ModelSource(str(wide)), sd15, pairs)


def test_errors_that_are_not_finite_name_the_row(sd15_path, pairs, tmp_path):
    spoilt = shutil.copytree(sd15_path, tmp_path / "spoilt")
    file = spoilt / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_out.bias"][0] = torch.nan
    with_metadata(file, state)
    good, bad = ModelSource(str(sd15_path)), ModelSource(str(spoilt))
    with pytest.raises(BadInput, match=r"row 0: the policy's error is not finite in float32; its weights are spoilt"):
        measured(bad, good, pairs)
    with pytest.raises(BadInput, match=r"row 0: the reference's error is not finite"):
        measured(good, bad, pairs)


class OneByOne(parallel.Ranks):
    """Ranks that come one after another in this process, the main one last."""

    gathered: ClassVar[list[object]] = []

    def on_all(self, work):
        return work()

    def gather(self, value):
        self.gathered.insert(0, value)
        return self.gathered


def test_the_shares_of_ranks_are_the_whole(moved, pairs, monkeypatch):
    base, policy = model_sources(str(moved)).values()
    alone = measured(policy, base, pairs, batch_size=2, index=first_pairs(pairs, 9))
    monkeypatch.setattr(OneByOne, "gathered", [])
    for rank in (2, 1, 0):
        ranks = OneByOne(**vars(parallel.start("none")) | {"rank": rank, "world_size": 3})
        together = measured(policy, base, pairs, batch_size=2, index=first_pairs(pairs, 9), ranks=ranks)
        assert (together is None) == (rank > 0)
    assert [sum(map(len, part.pair_id)) for part in OneByOne.gathered] == [4, 3, 2]
    assert_equal(together, alone)


def assert_equal(one: ImplicitRewards, other: ImplicitRewards) -> None:
    for name, value in vars(one).items():
        same = torch.equal(value, vars(other)[name]) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        assert same, name


@pytest.mark.exhaustive
def test_two_processes_measure_what_one_does(moved, pairs, tmp_path):
    base, policy = model_sources(str(moved)).values()
    alone = measured(policy, base, pairs, batch_size=2)
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.evaluation import test_implicit as t\n"
        f"t.SEED = {SEED}\n"
        "base, policy = t.model_sources(sys.argv[1]).values()\n"
        "rewards = t.measured(policy, base, Path(sys.argv[2]), batch_size=2)\n"
        "if rewards is not None:\n"
        "    torch.save(rewards, sys.argv[3])\n"
    )
    out = tmp_path / "rewards.pt"
    command = [sys.executable, *TORCHRUN, str(script), str(moved), str(pairs), str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(out, weights_only=False), alone)


# ---- what is made of them ------------------------------------------------------------------------------------------


def rewards_of(margins: list[list[float]], captions: list[str], times: list[list[int]], **more) -> ImplicitRewards:
    """Rewards with these margins at beta 2, where a margin is minus an error_delta."""
    delta = -torch.tensor(margins, dtype=torch.float64)
    chosen = torch.randn(delta.shape, dtype=torch.float64).mul(64).round() / 64  # sums of these are exact
    return ImplicitRewards(
        **{
            "pair_id": torch.arange(len(margins)),
            "captions": captions,
            "timesteps": torch.tensor(times),
            "chosen_delta": chosen,
            "rejected_delta": chosen - delta,
            "levels": [(0, 249), (250, 499), (500, 749), (750, 999)],
            "beta": 2.0,
            "bad": [],
        }
        | more
    )


def test_accuracy_by_hand():
    margins = [[1.0, -3.0], [2.0, -1.0], [0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]]
    times = [[100, 600], [249, 500], [0, 749], [10, 700], [20, 250]]
    rewards = rewards_of(margins, ["a", "a", "b", "c", "c"], times)
    found = accuracy(rewards)
    assert found.interval.value == pytest.approx((0 + 1 + 0.5 + 0.5 + 0) / 5)
    assert found.one_draw.value == pytest.approx((0.5 + 0.5 + 0.5 + 0.5 + 0.5) / 5)
    assert found.margin.value == pytest.approx(-2.5 / 10) and found.beta == 2
    assert found.chosen_delta.value == pytest.approx(rewards.chosen_delta.mean().item())
    assert found.rejected_delta.value == pytest.approx(rewards.rejected_delta.mean().item())
    assert (found.pairs, found.captions, found.draws, found.ties, found.bad) == (5, 3, 2, 2, 0)
    assert [(level.first, level.pairs) for level in found.levels] == [(0, 5), (250, 1), (500, 4)]
    assert [level.interval.value for level in found.levels] == pytest.approx([3.5 / 5, 1, 0.5 / 4])
    assert found.levels[1].interval == (1, 0, 1)  # one of one
    assert found.one_draw.low < 0.5 < found.one_draw.high  # each pair right at one of two draws: no ties but one


def test_draws_at_one_level_count_by_their_mean():
    found = accuracy(rewards_of([[3.0, -1.0, -1.0]] * 3, ["a", "b", "c"], [[5, 6, 7]] * 3))
    (level,) = found.levels
    assert level.interval.value == found.interval.value == 1 and found.one_draw.value == pytest.approx(1 / 3)
    assert level.name == "timesteps 0 to 249" and level.decided == (level.interval.low > 0.5)


def test_pairs_of_a_caption_come_and_go_together():
    """Ten equal pairs of each of eight captions know no more than eight pairs."""
    signs = [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0]
    few = accuracy(rewards_of([[sign] for sign in signs], [*"abcdefgh"], [[0]] * 8))
    many = accuracy(rewards_of([[sign] for sign in signs] * 10, [*"abcdefgh"] * 10, [[0]] * 80))
    assert many.interval == pytest.approx(few.interval, rel=0.02) and many.margin == pytest.approx(few.margin)
    apart = accuracy(rewards_of([[sign] for sign in signs] * 10, [str(k) for k in range(80)], [[0]] * 80))
    assert apart.interval.high - apart.interval.low < 0.5 * (many.interval.high - many.interval.low)
    assert apart.decided and not many.decided and "only 8 captions" in str(many) and "only" not in str(apart)


def test_all_right_is_not_certain():
    found = accuracy(rewards_of([[1.0]] * 40, [str(k // 2) for k in range(40)], [[0]] * 40))
    assert found.interval == pytest.approx((1, 20 / (20 + 2.093024**2), 1))  # of 20 captions
    wrong = accuracy(rewards_of([[-1.0]] * 4, [*"abcd"], [[0]] * 4))
    assert wrong.interval == wrong.one_draw == pytest.approx((0, 0, 1 - 4 / (4 + 3.182446**2)))


def test_what_is_said_and_kept():
    margins = torch.randn(30, 4).add(0.4).tolist()
    times = [[10, 300, 600, 900]] * 30
    found = accuracy(rewards_of(margins, [str(k) for k in range(30)], times))
    summary = found.for_summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["implicit_accuracy"] == found.interval.value
    assert summary["implicit_accuracy_ci95"] == [found.interval.low, found.interval.high]
    assert [level["timesteps"] for level in summary["implicit_accuracy_by_noise"]] == [
        [0, 249], [250, 499], [500, 749], [750, 999]
    ]  # fmt: skip
    lines = str(found).splitlines()
    assert lines[0].startswith("implicit accuracy") and str(found.interval) in lines[0] and "4 draws" in lines[0]
    assert "at beta 2" in str(found) and all(len(line) <= 150 for line in lines)
    unknown = accuracy(rewards_of(margins, [str(k) for k in range(30)], times, beta=None))
    assert unknown.margin is None and unknown.interval == found.interval and "at beta" not in str(unknown)
    assert unknown.for_summary()["margin"] is None and unknown.for_summary()["margin_ci95"] is None


def test_a_chart_shows_it():
    found = accuracy(rewards_of([[1.0], [-1.0], [1.0]], [*"abc"], [[0], [300], [900]]))
    chart = bars([("all", "3 pairs", found), *((x.name, f"{x.pairs} pairs", x) for x in found.levels)], "accuracy")
    assert chart.count("<li>") == 4 and "all: accuracy 0.667, 95% interval" in chart and "win rate" not in chart
    assert "timesteps 250 to 499: accuracy 0.000" in chart
