"""Merging: every format whole, compared with the file's tensors by hand, or one line with what is left over."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from dpo_fast.errors import BadInput
from dpo_fast.models import Family, merge_lora, merging
from tests.helpers.pipelines import load_model
from tests.helpers.single_file import kohya_name

RANK = 4


def make_family(path: Path, dtype: torch.dtype = torch.float32) -> Family:
    return load_model(path, dtype=dtype, device="cpu")


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Some layers of every kind that a LoRA changes."""
    ends = ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj", "conv_shortcut")
    return {name: part for name, part in unet.named_modules() if name.endswith(ends)}


def pair(layer: nn.Module, generator: torch.Generator, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B for a layer."""
    rows, *columns = layer.weight.shape
    a = torch.randn(rank, *columns, generator=generator) / layer.weight[0].numel() ** 0.5
    return a, torch.randn(rows, rank, *[1] * (layer.weight.ndim - 2), generator=generator) / 4


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A in float64, of the weight's shape."""
    return (b.flatten(1).double() @ a.flatten(1).double()).view(len(b), *a.shape[1:])


def peft_names(pairs: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """layer -> (A, B) under diffusers' own names."""
    return {
        f"unet.{name}.lora_{part}.weight": tensor.clone()
        for name, both in pairs.items()
        for part, tensor in zip("AB", both, strict=True)
    }


def peft_file(unet: nn.Module, path: Path, metadata: dict | None = None) -> dict[str, tuple]:
    """Write a LoRA with diffusers' own names; return layer -> (A, B)."""
    generator = torch.Generator().manual_seed(1)
    pairs = {name: pair(layer, generator) for name, layer in layers_of(unet).items()}
    state = {
        f"unet.{name}.lora_{part}.weight": t for name, both in pairs.items() for part, t in zip("AB", both, strict=True)
    }
    save_file(state, path, {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}))
    return pairs


def check(unet: nn.Module, before: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> None:
    """The UNet is what it was `before`, plus the float64 deltas, rounded to fp32."""
    for name, weight in unet.state_dict().items():
        delta = deltas.get(name.removesuffix(".weight"))
        if delta is None or not name.endswith(".weight"):
            assert torch.equal(weight, before[name]), name
        else:
            torch.testing.assert_close(weight.double(), before[name].double() + delta, rtol=1e-6, atol=1e-6)
            assert not torch.equal(weight, before[name])


def snapshot(family: Family) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in family.unet.state_dict().items()}


# whole


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("naming", ["peft", "lora.down", "processor", "kohya"])
def test_every_naming_is_merged_whole(request, tmp_path, name, naming):
    """kohya's: an alpha for one kind of layer, another for the next, none for the third."""
    family, path = make_family(request.getfixturevalue(f"{name}_path")), tmp_path / "lora.safetensors"
    generator, state, deltas, before = torch.Generator().manual_seed(1), {}, {}, snapshot(family)
    for number, (layer, module) in enumerate(layers_of(family.unet).items()):
        if naming == "processor" and "to_q" not in layer and "to_out" not in layer:
            continue
        a, b = pair(module, generator, rank=2 + number % 3)
        scale = 1.0
        if naming == "peft":
            state |= {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}
        elif naming == "lora.down":
            state |= {f"unet.{layer}.lora.down.weight": a, f"unet.{layer}.lora.up.weight": b}
        elif naming == "processor":
            old = layer.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
            old = old.removesuffix(".0")
            state |= {f"unet.{old}_lora.down.weight": a, f"unet.{old}_lora.up.weight": b}
        else:
            stem, alpha = kohya_name(family.pipeline, layer), [1.0, None, 8.0][number % 3]
            state |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
            if alpha is not None:
                state[f"{stem}.alpha"] = torch.tensor(alpha)
                scale = alpha / len(a)
        deltas[layer] = scale * product(a, b)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    merge_lora(family.pipeline, path)
    check(family.unet, before, deltas)


def test_the_alpha_of_the_metadata(sd15_path, tmp_path):
    family, path = make_family(sd15_path), tmp_path / "lora.safetensors"
    metadata = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 1.0}}
    pairs, before = peft_file(family.unet, path, metadata), snapshot(family)
    merge_lora(family.pipeline, path)
    scale = {name: (1.0 if name.endswith("to_q") else 6.0) / RANK for name in pairs}
    check(family.unet, before, {name: scale[name] * product(*both) for name, both in pairs.items()})


