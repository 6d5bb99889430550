"""A model that was trained on one machine is sampled from on another."""

import pytest
import torch

from dpo_fast.models.attention import ATTENTIONS
from dpo_fast.models.opened import OneAtATime
from dpo_fast.models.source import ModelSource


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_of_a_gpu_does_not_keep_a_cpu_from_sampling(sd15_path, attention):
    cpu = torch.device("cpu")
    plain = OneAtATime(cpu).open(ModelSource(str(sd15_path)))
    family = OneAtATime(cpu).open(ModelSource(str(sd15_path), attention=attention, memory_order="contiguous"))
    kinds = [{type(processor) for processor in one.unet.attn_processors.values()} for one in (plain, family)]
    assert kinds[0] == kinds[1] and family.unet.conv_in.weight.is_contiguous()
