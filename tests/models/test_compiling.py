"""Compiled UNets: the results of eager ones, one program for policy and reference, nothing compiled twice."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo_fast.errors import BadInput
from dpo_fast.models import Family, add_lora, compile_unet, compiling, not_compiled, programs_made
from dpo_fast.models.compiling import check_compiler, programs_folder
from tests.helpers.pipelines import default_time_ids, load_model


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def is_compiled(unet: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in unet.modules())


def make_family(path: Path, tuning: str, dtype: torch.dtype = torch.float32) -> Family:
    """A family with something to train, no parameter of it at its start."""
    family = load_model(path, dtype=dtype, unet_dtype=torch.float32, device="cpu")
    if tuning == "full":
        family.unet.requires_grad_(True)
    else:
        add_lora(family.unet, 4, 6.0)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in family.unet.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    family.unet.to(dtype)
    return family


def inputs(family: Family, pairs: int = 2) -> tuple:
    noisy = torch.randn(2 * pairs, 4, 8, 8, generator=torch.Generator().manual_seed(pairs)).to(family.dtype)
    conditioning = family.encode_prompts(["a red fox", "a blue boat", "rain"][:pairs])
    if family.needs_time_ids:
        conditioning["time_ids"] = default_time_ids(64, pairs)
    return noisy.contiguous(memory_format=torch.channels_last), torch.tensor([20, 800, 400][:pairs]), conditioning


def results(family: Family, unet: nn.Module, given: tuple) -> dict[str, torch.Tensor]:
    """The prediction and the gradient of every trained parameter, in float64."""
    noisy, timesteps, conditioning = given
    double = next(unet.parameters()).dtype == torch.float64
    noisy = noisy.double() if double else noisy
    prediction = family.denoise(unet, noisy, timesteps, conditioning)
    weight = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (prediction * weight.to(prediction.dtype)).sum().backward()
    found = {name: p.grad.double() for name, p in unet.named_parameters() if p.requires_grad}
    unet.zero_grad(set_to_none=True)
    return {"prediction": prediction.detach().double(), **found}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    ("name", "tuning", "mode"), [("sd15", "lora", "resnets"), ("sdxl", "full", "resnets"), ("sdxl", "lora", "regional")]
)
def test_results_are_those_of_the_eager_unet(request, name, tuning, mode):
    """Forward and every gradient: against float64, at most a few times the error of the eager UNet."""
    family = make_family(request.getfixturevalue(f"{name}_path"), tuning)
    given = inputs(family)
    eager = results(family, family.unet, given)
    truth = results(family, copy.deepcopy(family.unet).double(), given)
    compile_unet(family.unet, mode)
    assert is_compiled(family.unet)
    before = programs_made()
    compiled = results(family, family.unet, given)
    assert programs_made() > before
    assert eager.keys() == compiled.keys()
    for key, expected in truth.items():
        scale = expected.norm() + 1e-12
        error, allowed = (compiled[key] - expected).norm() / scale, (eager[key] - expected).norm() / scale
        assert error <= 4 * allowed + 1e-6, (key, error, allowed)


@pytest.mark.exhaustive
def test_a_second_run_and_a_copy_compile_nothing(sdxl_path):
    family = make_family(sdxl_path, "full")
    twin = copy.deepcopy(family.unet)
    assert not is_compiled(twin)
    for unet in (family.unet, twin):
        compile_unet(unet, "regional")
    given = inputs(family)
    results(family, family.unet, given)
    made = programs_made()
    for unet in (family.unet, twin, family.unet):
        results(family, unet, given)
    assert programs_made() == made


def test_names_stay_what_they_are(sdxl_path):
    family = make_family(sdxl_path, "full")
    names = list(family.unet.state_dict())
    compile_unet(family.unet, "regional")
    assert list(family.unet.state_dict()) == names


def test_not_compiled_runs_as_written(sdxl_path):
    """Of shapes that the programs are not for, and without a graph: nothing is compiled for them."""
    family = make_family(sdxl_path, "lora")
    given = [inputs(family, pairs) for pairs in (1, 2, 3)]
    with torch.no_grad():
        eager = [family.denoise(family.unet, *g) for g in given]
    compile_unet(family.unet, "regional")
    made = programs_made()
    with torch.no_grad(), not_compiled():
        again = [family.denoise(family.unet, *g) for g in given]
    assert programs_made() == made
    assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


class NormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(x))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mode", "deterministic"), [("regional", True), ("resnets-tuned", False)])
def test_the_options_reach_every_program_and_nothing_else(monkeypatch, mode, deterministic):
    """Policy, its backward pass, which is compiled later, and the reference without a graph. In place of a UNet's
    blocks, which take a minute, one that is compiled with what they are given."""
    import torch._functorch.config
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    def options():
        return {name: getattr(config, name) for name in compiling.OPTIONS}

    found = []
    codegen = GraphLowering.codegen
    monkeypatch.setattr(
        GraphLowering,
        "codegen",
        lambda self: found.append((options(), self.is_backward, self.is_inference)) or codegen(self),
    )
    before = options()
    block = NormBlock()
    compile_unet(SimpleNamespace(modules=block.modules, _repeated_blocks=["NormBlock"]), mode)
    # a program from the cache would not be lowered again
    with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        with torch.no_grad():
            block(torch.randn(2, 8))
        block(torch.randn(2, 8)).sum().backward()
    assert sorted((backward, inference) for _, backward, inference in found) == [(0, 0), (0, 1), (1, 0)]
    expected = {"emulate_precision_casts": True, "deterministic": deterministic}
    assert all(options == expected for options, *_ in found)
    assert options() == before == {"emulate_precision_casts": False, "deterministic": False}


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_off_is_off(sd15_path, mode):
    family = make_family(sd15_path, "lora")
    compile_unet(family.unet, mode)
    assert not is_compiled(family.unet)


@pytest.mark.parametrize("mode", compiling.MODES)
def test_what_each_mode_compiles(sdxl_path, mode):
    family = make_family(sdxl_path, "lora")
    compile_unet(family.unet, mode)
    kinds = {type(module).__name__ for module in family.unet.modules() if module._compiled_call_impl is not None}
    resnets = {"ResnetBlock2D"} if mode.startswith("resnets") else set()
    assert kinds == {"BasicTransformerBlock"} | resnets


def test_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert programs_folder() == tmp_path / "own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert programs_folder() == tmp_path / "dpo_fast-compiled"


def test_without_a_compiler_the_flag_is_refused(monkeypatch):
    check_compiler(torch.device("cpu"))
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(BadInput, match=r"--compile needs a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))

    def no_triton(name):
        raise ImportError(name)

    monkeypatch.setattr(compiling.importlib, "import_module", no_triton)
    with pytest.raises(BadInput, match="needs Triton"):
        check_compiler(torch.device("cuda"))
