"""The choice of attention kernels."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from dpo_fast.errors import BadInput
from dpo_fast.models import ATTENTIONS, attention, load_family, set_attention, usable_attention


@pytest.fixture
def unet(sd15_path):
    return load_family(sd15_path, dtype=torch.float32, device="cpu").unet


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
    with pytest.raises(BadInput, match=r"one of auto, sdpa, xformers, not 'flash'"):
        set_attention(unet, "flash")


def test_usable_names_every_kernel_that_can_be_asked_for():
    assert {"auto", *usable_attention()} == set(ATTENTIONS)
    assert usable_attention()["sdpa"] == ""
