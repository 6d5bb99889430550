"""Gradient checkpointing: the same gradients in every mode, compiled or not; what "selective" keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpo_fast.models import checkpointing, compile_unet, recompute_activations
from tests.models.test_compiling import inputs, make_family, no_programs, results

__all__ = ["no_programs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "tuning"), [("sdxl", "lora"), ("sd15", "full")])
def test_gradients_do_not_depend_on_it(request, name, tuning, dtype):
    family = make_family(request.getfixturevalue(f"{name}_path"), tuning, dtype)
    given = inputs(family)
    found = []
    for mode in ("none", "selective", "full", "none"):
        recompute_activations(family.unet, mode)
        found.append(results(family, family.unet, given))
    for other in found[1:]:
        assert all(torch.equal(tensor, other[key]) for key, tensor in found[0].items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_of_compiled_blocks_do_not_depend_on_it(sdxl_path, mode):
    family = make_family(sdxl_path, "lora")
    given = inputs(family)
    compile_unet(family.unet, "regional")
    plain = results(family, family.unet, given)
    recompute_activations(family.unet, mode)
    again = results(family, family.unet, given)
    for key, tensor in plain.items():
        assert torch.equal(tensor, again[key]) if key == "prediction" else torch.allclose(tensor, again[key], rtol=1e-4)


class Attend(torch.autograd.Function):
    """Attention as xformers and flash-attn call theirs: one operator inside a function with a backward of its own."""

    @staticmethod
    def forward(ctx, op, x):
        out, normaliser = op(x)
        ctx.save_for_backward(out, normaliser)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, normaliser = ctx.saved_tensors
        return None, grad * out * normaliser


class Block(nn.Module):
    def __init__(self, op) -> None:
        super().__init__()
        self.op, self.before, self.after = op, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.after(Attend.apply(self.op, F.silu(self.before(x))).sin())


LIBRARIES = [
    *("xformers_flash::flash_fwd", "xformers_flash3::flash_fwd", "xformer::memory_efficient_attention_forward"),
    *("xformers::efficient_attention_forward_ck", "xformers::efficient_attention_forward_cutlass"),
    *("flash_attn::_flash_attn_forward", "flash_attn_3::fwd", "_diffusers_flash_attn_3::_flash_attn_forward"),
]


@pytest.mark.parametrize("name", [*LIBRARIES, "elsewhere::flash_fwd"])
def test_attention_of_a_library_is_kept(name):
    """And what is not known is repeated. The operator is registered only now, as by a late import of its library."""
    calls = []
    namespace, op = name.split("::")
    if registered := getattr(getattr(torch.ops, namespace), op, None):  # by its library, for a device of its own
        assert name in LIBRARIES and checkpointing._name(registered.default) in checkpointing._KEPT
        return
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define(f"{op}(Tensor x) -> (Tensor, Tensor)")
        library.impl(op, lambda x: calls.append(1) or (x.exp(), x.exp().sum(-1, keepdim=True)), "CPU")
        block = Block(getattr(getattr(torch.ops, namespace), op))
        x = torch.randn(3, 8, requires_grad=True)
        plain = torch.autograd.grad(block(x).square().sum(), (x, *block.parameters()))
        calls.clear()
        loss = checkpointing._run_again(block, x, selective=True).square().sum()
        again = torch.autograd.grad(loss, (x, *block.parameters()))
    assert len(calls) == (1 if name in LIBRARIES else 2)
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("name", sorted(name for name in checkpointing._KEPT if name.startswith("aten::")))
def test_names_of_pytorch_are_names_of_operators(name):
    op = getattr(torch.ops.aten, name.removeprefix("aten::"))
    assert checkpointing._name(op.default) == name
    assert all(checkpointing._name(getattr(op, overload)) == name for overload in op.overloads())


def test_a_higher_order_operator_has_a_name():
    assert checkpointing._name(torch.ops.higher_order.cond) == "cond"
