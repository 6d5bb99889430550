"""The choice of attention kernels."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from dpo_fast.errors import BadInput
from dpo_fast.models import ATTENTIONS, attention, set_attention, usable_attention
from dpo_fast.models.attention import ORDERS, OrderedAttention
from tests.helpers.pipelines import load_model


@pytest.fixture
def unet(sd15_path):
    return load_model(sd15_path, dtype=torch.float32, device="cpu").unet


@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_sdpa(unet, choice):
    unet.set_attn_processor(AttnProcessor())
    set_attention(unet, choice)
    assert all(type(processor) is AttnProcessor2_0 for processor in unet.attn_processors.values())


def test_xformers_not_installed(unet, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"xformers needs .*pip install 'dpo_fast\[gpu\]'"):
        set_attention(unet, "xformers")
    assert "not installed" in usable_attention()["xformers"]


def test_xformers_on_the_cpu(unet, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    with pytest.raises(BadInput, match="needs a CUDA device, not cpu"):
        set_attention(unet, "xformers")


def test_unknown(unet):
    with pytest.raises(BadInput, match=r"one of auto, sdpa, cudnn, flash, efficient, xformers, not 'fast'"):
        set_attention(unet, "fast")


@pytest.mark.parametrize("choice", ORDERS)
def test_kernels_of_a_gpu_on_the_cpu(unet, choice):
    with pytest.raises(BadInput, match=f"attention {choice} needs a CUDA device, not cpu"):
        set_attention(unet, choice)
    if not torch.cuda.is_available():
        assert usable_attention()[choice] == "needs a CUDA device"


@pytest.mark.parametrize("choice", ORDERS)
@pytest.mark.parametrize("size", [40, 64, 160])
def test_an_order_never_refuses_and_is_traced_into_a_compiled_region(choice, size):
    """Every order ends with the kernel that takes everything, so fp32 and wide heads fall through to one that can."""
    torch._dynamo.reset()  # programs of other orders and sizes count against its limit
    layer = Attention(query_dim=2 * size, heads=2, dim_head=size, processor=OrderedAttention(ORDERS[choice]))
    x = torch.randn(2, 9, 2 * size)
    ordered = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), ordered)
    layer.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(ordered, layer(x))


def test_an_order_holds_in_the_call_only(monkeypatch):
    seen = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(priority()) or attend(*a, **k))
    before = priority()
    layer = Attention(query_dim=16, heads=2, dim_head=8, processor=OrderedAttention(ORDERS["cudnn"]))
    layer(torch.randn(1, 5, 16))
    assert [order[:4] for order in seen] == [[int(backend) for backend in ORDERS["cudnn"]]]
    assert priority() == before != seen[0]


def priority() -> list[int]:
    return torch._C._get_sdp_priority_order()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [40, 64, 80, 160])
def test_an_order_on_a_gpu(choice, dtype, size):
    layer = Attention(query_dim=2 * size, heads=2, dim_head=size).to("cuda", dtype)
    x = torch.randn(2, 77, 2 * size, device="cuda", dtype=dtype, requires_grad=True)
    found = []
    for processor in (AttnProcessor2_0(), OrderedAttention(ORDERS[choice])):
        layer.set_processor(processor)
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    for plain, ordered in zip(*found, strict=True):
        torch.testing.assert_close(plain, ordered, rtol=0.05, atol=0.02 * plain.abs().max().item())


def test_usable_names_every_kernel_that_can_be_asked_for():
    assert {"auto", *usable_attention()} == set(ATTENTIONS)
    assert usable_attention()["sdpa"] == ""
