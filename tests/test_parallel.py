"""What a launcher may ask for."""

import pytest

from dpo_fast import parallel
from dpo_fast.errors import BadInput


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_what_a_launcher_asks_for_and_nothing_heeds_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, match=rf"{variable}={value}\), which has no effect here"):
        parallel.start("none")
    monkeypatch.setenv(variable, "no" if "DYNAMO" in variable else "1" if "STEPS" in variable else "false")
    parallel.start("none")
