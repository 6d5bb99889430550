"""A checkpoint's weights on their base at any strength: exact at both ends, refused where they do not belong."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from dpo_fast.checksums import write_signed_json
from dpo_fast.errors import BadInput
from dpo_fast.models.load import revisions
from dpo_fast.models.lora import WEIGHT_NAME
from dpo_fast.models.opened import OneAtATime, files_stamp
from dpo_fast.models.source import ModelSource
from dpo_fast.models.trained import Blend, read_trained
from tests.helpers.runs import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_of(sdxl_path, pairs, tmp_path_factory):
    """Make a run of two checkpoints, by its flags; each kind once."""
    made = {}

    def make(*flags: str):
        if flags not in made:
            folder = tmp_path_factory.mktemp("trained") / "run"
            made[flags] = train(sdxl_path, pairs, folder, *flags, "--learning_rate", 1e-2, "--checkpointing_steps", 2)
        return made[flags]

    return make


def points(folder, sdxl_path, strengths=(0.0, 0.5, 1.0)) -> dict[float, dict[str, torch.Tensor]]:
    """The UNet's prediction-relevant state at strengths of the last checkpoint, opened one after another."""
    models, last = OneAtATime(CPU), sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))[-1]
    found = {}
    for strength in strengths:
        family = models.open(ModelSource(str(sdxl_path), trained=str(last), strength=strength))
        found[strength] = {name: value.clone() for name, value in family.unet.named_parameters()}
    return found


KINDS = [("--tuning", "full"), ("--tuning", "lora", "--rank", "4", "--lora_alpha", "2"), ("--use_ema",)]


@pytest.mark.parametrize("flags", KINDS, ids=" ".join)
def test_strength_one_is_the_result_and_zero_the_base(run_of, sdxl_path, flags):
    folder = run_of(*flags)
    lora = (folder / WEIGHT_NAME).is_file()
    pipeline = DiffusionPipeline.from_pretrained(sdxl_path if lora else folder)
    base = DiffusionPipeline.from_pretrained(sdxl_path).unet
    if lora:
        pipeline.load_lora_weights(folder)
    models, x = OneAtATime(CPU), torch.randn(1, 4, 8, 8)
    text = torch.randn(1, 7, base.config.cross_attention_dim)
    width = base.config.projection_class_embeddings_input_dim - 6 * base.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, width), "time_ids": torch.ones(1, 6)}
    last = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))

    def predicted(unet) -> torch.Tensor:
        with torch.no_grad():
            return unet(x, 500, text, added_cond_kwargs=added).sample

    plain = predicted(OneAtATime(CPU).open(ModelSource(str(sdxl_path))).unet)
    for strength, of in ((0.0, base), (1.0, pipeline.unet), (0.0, base)):
        unet = models.open(ModelSource(str(sdxl_path), trained=str(last), strength=strength)).unet
        torch.testing.assert_close(predicted(unet), predicted(of), rtol=1e-4, atol=1e-5)
        assert strength or torch.equal(predicted(unet), plain)  # to the bit, where the memory order is the same
    assert (predicted(base) - predicted(pipeline.unet)).abs().max() > 0.01


