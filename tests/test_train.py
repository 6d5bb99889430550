"""Whole runs through the command line's `main`, on tiny pipelines of the real classes."""

import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from dpo_fast.evaluation.sides import read_run
from dpo_fast.kernels import reference as kernels
from dpo_fast.models import AdapterSwitch
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.opened import OneAtATime
from dpo_fast.models.source import result_of
from dpo_fast.train import main
from dpo_fast.training.trainer import Trainer
from tests.helpers.pairs import write_pickapic
from tests.helpers.runs import SAMPLE, STEPS, flags_for, lines, opened, train, weights
from tests.helpers.single_file import write_single_file


def picture(pipeline, seed: int = 3) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a cat",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        height=64,
        width=64,
        output_type="pt",
    ).images
    return images.float()


# ---- real input, real result -----------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the sample of real preference pairs is not there")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_real_pairs_train_an_sdxl_lora_that_diffusers_loads(sdxl_path, tmp_path, precision):
    folder = train(
        sdxl_path, SAMPLE, tmp_path / "run", "--learning_rate", 1e-2, "--lora_alpha", 7, "--mixed_precision", precision
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ties_dropped"] == 1 and summary["bad_rows"] == 0
    assert summary["steps"] == STEPS and summary["pairs_seen"] == 2 * STEPS
    assert summary["loss_first"] == pytest.approx(math.log(2), abs=1e-7) and summary["initial_margin_rms"] == 0

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_path)
    before = picture(pipeline)
    pipeline.load_lora_weights(folder, weight_name=WEIGHT_NAME)  # offline diffusers 0.39 wants it
    after = picture(pipeline)
    assert (after - before).abs().max() > 1e-3
    # what was loaded is what was trained: master weights, alpha / rank a part of B
    trained = weights(folder)
    name = next(n for n in trained if n.endswith("to_q.lora_A.default.weight"))
    module = pipeline.unet.get_submodule(name.removesuffix(".lora_A.default.weight"))
    (adapter,) = module.lora_A
    assert torch.equal(module.lora_A[adapter].weight, trained[name])
    assert torch.equal(module.lora_B[adapter].weight, 7 / 4 * trained[name.replace("lora_A", "lora_B")])
    assert module.scaling[adapter] == 1


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_full_run_gives_a_pipeline(sd15_path, pairs, tmp_path, precision):
    folder = train(
        sd15_path, pairs, tmp_path / "run", "--tuning", "full", "--learning_rate", 1e-4, "--mixed_precision", precision
    )
    before = picture(DiffusionPipeline.from_pretrained(sd15_path))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert (picture(pipeline) - before).abs().max() > 1e-3
    trained = weights(folder)
    state = pipeline.unet.state_dict()
    assert all(torch.equal(state[name], trained[name]) for name in trained)


def test_a_marked_file_is_trained_sampled_and_described_as_it_says(sdxl_path, pairs, tmp_path, caplog):
    """NoobAI's marks: a LoRA on a single file whose keys say v-prediction and zero terminal SNR."""
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    path = write_single_file(DiffusionPipeline.from_pretrained(sdxl_path), tmp_path / "model.safetensors", marks)
    more = "--single_file_config", sdxl_path, "--max_train_steps", 1
    folder = train(path, pairs, tmp_path / "run", *more)
    said = f"{path}: trained with v_prediction (key v_pred), zero terminal SNR (key ztsnr)"
    assert said in caplog.messages
    changes = "prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing'"
    line = f"pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, {changes})"
    assert line in (folder / "README.md").read_text()
    config = OneAtATime(torch.device("cpu")).open(result_of(read_run(str(folder)), folder)).pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


def test_turbo_trains_on_three_of_its_four_timesteps(turbo_path, pairs, tmp_path):
    flags = flags_for(turbo_path, pairs, tmp_path / "run", "--is_turbo", "--train_batch_size", 12)
    run = opened(flags)
    seen = {int(t) for _ in range(2) for t in next(run.batches).timesteps}
    assert seen == {249, 499, 749}


