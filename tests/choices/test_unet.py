"""The proof of how a UNet runs: right variants pass, and each planted fault is found."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.drawn(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_what_is_right_is_proven(request, name, tuning, dtype):
    given = arguments(request.getfixturevalue(f"{name}_path"), tuning=tuning) | {"dtype": dtype}
    for candidate in (PLAIN, CONTIGUOUS):
        unet.prove(candidate, given)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("changes", [{"pairs": 1}, {"reference": "cached"}, {"recompute": "full"}], ids=str)
def test_other_runs_are_proven_too(sdxl_path, changes):
    unet.prove(CONTIGUOUS, arguments(sdxl_path) | changes)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_compiled_is_proven(sdxl_path):
    """Transformer blocks are; resnets too may be refused: on some CPUs their two programs round differently."""
    candidate = str(Variant(compile="regional"))
    given = arguments(sdxl_path)
    compiled = unet.prove(candidate, given)
    found = unet.times([PLAIN, candidate], given)
    assert compiled > 10 * statistics.median(found[candidate].rounds)


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


@pytest.mark.drawn(3)
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


def test_on_a_gpu_float32_is_compared_with_itself_and_tf32_with_float32(sdxl_path):
    """float64 is up to 64 times as slow there."""
    bench = unet._Bench(arguments(sdxl_path))
    assert bench.truth_is_wider and bench.truth_dtype == torch.float64
    for dtype, tf32, wider in (("float32", False, False), ("float32", True, True), ("float16", False, True)):
        given = arguments(sdxl_path, tf32=tf32) | {"dtype": dtype, "device": "cuda:0"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unet, "_inputs", lambda given, device: SimpleNamespace(noisy=torch.zeros(2, 4, 8, 8)))
            patch.setattr(unet, "_normal", lambda shape, seed, device: torch.zeros(shape))
            bench = unet._Bench(given)
        assert (bench.truth_is_wider, bench.truth_dtype) == (wider, torch.float32)


def test_one_wrong_tile_is_not_lost_in_the_mean():
    """Of 4096 pixels 16 are off by as much as bf16 rounds all of them."""
    truth = torch.randn(2, 4, 64, 64, dtype=torch.float64)
    rounded = truth + 2**-8 * torch.randn(truth.shape)
    wrong = rounded.clone()
    wrong[0, :, 8:12, 8:12] += 0.1
    gradient = {"the gradient of a": torch.ones(3)}
    plain, found = (
        unet._errors({unet.PREDICTION: x} | gradient, {unet.PREDICTION: truth} | gradient) for x in (rounded, wrong)
    )
    assert found[unet.PREDICTION] < unet.FACTOR * plain[unet.PREDICTION]
    assert found[unet.PIXEL] > unet.FACTOR_OF_ONE * plain[unet.PIXEL]


def test_what_only_a_proof_needs_is_freed_before_times_are_taken(sdxl_path):
    given = arguments(sdxl_path)
    for candidate in (PLAIN, CONTIGUOUS):
        unet.prove(candidate, given)
    bench = unet._bench(json.dumps(given))
    assert len(bench.made) == len(bench.referred) == 2 and "expected" in vars(bench)
    unet.times([PLAIN], given)
    assert len(bench.made) == len(bench.referred) == 1 and not {"expected", "plain_errors"} & vars(bench).keys()


def test_times_are_of_a_training_pass(sdxl_path):
    given = arguments(sdxl_path)
    found = unet.times([PLAIN, CONTIGUOUS], given)
    assert list(found) == [PLAIN, CONTIGUOUS]
    assert all(min(times.rounds) > 0 and times.first > 0 for times in found.values())
    assert not any(parameter.grad is not None for parameter in unet._bench(json.dumps(given)).plain.parameters())


def test_the_thin_unet_has_the_widths_of_the_whole_one():
    thin = unet.thin(SDXL)
    assert thin["transformer_layers_per_block"] == [1, 1, 1]
    assert {name for name in SDXL if thin[name] != SDXL[name]} == {"transformer_layers_per_block"}
    share = unet.share_of_run(Workload("cpu", "bfloat16", 4, 16, SDXL, 77).for_unet())
    assert 0.05 < share < 0.6