@pytest.mark.parametrize("flags", KINDS[:2], ids=" ".join)
def test_weights_lie_on_the_line(run_of, sdxl_path, flags):
    folder = run_of(*flags)
    at = points(folder, sdxl_path, (0.0, 0.5, 1.0, 2.0))
    for name, value in at[1.0].items():
        change = value - at[0.0][name]
        if ".lora_A." in name:
            assert all(torch.equal(value, of[name]) for of in at.values())
            continue
        torch.testing.assert_close(at[0.5][name], at[0.0][name] + change / 2, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(at[2.0][name], at[0.0][name] + 2 * change, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(at[0.0][name], value) for name, value in at[1.0].items())


def test_the_average_is_what_a_run_with_one_exports(run_of):
    folder = run_of("--use_ema")
    last = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
    trained = read_trained(last)
    from safetensors.torch import load_file

    assert all(torch.equal(value, load_file(last / "ema.safetensors")[name]) for name, value in trained.weights.items())


def test_a_damaged_checkpoint_is_refused(run_of, tmp_path):
    import shutil

    folder = run_of("--tuning", "full")
    last = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
    copy = tmp_path / "checkpoint-9"
    for damage, said in (
        (lambda: (copy / "weights.safetensors").write_bytes(b"x"), "damaged: its checksum"),
        (lambda: (copy / "weights.safetensors").unlink(), "weights.safetensors"),
        (lambda: (copy / "state.json").write_text("{}"), "cannot be used"),
        (lambda: (copy / "state.json").unlink(), "state.json"),
        (lambda: write_signed_json(copy / "state.json", {"step": 1}), "cannot be used"),
    ):
        shutil.copytree(last, copy, dirs_exist_ok=True)
        damage()
        with pytest.raises(BadInput, match=said):
            read_trained(copy)


def test_a_checkpoint_of_another_model_is_refused(run_of, sd15_path):
    folder = run_of("--tuning", "full")
    last = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
    with pytest.raises(BadInput, match="is of another UNet"):
        OneAtATime(CPU).open(ModelSource(str(sd15_path), trained=str(last)))


def test_another_checkpoint_of_the_run_needs_no_reload(run_of, sdxl_path, monkeypatch):
    folder = run_of("--tuning", "full")
    models, loads = OneAtATime(CPU), []
    load = models._load
    monkeypatch.setattr(models, "_load", lambda source: loads.append(source) or load(source))
    families = [
        models.open(ModelSource(str(sdxl_path), trained=str(one), strength=strength))
        for one in folder.glob("checkpoint-*")
        for strength in (0.5, 1.0)
    ]
    assert len(loads) == 1 and all(family is families[0] for family in families)
    models.open(ModelSource(str(sdxl_path)))
    assert len(loads) == 2  # the base itself is loaded anew


def test_runs_with_other_adapters_on_one_base_are_told_apart(run_of, sdxl_path):
    """The first and the second differ in alpha alone, the third in rank."""
    models = OneAtATime(CPU)
    kinds = [("--tuning", "lora", "--rank", "4", "--lora_alpha", alpha) for alpha in ("2", "8")]
    for flags in (*kinds, ("--tuning", "lora", "--rank", "2"), kinds[0]):
        last = max(run_of(*flags).glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
        source = ModelSource(str(sdxl_path), trained=str(last))
        found, alone = (one.open(source).unet for one in (models, OneAtATime(CPU)))
        scales = [{m.scaling["default"] for m in unet.modules() if hasattr(m, "scaling")} for unet in (found, alone)]
        assert scales[0] == scales[1]
        expected = dict(alone.named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in found.named_parameters())


def test_what_was_used_is_the_file_with_the_weights(run_of, sdxl_path):
    for flags, name in ((("--use_ema",), "ema.safetensors"), (("--tuning", "full"), "weights.safetensors")):
        last = max(run_of(*flags).glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
        assert name in revisions(ModelSource(str(sdxl_path), trained=str(last)))


def test_a_stamp_tells_checkpoints_apart(run_of, sdxl_path):
    folder = run_of("--tuning", "full")
    stamps = {files_stamp(ModelSource(str(sdxl_path), trained=str(one))) for one in [*folder.glob("checkpoint-*")]} | {
        files_stamp(ModelSource(str(sdxl_path)))
    }
    assert len(stamps) == 1 + len([*folder.glob("checkpoint-*")])


def test_a_point_says_what_it_is(tmp_path):
    source = ModelSource("owner/model", trained=str(tmp_path / "checkpoint-80"), strength=0.25)
    assert str(source) == f"owner/model + 0.25 of {tmp_path / 'checkpoint-80'}"
    assert str(tmp_path) not in source.shown() and "0.25" in source.shown()
    assert json.dumps(str(ModelSource("a", merged="b"))) == '"a + LoRA b"'


def test_blending_keeps_no_copy_of_a_loras_base(run_of, sdxl_path):
    folder = run_of("--tuning", "lora", "--rank", "4", "--lora_alpha", "2")
    last = max(folder.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
    family = OneAtATime(CPU).open(ModelSource(str(sdxl_path)))
    assert Blend(family, read_trained(last)).base == {}