def test_timesteps_outside_the_limits_are_not_trained_at(sdxl_path, pairs, tmp_path):
    limits = ["--min_timestep", 300, "--max_timestep", 303, "--train_batch_size", 12]
    run = opened(flags_for(sdxl_path, pairs, tmp_path / "run", *limits))
    seen = [int(t) for _ in range(4) for t in next(run.batches).timesteps]
    assert set(seen) == {300, 301, 302}


# ---- the method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_first_margin_is_exactly_zero(sdxl_path, pairs, tmp_path, tuning, precision):
    folder = train(
        sdxl_path,
        pairs,
        tmp_path / "run",
        *(
            "--tuning",
            tuning,
            "--mixed_precision",
            precision,
            "--max_train_steps",
            1,
            "--gradient_accumulation_steps",
            3,
            "--beta_dpo",
            100,  # so that fp16 does not skip the only update
        ),
    )
    (line,) = lines(folder)
    assert line["margin"] == 0.0 and line["margin_rms"] == 0.0
    assert line["loss"] == torch.tensor(2.0).log().item()
    assert line["implicit_accuracy"] == 0.5
    assert line["chosen_error_delta"] == line["rejected_error_delta"] == 0.0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_images_are_channels_last_from_noise_to_prediction(sdxl_path, pairs, tmp_path, tuning):
    """Weights, masters, gradients, inputs and outputs of the UNet; files have the usual order."""
    more = ["--tuning", tuning, "--lora_targets", "to_q", "conv1", "--mixed_precision", "bf16"]
    trainer = Trainer(opened(flags_for(sdxl_path, pairs, tmp_path / "run", *more)), [])

    def dense_last(tensors) -> list[bool]:
        return [t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.dim() == 4]

    seen = []
    denoise = trainer.family.denoise

    def look(unet, noisy, *rest):
        seen.extend((noisy, prediction := denoise(unet, noisy, *rest)))
        return prediction

    trainer.family.denoise = look
    trainer.train_step()
    trainer.masters.step = lambda *_: seen.extend(trainer.masters.gradients())
    trainer.train_step()
    weights_of = [trainer.unet, *([trainer.reference.unet] if tuning == "full" else [])]
    for tensors in (*(w.parameters() for w in weights_of), trainer.masters.masters, seen):
        found = dense_last(tensors)
        assert found and all(found)
    assert len(dense_last(seen)) > 8  # noise and prediction of policy and reference, twice, and gradients


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_loss_and_gradients_equal_a_plain_float64_computation(sdxl_path, pairs, tmp_path, tuning):
    """The second step of a run, when the policy has left the reference, against the formulas written out in fp64."""
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--tuning", tuning, "--learning_rate", 1e-4)
    trainer = Trainer(opened([*flags, "--max_grad_norm", "0"]), flags)
    trainer.clock.restart(0)
    trainer.train_step()

    batch = next(trainer.run.batches)
    found = {}
    trainer.run.batches = iter([batch])
    step = trainer.masters.step

    def look(number, loss, world_size):
        found["loss"] = loss.item()
        found["gradients"] = [g.clone() for g in trainer.masters.gradients()]
        return step(number, loss, world_size)

    trainer.masters.step = look
    expected_loss, expected = plain_step(trainer, batch, tuning)
    trainer.train_step()
    assert abs(expected_loss - math.log(2)) > 1e-3  # the margin is not 0 any more
    assert found["loss"] == pytest.approx(expected_loss, rel=1e-3)  # beta/2 times the rounding of an fp32 UNet
    for name, got, want in zip(trainer.masters.names, found["gradients"], expected, strict=True):
        assert (got.double() - want).norm() <= 2e-3 * want.norm() + 1e-9, name


