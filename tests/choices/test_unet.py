"""The proof of how a UNet runs: right variants pass, and each planted fault is found."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from dpo_fast.choices import unet
from dpo_fast.choices.child import Disproved, Unusable
from dpo_fast.choices.unet import Variant
from dpo_fast.choices.workload import SDXL, Workload
from dpo_fast.models.attention import set_attention

PLAIN, CONTIGUOUS = str(Variant()), str(Variant(memory_order="contiguous"))


@pytest.fixture(autouse=True)
def no_bench():
    yield
    unet._bench.cache_clear()


def arguments(path: Path, **changes: object) -> dict:
    config = json.loads((path / "unet" / "config.json").read_text())
    return Workload("cpu", "float32", 2, 8, config, 7, **changes).for_unet() | changes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_what_is_right_is_proven(request, name, tuning, dtype):
    given = arguments(request.getfixturevalue(f"{name}_path"), tuning=tuning) | {"dtype": dtype}
    for candidate in (PLAIN, CONTIGUOUS):
        unet.prove(candidate, given)


@pytest.mark.parametrize("changes", [{"pairs": 1}, {"reference": "cached"}, {"recompute": "full"}], ids=str)
def test_other_runs_are_proven_too(sdxl_path, changes):
    unet.prove(CONTIGUOUS, arguments(sdxl_path) | changes)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_compiled_is_proven(sdxl_path):
    """Transformer blocks are; resnets too may be refused: on some CPUs their two programs round differently."""
    candidate = str(Variant(compile="regional"))
    given = arguments(sdxl_path)
    unet.prove(candidate, given)
    found = unet.times([PLAIN, candidate], given)
    assert found[candidate].first > 10 * statistics.median(found[candidate].rounds)  # it was compiled in the proof


class Faulty(AttnProcessor2_0):
    """Attention that is wrong in one way."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __call__(self, *args, **kwargs) -> Tensor:
        return self.change(super().__call__(*args, **kwargs))


FAULTS = {
    "policy and reference differ before the first update": lambda x: x * (1 + 1e-3 * torch.is_grad_enabled()),
    "the prediction is not finite": lambda x: x / 0,
    "prediction: relative error": lambda x: x.bfloat16().float(),
    "gradients?.*: relative error": lambda x: x * 1.01 - 0.01 * x.detach(),
    "was not computed": lambda x: x.detach(),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_planted_fault_is_found(sdxl_path, monkeypatch, said):
    def planted(module: nn.Module, attention: str) -> None:
        set_attention(module, "sdpa")
        if attention == "flash":
            module.set_attn_processor(Faulty(FAULTS[said]))

    monkeypatch.setattr(unet, "set_attention", planted)
    given = arguments(sdxl_path, tuning="full")
    unet.prove(CONTIGUOUS, given)
    with pytest.raises(Disproved, match=said):
        unet.prove(str(Variant("flash")), given)
    unet.prove(CONTIGUOUS, given)  # nothing of the fault stays


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_needs_a_gpu_cannot_be_used(sdxl_path):
    with pytest.raises(Unusable, match="needs a CUDA device"):
        unet.prove(str(Variant("flash")), arguments(sdxl_path))
    with pytest.raises((RuntimeError, AssertionError, AttributeError)):  # the last one in a build without CUDA
        unet.start(arguments(sdxl_path) | {"device": "cuda:0"})


def test_times_are_of_a_training_pass(sdxl_path):
    given = arguments(sdxl_path)
    found = unet.times([PLAIN, CONTIGUOUS], given)
    assert list(found) == [PLAIN, CONTIGUOUS]
    assert all(min(times.rounds) > 0 and times.first > 0 for times in found.values())
    assert not any(parameter.grad is not None for parameter in unet._bench(json.dumps(given)).plain.parameters())


def test_the_thin_unet_has_the_widths_of_the_whole_one():
    thin = unet.thin(SDXL)
    assert thin["transformer_layers_per_block"] == [1, 1, 1] and thin["layers_per_block"] == 1
    assert {name for name in SDXL if thin[name] != SDXL[name]} == {"transformer_layers_per_block"}
    share = unet.share_of_run(Workload("cpu", "bfloat16", 4, 16, SDXL, 77).for_unet())
    assert 0.05 < share < 0.5