def test_rank_stabilised(sd15_path, tmp_path):
    family, path = make_family(sd15_path), tmp_path / "lora.safetensors"
    metadata = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.use_rslora": True}
    pairs, before = peft_file(family.unet, path, metadata), snapshot(family)
    merge_lora(family.pipeline, path)
    check(family.unet, before, {name: 6 / RANK**0.5 * product(*both) for name, both in pairs.items()})


def test_the_sum_is_that_of_diffusers(sd15_path, tmp_path):
    ours, theirs, path = make_family(sd15_path), make_family(sd15_path), tmp_path / "lora.safetensors"
    pairs = peft_file(ours.unet, path)
    merge_lora(ours.pipeline, path)
    theirs.pipeline.load_lora_weights(path, weight_name=path.name)
    theirs.pipeline.fuse_lora()
    theirs.pipeline.unload_lora_weights()
    merged = theirs.unet.state_dict()
    for name in pairs:
        assert torch.equal(ours.unet.get_submodule(name).weight, merged[f"{name}.weight"]), name


@torch.no_grad()
def test_dora_is_that_of_peft(sd15_path, tmp_path):
    ours, theirs = make_family(sd15_path), make_family(sd15_path)
    targets = sorted(layers_of(theirs.unet))
    theirs.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, use_dora=True))
    generator, state = torch.Generator().manual_seed(1), {}
    for name, parameter in theirs.unet.named_parameters():
        if "lora_" in name:
            spread = parameter.abs().mean() if "magnitude" in name else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2 * spread)
            state["unet." + name.replace(".default", "")] = parameter.detach().clone()
    save_file(state, tmp_path / "dora.safetensors")
    base = snapshot(ours)
    merge_lora(ours.pipeline, tmp_path / "dora.safetensors")
    theirs.unet.fuse_lora()
    for name in targets:
        merged = theirs.unet.get_submodule(name).base_layer.weight
        assert not torch.equal(merged, base[f"{name}.weight"])
        torch.testing.assert_close(ours.unet.get_submodule(name).weight, merged, rtol=1e-5, atol=1e-6)


def test_kohyas_text_encoders(sdxl_path, tmp_path):
    family, generator = make_family(sdxl_path), torch.Generator().manual_seed(1)
    query = next(name for name in layers_of(family.unet) if name.endswith("attn1.to_q"))
    places = {kohya_name(family.pipeline, query): family.unet.get_submodule(query)}
    for number, encoder in (("1", family.pipeline.text_encoder), ("2", family.pipeline.text_encoder_2)):
        for end in ("self_attn.q_proj", "mlp.fc1"):
            name = next(name for name, _ in encoder.named_modules() if name.endswith(f"layers.1.{end}"))
            stem = f"lora_te{number}_text_model_" + name.removeprefix("text_model.").replace(".", "_")
            places[stem] = encoder.get_submodule(name)
    state, wanted = {}, {}
    for stem, layer in places.items():
        a, b = pair(layer, generator)
        state |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
        wanted[stem] = layer.weight.double() + product(a, b) / 2
    save_file(state, tmp_path / "lora.safetensors")
    merge_lora(family.pipeline, tmp_path / "lora.safetensors")
    for stem, layer in places.items():
        torch.testing.assert_close(layer.weight.double(), wanted[stem], rtol=1e-6, atol=1e-6)


# refused


def layer_that_is_not_there(state: dict, stem: str) -> None:
    a, b = state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"]
    other = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    state |= {f"{other}.lora_A.weight": a.clone(), f"{other}.lora_B.weight": b.clone()}


def no_b(state: dict, stem: str) -> None:
    del state[f"{stem}.lora_B.weight"]


def more(suffix: str, *shape: int) -> Callable[[dict, str], None]:
    return lambda state, stem: state.update({f"{stem}.{suffix}": torch.ones(shape)})