def plain_step(trainer: Trainer, batch, tuning: str) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one micro-batch in float64, pair by pair, as the paper writes them."""
    config, family = trainer.config, trainer.family
    latents, conditioning = trainer.encode(batch)
    unet = trainer.unet.double()
    schedule = family.pipeline.scheduler.alphas_cumprod.double()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    references = {"lora": None, "full": getattr(trainer.reference, "unet", None)}
    if tuning == "full":
        references["full"].double()
    loss, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
    for i, pair in enumerate(batch.pair_id.tolist()):
        noise = kernels.normal_noise(config.seed, torch.tensor([pair]), batch.draw[i : i + 1], *latents.shape[1:])
        noise = noise.double()
        t = batch.timesteps[i : i + 1]
        given = dict(
            encoder_hidden_states=conditioning["prompt_embeds"][i : i + 1].double(),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"][i : i + 1].double(),
                "time_ids": conditioning["time_ids"][i : i + 1].double(),
            },
        )

        def error(model, x0, noise=noise, t=t, given=given):
            noisy = schedule[t].sqrt() * x0.double() + (1 - schedule[t]).sqrt() * noise
            return (model(noisy, t, **given).sample - noise).square().mean()

        def ref_error(x0, error=error):
            with torch.no_grad():
                if tuning == "full":
                    return error(references["full"], x0)
                with AdapterSwitch(unet).off():
                    return error(unet, x0)

        chosen, rejected = latents[i : i + 1], latents[len(batch.pair_id) + i :][:1]
        ref_w, ref_l = ref_error(chosen), ref_error(rejected)
        difference = (error(unet, chosen) - ref_w) - (error(unet, rejected) - ref_l)
        of_pair = -torch.nn.functional.logsigmoid(-(config.beta_dpo / 2) * difference) / len(batch.pair_id)
        loss += of_pair.item()
        for total, part in zip(gradients, torch.autograd.grad(of_pair, parameters), strict=True):
            total += part
    unet.float()
    if tuning == "full":
        references["full"].float()
    return loss, gradients


# ---- around the steps ------------------------------------------------------------------------------------------


def test_validation_measures_held_out_pairs_and_shows_before_over_after(sdxl_path, tmp_path):
    captions = [f"scene {i // 3}" for i in range(24)]
    data = write_pickapic(tmp_path / "pairs.parquet", n=24, captions=captions)
    out = train(
        sdxl_path,
        data,
        tmp_path / "run",
        *("--run_validation", "--validation_steps", 2, "--validation_fraction", 0.3, "--learning_rate", 1e-3),
        *("--report_to", "tensorboard"),
    )
    rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 <= row["validation_accuracy"] <= 1 for row in rows)
    assert json.loads((out / "summary.json").read_text())["validation_accuracy"] == rows[-1]["validation_accuracy"]
    held_out = opened([*flags_for(sdxl_path, data, tmp_path / "b"), "--run_validation", "--validation_fraction", "0.3"])
    trained = set(held_out.sets.train.captions)
    assert held_out.sets.validation.captions and trained.isdisjoint(held_out.sets.validation.captions)
    assert set(held_out.prompts) <= set(held_out.sets.validation.captions)
    sheet = Image.open(out / "samples" / "step-4.png")
    base = Image.open(out / "samples" / "base-0.png")
    assert base.size == (64, 64) and sheet.width > 160 and sheet.height > 320
    assert list((out / "logs").rglob("events.out.tfevents*"))


def test_validation_of_an_untrained_policy_is_undecided(sdxl_path, pairs, tmp_path):
    run = opened([*flags_for(sdxl_path, pairs, tmp_path / "run"), "--run_validation", "--validation_fraction", "0.5"])
    assert Trainer(run, [])._held_out_accuracy() == 0.5


def test_ema_is_what_is_exported(sdxl_path, pairs, tmp_path):
    out = train(sdxl_path, pairs, tmp_path / "run", "--use_ema", "--ema_decay", 0.5, "--learning_rate", 1e-3)
    exported = load_file(out / "pytorch_lora_weights.safetensors")
    averaged = load_file(out / f"checkpoint-{STEPS}" / "ema.safetensors")
    masters = weights(out)
    name = next(name for name in averaged if "lora_B" in name)
    (match,) = [v for k, v in exported.items() if k.endswith(name.replace(".default.", "."))]
    assert torch.equal(match, averaged[name]) and not torch.equal(match, masters[name])


def test_init_lora_becomes_the_reference(sdxl_path, pairs, tmp_path):
    first = train(sdxl_path, pairs, tmp_path / "first", "--learning_rate", 1e-2)
    second = train(sdxl_path, pairs, tmp_path / "second", "--init_lora", first, "--max_train_steps", 1)
    assert lines(second)[0]["margin"] == 0.0
    base, merged = (
        opened(flags_for(sdxl_path, pairs, tmp_path / name, *more)).fingerprints["base weights"]
        for name, more in (("a", []), ("b", ["--init_lora", first]))
    )
    assert base != merged


def test_soft_labels_keep_ties(sdxl_path, tmp_path):
    data = write_pickapic(tmp_path / "pairs.parquet", n=4, labels=[0.5, 0.7, 0.2, 1.0])
    run = opened([*flags_for(sdxl_path, data, tmp_path / "run"), "--soft_labels"])
    assert len(run.sets.train) == 4 and run.sets.ties_dropped == 0
    seen = {}
    for batch in (next(run.batches), next(run.batches)):
        seen |= dict(zip(batch.pair_id.tolist(), batch.label.tolist(), strict=True))
    assert {pair: round(label, 4) for pair, label in seen.items()} == {0: 0.5, 1: 0.7, 2: 0.8, 3: 1.0}


def test_a_late_bad_image_has_no_weight_and_is_reported(sdxl_path, pairs, tmp_path, monkeypatch):
    """An image that decoded at the start check and does not later: no crash, no gradient, a line in the report."""
    from dpo_fast.data import PairDataset
    from dpo_fast.data.images import BadImage

    read = PairDataset._encoded

    def spoilt(self, position):
        pair = read(self, position)
        if int(self.index.pair_id[position]) == 5:
            bad = BadImage("cannot be decoded")
            return pair._replace(images=(bad, bad))
        return pair

    monkeypatch.setattr(PairDataset, "_encoded", spoilt)
    more = ["--train_batch_size", 12, "--max_train_steps", 2, "--max_bad_fraction"]
    out = train(sdxl_path, pairs, tmp_path / "run", *more, 0.2)
    assert json.loads((out / "summary.json").read_text())["bad_rows"] == 1
    assert [json.loads(line)["row"] for line in (out / "bad_rows.jsonl").read_text().splitlines()] == [5]
    assert lines(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the mean is over the eleven others
    assert main(flags_for(sdxl_path, pairs, tmp_path / "strict", *more, 0.01)) == 2


def test_the_model_card_tells_how_it_was_made(sdxl_path, pairs, tmp_path):
    out = train(sdxl_path, pairs, tmp_path / "run", "--hub_token", "secret", "--max_train_steps", 1)
    card = (out / "README.md").read_text()
    assert f"--pretrained_model_name_or_path {sdxl_path.name} " in card and f"torch {torch.__version__}" in card
    assert "rows 12, ties dropped 0" in card
    for name in ("README.md", "summary.json", "metrics.jsonl"):
        text = (out / name).read_text()
        assert str(tmp_path) not in text and str(sdxl_path.parent) not in text and str(pairs.parent) not in text, name
    assert not any("secret" in path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".yaml", ".json"))


def test_what_a_stream_leaves_out_is_reported(sdxl_path, tmp_path):
    data = write_pickapic(tmp_path / "pairs.parquet", n=6, captions=["a", "", "c", "d", "e", "f"])
    out = train(sdxl_path, data, tmp_path / "run", "--streaming", "--max_bad_fraction", 0.5)
    assert json.loads((out / "summary.json").read_text())["bad_rows"] == 1
    (row,) = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert (row["row"], row["column"]) == (1, "caption")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("more", [["--gradient_checkpointing"], ["--compile", "regional"]])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_step_on_a_gpu_starts_at_zero_and_waits_for_nothing(sdxl_path, pairs, tmp_path, tuning, more):
    more = ["--tuning", tuning, "--mixed_precision", "fp16", "--dataloader_num_workers", 2, *more]
    trainer = Trainer(opened(flags_for(sdxl_path, pairs, tmp_path / "run", *more)), [])
    trainer.train_step()
    assert trainer.sums.read(trainer.ranks.sum_)["margin_rms"] == 0.0
    batch = next(trainer.run.batches).to(trainer.ranks.device)
    encoded = trainer.encode(batch)  # the tokens of captions are the one thing a step waits for
    trainer.encode = lambda _: encoded
    trainer.run.batches = iter([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.masters.skipped.item() == 0
