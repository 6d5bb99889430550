"""Gradient checkpointing: the same gradients in every mode, compiled or not."""

import pytest
import torch

from dpo_fast.models import compile_unet, recompute_activations
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


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=pytest.mark.exhaustive), "full"])
def test_gradients_of_compiled_blocks_do_not_depend_on_it(sdxl_path, mode):
    family = make_family(sdxl_path, "lora")
    given = inputs(family)
    compile_unet(family.unet, "regional")
    plain = results(family, family.unet, given)
    recompute_activations(family.unet, mode)
    again = results(family, family.unet, given)
    for key, tensor in plain.items():
        assert torch.equal(tensor, again[key]) if key == "prediction" else torch.allclose(tensor, again[key], rtol=1e-4)
