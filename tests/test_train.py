"""Whole runs through the command line's `main`, on tiny pipelines of the real classes."""

import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from dpo_fast.kernels import reference as kernels
from dpo_fast.trainer import Trainer
from tests.helpers.runs import SAMPLE, STEPS, flags_for, lines, opened, train, weights

def picture(pipeline, seed: int = 3) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(seed), height=64, width=64, output_type="pt"
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
    pipeline.load_lora_weights(folder)
    after = picture(pipeline)
    assert (after - before).abs().max() > 1e-3
    # what was loaded is what was trained: master weights, at alpha / rank
    trained = weights(folder)
    scale = 7 / 4
    name = next(n for n in trained if n.endswith("to_q.lora_A.default.weight"))
    module = pipeline.unet.get_submodule(name.removesuffix(".lora_A.default.weight"))
    (adapter,) = module.lora_A
    assert torch.equal(module.lora_A[adapter].weight, trained[name])
    assert module.scaling[adapter] == pytest.approx(scale)


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


def test_turbo_trains_on_three_of_its_four_timesteps(turbo_path, pairs, tmp_path):
    flags = flags_for(turbo_path, pairs, tmp_path / "run", "--is_turbo", "--train_batch_size", 12)
    run = opened(flags)
    seen = {int(t) for _ in range(2) for t in next(run.batches).timesteps}
    assert seen == {249, 499, 749}


# ---- the method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_first_margin_is_exactly_zero(sdxl_path, pairs, tmp_path, tuning, precision):
    folder = train(
        sdxl_path,
        pairs,
        tmp_path / "run",
        *("--tuning", tuning, "--mixed_precision", precision, "--max_train_steps", 1, "--gradient_accumulation_steps", 3),
    )
    (line,) = lines(folder)
    assert line["margin"] == 0.0 and line["margin_rms"] == 0.0
    assert line["loss"] == torch.tensor(2.0).log().item()
    assert line["implicit_accuracy"] == 0.5
    assert line["chosen_error_delta"] == line["rejected_error_delta"] == 0.0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_loss_and_gradients_equal_a_plain_float64_computation(sdxl_path, pairs, tmp_path, tuning):
    """The second step of a run, when the policy has left the reference, against the formulas written out in fp64."""
    flags = flags_for(sdxl_path, pairs, tmp_path / "run", "--tuning", tuning, "--learning_rate", 1e-4)
    trainer = Trainer(opened([*flags, "--max_grad_norm", "0"]), flags)
    trainer.clock.restart(0)
    trainer.train_step()

    batch = next(trainer.run_.batches)
    found = {}
    trainer.run_.batches = iter([batch])
    step = trainer.masters.step

    def look(number, loss, world_size):
        found["loss"] = loss.item()
        found["gradients"] = [g.clone() for g in trainer.masters.gradients()]
        return step(number, loss, world_size)

    trainer.masters.step = look
    expected_loss, expected = plain_step(trainer, batch, tuning)
    trainer.train_step()
    assert abs(expected_loss - math.log(2)) > 1e-3  # the margin is not 0 any more
    assert found["loss"] == pytest.approx(expected_loss, rel=2e-4)
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
    losses = []
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
                from dpo_fast.models import adapter_off

                with adapter_off(unet):
                    return error(unet, x0)

        chosen, rejected = latents[i : i + 1], latents[len(batch.pair_id) + i :][:1]
        difference = (error(unet, chosen) - ref_error(chosen)) - (error(unet, rejected) - ref_error(rejected))
        losses.append(-torch.nn.functional.logsigmoid(-(config.beta_dpo / 2) * difference))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, parameters)
    unet.float()
    if tuning == "full":
        references["full"].float()
    return loss.item(), list(gradients)
