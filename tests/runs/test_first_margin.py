"""The first margin is 0.0 to the bit in every attention kernel, the policy in a graph and the reference without one.

On a GPU at the widths of SDXL, since which kernels run depends on them; on a CPU the same in a narrow UNet.
"""

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_fast import parallel
from dpo_fast.command_line import parse
from dpo_fast.kernels import dpo_loss, noise_pair
from dpo_fast.models import set_attention
from dpo_fast.models.attention import OrderedAttention
from dpo_fast.models.sdxl import SDXL
from dpo_fast.training.run import make_trainable
from tests.helpers.pipelines import default_time_ids, randomise, sdxl_around
from tests.helpers.runs import flags_for
from tests.helpers.seeds import generator

PAIRS, BETA = 2, 2000.0
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Size:
    """Of a UNet with SDXL's three levels, but fewer blocks in each, and of its inputs."""

    channels: tuple[int, int, int]
    head: int  # numbers of an attention head
    groups: int  # of a norm
    tokens: int
    text: int  # width of a token's embedding
    pooled: int  # width of the pooled embedding
    time: int  # width of an embedded time id
    side: int  # of the latents

    def unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=self.side,
            block_out_channels=self.channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 1),
            cross_attention_dim=self.text,
            attention_head_dim=tuple(width // self.head for width in self.channels),  # the number of heads
            use_linear_projection=True,
            norm_num_groups=self.groups,
            addition_embed_type="text_time",
            addition_time_embed_dim=self.time,
            projection_class_embeddings_input_dim=self.pooled + 6 * self.time,
        )


NARROW = Size((16, 32, 32), head=8, groups=4, tokens=9, text=24, pooled=16, time=8, side=8)
WIDE = Size((320, 640, 1280), head=64, groups=32, tokens=77, text=2048, pooled=1280, time=256, side=32)


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and most tests here compile nothing
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def random_unet() -> Callable[[Size], UNet2DConditionModel]:
    """A copy of one UNet a size, in fp32 on the CPU; every parameter is random: fresh norms would hide a difference."""
    seed = generator().initial_seed()

    @cache
    def made(size: Size) -> UNet2DConditionModel:
        unet = size.unet()
        randomise(unet, seed)
        return unet

    return lambda size: copy.deepcopy(made(size))


def choose_attention(unet: UNet2DConditionModel, attention: str, dtype: torch.dtype) -> None:
    """`attention` alone, so that no other kernel can stand in for it. Skips what this machine does not have."""
    if attention in ("sdpa", "xformers"):
        set_attention(unet, attention)
        return
    order = [KERNELS[attention]]
    try:
        with sdpa_kernel(order):
            q = torch.zeros(1, 1, 64, 64, dtype=dtype, device=unet.device, requires_grad=True)
            F.scaled_dot_product_attention(q, q, q).sum().backward()
    except RuntimeError as error:
        if unet.device.type != "cpu":
            pytest.skip(f"{attention} cannot be used here: {error}")
        order.append(SDPBackend.MATH)  # a CPU has neither
    unet.set_attn_processor(OrderedAttention(order))


