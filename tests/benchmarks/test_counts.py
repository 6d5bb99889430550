"""What our training step costs is held: other launches, FLOPs or saved memory fail here, without a GPU.

After a change that is meant to cost more, or that costs less: `python -m benchmarks.step.counts --write`, and
`python -m benchmarks.fill` for the tables.
"""

import pytest

from benchmarks.step import counts
from benchmarks.step.cases import CASES
from tests.benchmarks import tiny

REAL = [name for name in CASES if not CASES[name].mini]
COUNTED = [name for name in REAL if not CASES[name].turbo]  # turbo launches what sdxl launches, on smaller images
# TFLOP a latent by another count, made from the public configurations: the forward pass, and with LoRA of rank 8.
FORWARD = {"sd15-512": (0.803, 0.806), "turbo-512": (1.589, 1.594), "sdxl-1024": (6.761, 6.782)}
# The whole step a pair, TFLOP, and what its forward keeps, GB.
STEP = {
    "sdxl-1024-full": (54.8, 13.76),
    "sdxl-1024-lora": (42.5, 11.16),
    "turbo-512-full": (12.7, 3.48),
    "turbo-512-lora": (9.5, 2.84),
    "sd15-512-full": (6.5, 1.86),
    "sd15-512-lora": (5.2, 1.60),
}
VAE = {512: 1.12, 1024: 4.88}  # TFLOP an image


@pytest.mark.exhaustive
@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", COUNTED)
def test_a_step_costs_what_is_published(name):
    """No more, and no less either: then the tables of the README say too much."""
    now, before = vars(counts.count_step(CASES[name])), counts.known(name)
    # libraries of other versions may dispatch a few operators more or less
    allowed = 0.001 if counts.versions() == counts.known_versions() else 0.05
    for cost, value in now.items():
        assert value == pytest.approx(before[cost], rel=allowed), f"{cost} of {name}"


@pytest.mark.parametrize("name", REAL)
def test_the_counts_are_those_of_the_public_models(name):
    known = counts.known(name)
    step, saved = STEP[name]
    base, with_lora = FORWARD[name.rsplit("-", 1)[0]]
    assert known["flops"] / 1e12 == pytest.approx(step, rel=0.01)
    assert known["forward_flops"] / 2e12 == pytest.approx(with_lora if name.endswith("lora") else base, rel=0.002)
    assert known["ref_flops"] / 2e12 == pytest.approx(base, rel=0.002)  # adapters that are off are not run
    assert known["saved"] / 1e9 == pytest.approx(saved, rel=0.01)
    assert known["vae_flops"] / 1e12 == pytest.approx(VAE[CASES[name].resolution], rel=0.005)


@pytest.mark.exhaustive
def test_extra_work_is_counted(monkeypatch):
    """One more pass over the predictions shows in launches, and a kept copy in saved bytes."""
    from dpo_fast.models.family import Family

    case = tiny.case("sd15", "lora")
    before = counts.count_step(case)
    denoise = Family.denoise

    def wasteful(self, *arguments):
        prediction = denoise(self, *arguments)
        return prediction * prediction.exp().sigmoid()

    monkeypatch.setattr(Family, "denoise", wasteful)
    after = counts.count_step(case)
    assert after.launches >= before.launches + 6 and after.saved > before.saved and after.bytes > before.bytes
    assert after.flops == before.flops


@pytest.mark.exhaustive
def test_making_the_optimizers_state_is_not_counted():
    """The counted step costs what a third one costs; the first costs more, as AdamW makes its moments in it."""
    case = tiny.case("sd15", "full")
    first, counted, third = counts.count_step(case, 1), counts.count_step(case), counts.count_step(case, 3)
    assert counted == third
    assert 0 < counted.optimizer_launches < first.optimizer_launches
    assert counted.launches - counted.optimizer_launches == first.launches - first.optimizer_launches


def test_attention_is_counted_as_flash_attention():
    """Two products forward, five backward, and no scores kept."""
    case = tiny.case("sd15", "full")
    step = counts.count_step(case)
    assert step.flops == pytest.approx(step.ref_flops + step.forward_flops * 3, rel=0.2)