def replaced(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, str], None]:
    def change(state: dict, stem: str) -> None:
        state[f"{stem}.lora_{part}.weight"] = make(state[f"{stem}.lora_{part}.weight"])

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (layer_that_is_not_there, r"2 of its \d+ tensors .*down_blocks.7"),
        (no_b, r"1 of its \d+ tensors"),
        (more("dora_scale", 16), r"1 of its .*dora_scale"),
        (more("lora_mid.weight", 4, 4, 3, 3), "lora_mid"),
        (more("lora_B.bias", 16), r"lora_B\.bias"),
        (more("diff", 16, 16), "diff"),
        (more("lora_magnitude_vector", 3), "the magnitude"),
        (replaced("A", lambda a: a[:, :-1].contiguous()), "do not match its weight"),
        (replaced("B", lambda b: b[:-1].contiguous()), "do not match its weight"),
        (replaced("B", lambda b: b.fill_(torch.nan)), "not all finite"),
    ],
)
def test_what_cannot_be_applied_whole_is_refused(sd15_path, tmp_path, change, match):
    family, path = make_family(sd15_path), tmp_path / "lora.safetensors"
    pairs, before = peft_file(family.unet, path), snapshot(family)
    state = {
        f"unet.{name}.lora_{part}.weight": t.clone()
        for name, both in pairs.items()
        for part, t in zip("AB", both, strict=True)
    }
    change(state, "unet." + next(iter(pairs)))
    save_file(state, path)
    with pytest.raises(BadInput, match=match) as caught:
        merge_lora(family.pipeline, path)
    assert "\n" not in str(caught.value) and "lora.safetensors cannot be merged" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.unet.state_dict().items())


@pytest.mark.parametrize(
    "names",
    [
        ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"],
        ["lokr_w1", "lokr_w2", "alpha"],
        ["lora_down.weight", "lora_up.weight", "alpha", "dora_scale"],
        ["lora_down.weight", "lora_up.weight", "alpha", "lora_mid.weight"],
    ],
    ids=["loha", "lokr", "dora", "tucker"],
)
def test_kinds_of_lycoris_are_refused(sdxl_path, tmp_path, names):
    family, path = make_family(sdxl_path), tmp_path / "lora.safetensors"
    layer = next(iter(layers_of(family.unet)))
    stem = kohya_name(family.pipeline, layer)
    a, b = pair(family.unet.get_submodule(layer), torch.Generator().manual_seed(1))
    known = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(1.0)}
    save_file({f"{stem}.{name}": known.get(name, torch.ones(2, 2)) for name in names}, path)
    with pytest.raises(BadInput, match=f"cannot be merged whole: .*{stem}"):
        merge_lora(family.pipeline, path)


def test_kohyas_layer_that_is_not_there(sdxl_path, tmp_path):
    """diffusers drops it without a word."""
    family, path = make_family(sdxl_path), tmp_path / "lora.safetensors"
    layer = next(iter(layers_of(family.unet)))
    a, b = pair(family.unet.get_submodule(layer), torch.Generator().manual_seed(1))
    stems = kohya_name(family.pipeline, layer), "lora_unet_output_blocks_9_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.lora_{way}.weight": t.clone() for stem in stems for way, t in (("down", a), ("up", b))}, path)
    with pytest.raises(BadInput, match=r"2 of its 4 tensors .*output_blocks_9"):
        merge_lora(family.pipeline, path)


def test_the_choice_among_a_hubs_files(monkeypatch, sd15_path, tmp_path):
    family, path = make_family(sd15_path), tmp_path / "style.safetensors"
    peft_file(family.unet, path)

    def download(repo: str, name: str, **hub) -> str:
        if name != "style.safetensors":
            raise EntryNotFoundError("no such file")
        return str(path)

    files = ["README.md", "style.safetensors"]
    monkeypatch.setattr(merging, "hf_hub_download", download)
    monkeypatch.setattr(merging.HfApi, "list_repo_files", lambda self, repo: files)
    before = snapshot(family)
    merge_lora(family.pipeline, "owner/style")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in family.unet.state_dict().items())
    files.append("other.safetensors")
    with pytest.raises(BadInput, match=r"holds 2 \.safetensors files"):
        merge_lora(family.pipeline, "owner/style")


def test_the_pipeline_can_be_saved_afterwards(sd15_path, tmp_path):
    family, path = make_family(sd15_path), tmp_path / "lora.safetensors"
    pairs = peft_file(family.unet, path)
    merge_lora(family.pipeline, path)
    family.pipeline.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved").unet
    assert all(torch.equal(again.get_submodule(n).weight, family.unet.get_submodule(n).weight) for n in pairs)