def check_first_margin(
    unet: UNet2DConditionModel,
    size: Size,
    device: str,
    precision: str,
    tuning: str,
    attention: str,
    compile: str,
    seed: int,
) -> None:
    """Opens a policy and its reference as a run does, and compares them on a batch of random pairs."""
    dtype = DTYPES[precision]
    config, _ = parse(
        flags_for("model", "pairs", "out", "--tuning", tuning, "--mixed_precision", precision, "--compile", compile)
    )
    pipeline = sdxl_around(unet.to(dtype if tuning == "lora" else torch.float32))
    family = SDXL(pipeline, dtype=dtype, device=torch.device(device))
    choose_attention(family.unet, attention, dtype)
    masters, reference = make_trainable(config, parallel.Ranks(None, 0, 1, family.device, None), family)

    draws = torch.Generator().manual_seed(seed)
    latents = torch.randn(2 * PAIRS, 4, size.side, size.side, generator=draws).half().to(device)
    conditioning = {
        "prompt_embeds": torch.randn(PAIRS, size.tokens, size.text, generator=draws).half().to(device),
        "pooled_prompt_embeds": torch.randn(PAIRS, size.pooled, generator=draws).half().to(device),
        "time_ids": default_time_ids(8 * size.side, PAIRS).to(device),
    }
    timesteps = torch.tensor([100, 800], device=device)
    ids = torch.arange(PAIRS, device=device)
    noisy, target = noise_pair(
        latents.contiguous(memory_format=torch.channels_last),
        family.schedule.sqrt_alpha_bar[timesteps],
        family.schedule.sqrt_one_minus_alpha_bar[timesteps],
        seed,
        ids,
        torch.zeros_like(ids),
        prediction_type="epsilon",
        dtype=dtype,
    )

    def step():
        ref = reference(SimpleNamespace(timesteps=timesteps), noisy, conditioning)
        prediction = family.denoise(family.unet, noisy, timesteps, conditioning)
        return ref, prediction, dpo_loss(prediction, ref, target, BETA)

    ref, prediction, terms = step()
    assert prediction.dtype == dtype and prediction.requires_grad and not ref.requires_grad
    assert prediction.isfinite().all() and prediction.std() > 0.1
    different = (prediction.float() - ref.float()).abs()
    assert torch.equal(prediction, ref), f"{(different > 0).float().mean():.2%} differ, by up to {different.max()}"
    assert (terms.margin == 0.0).all() and terms.loss.item() == torch.tensor(2.0).log().item()
    assert math.isclose(terms.loss.item(), math.log(2), rel_tol=1e-7)
    (terms.loss / 256).backward()  # at this beta the gradients of fp16 might overflow
    masters.accumulate()
    assert all(gradient.isfinite().all() for gradient in masters.gradients())
    assert any(gradient.any() for gradient in masters.gradients())
    # with other weights there are other margins: zero is not all that this could give
    with torch.no_grad():
        for master in masters.masters:
            master.add_(torch.randn_like(master) * 0.1 / master[0].numel() ** 0.5)
    masters.write_back()
    margin = step()[2].margin
    assert margin.isfinite().all() and (margin != 0).all()


# sdpa in all, the kernels in one each: a CPU has one kernel besides the plain products
ON_CPU = [
    *((precision, tuning, "sdpa", "off") for precision in DTYPES for tuning in ("lora", "full")),
    *(("bf16", "lora", attention, "off") for attention in KERNELS),
    pytest.param("bf16", "full", "flash", "regional", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
]


@pytest.mark.parametrize(("precision", "tuning", "attention", "compile"), ON_CPU)
def test_the_first_margin_of_a_narrow_unet_is_zero(random_unet, precision, tuning, attention, compile, seed):
    check_first_margin(random_unet(NARROW), NARROW, "cpu", precision, tuning, attention, compile, seed)


def on_gpu() -> Iterator:
    """Every combination; compiled in fp16 only with sdpa, unless more is asked for."""
    combinations = itertools.product(DTYPES, ("lora", "full"), ("sdpa", *KERNELS, "xformers"), ("off", "regional"))
    for precision, tuning, attention, compile in combinations:
        marks = [pytest.mark.slow] if compile == "regional" else []
        if compile == "regional" and precision == "fp16" and attention != "sdpa":
            marks.append(pytest.mark.exhaustive)
        if attention == "xformers":
            marks.append(pytest.mark.skipif(find_spec("xformers") is None, reason="xformers is not installed"))
        yield pytest.param(precision, tuning, attention, compile, marks=marks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tuning", "attention", "compile"), list(on_gpu()))
def test_the_first_margin_at_the_widths_of_sdxl_is_zero(random_unet, precision, tuning, attention, compile, seed):
    check_first_margin(random_unet(WIDE), WIDE, "cuda", precision, tuning, attention, compile, seed)


def test_the_wide_unet_has_the_widths_of_sdxl():
    """Those of its published configuration: heads of 64, 2048 numbers a token, a norm of 32 groups."""
    with torch.device("meta"):
        unet = WIDE.unet()
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {(a.heads, a.inner_dim) for a in attentions} == {(10, 640), (20, 1280)}
    assert {a.to_k.in_features for a in attentions} == {640, 1280, 2048}
    assert unet.add_embedding.linear_1.in_features == 2816
    assert {module.num_groups for module in unet.modules() if isinstance(module, nn.GroupNorm)} == {32}
