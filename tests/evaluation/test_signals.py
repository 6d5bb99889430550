"""Measures of images without a scorer: against plain definitions, and what they say of a spoilt policy."""

import colorsys

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.evaluation.signals import coarse_distance, distance, diversity, measure, saturation, sharpness


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_saturation_is_that_of_hsv():
    image = noise(3, 9, 7)
    image[:, 0, :2] = torch.tensor([[0, 255], [0, 255], [0, 255]], dtype=torch.uint8)  # black and white
    expected = [colorsys.rgb_to_hsv(*(pixel / 255).tolist())[1] for pixel in image.flatten(1).T.double()]
    assert saturation(image) == pytest.approx(sum(expected) / len(expected))


def test_sharpness_is_the_variance_of_the_laplacian():
    image = noise(3, 8, 11)
    luma = (0.299 * image[0].double() + 0.587 * image[1].double() + 0.114 * image[2].double()).tolist()
    values = torch.tensor(
        [
            luma[y - 1][x] + luma[y + 1][x] + luma[y][x - 1] + luma[y][x + 1] - 4 * luma[y][x]
            for y in range(1, 7)
            for x in range(1, 10)
        ]
    )
    assert sharpness(image) == pytest.approx(values.var(correction=0).item(), rel=1e-5)
    assert sharpness(torch.full((3, 5, 5), 77, dtype=torch.uint8)) == pytest.approx(0, abs=1e-18)


def test_distances_are_root_mean_squares():
    black, white = torch.zeros(3, 16, 24, dtype=torch.uint8), torch.full((3, 16, 24), 255, dtype=torch.uint8)
    assert distance(black, white) == coarse_distance(black, white) == 1
    checked = black.clone()
    checked[:, ::2, ::2] = checked[:, 1::2, 1::2] = 255  # half of the pixels, grey from afar
    assert distance(black, checked) == pytest.approx(0.5**0.5)
    assert coarse_distance(black, checked) == pytest.approx(0.5)
    assert coarse_distance(noise(3, 16, 16), white) > 0  # of other sizes


def test_a_model_against_itself_did_not_move():
    images, prompts = noise(6, 3, 16, 16), ["a", "a", "b", "b", "c", "c"]
    found = {signal.name: signal for signal in measure(images, images, prompts)}
    assert set(found) == {"saturation", "sharpness", "diversity", "distance", "coarse distance"}
    for signal in found.values():
        assert tuple(signal.difference) == (0, 0, 0) and signal.warning() is None
    expected = [distance(images[k], images[k + 1]) for k in (0, 2, 4)]
    assert found["diversity"].base == pytest.approx(sum(expected) / 3)


def test_diversity_is_between_images_of_one_prompt():
    black, white = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 255, dtype=torch.uint8)
    images = torch.stack([black, white, black, black])

    def diversity(images: torch.Tensor, prompts: list[str]) -> list[float]:
        return [signal.base for signal in measure(images, images, prompts) if signal.name == "diversity"]

    assert diversity(images, ["a", "a", "b", "b"]) == [pytest.approx(0.5)]
    assert diversity(images, ["a", "b", "c", "d"]) == []
    assert diversity(images[[0, 1, 1]], ["a", "a", "a"]) == [pytest.approx(2 / 3)]


def test_a_file_that_stands_in_several_rows_is_one_image():
    images, prompts = noise(6, 3, 16, 16), ["a"] * 3 + ["b"] * 3
    images[4] = images[3]  # alike, and yet two files: variety that was lost

    def found_with(*sources: list[str]) -> list[tuple[float, float]]:
        policy = images.clone()
        policy[1] = policy[0]
        found = measure(images, policy, prompts, sources=sources)
        return [pytest.approx((s.base, s.policy)) for s in found if s.name == "diversity"]

    a = (distance(images[0], images[1]) + distance(images[0], images[2]) + distance(images[1], images[2])) / 3
    b = (0 + 2 * distance(images[3], images[5])) / 3
    again = distance(images[0], images[2])
    assert found_with(list("012345"), list("012345")) == [((a + b) / 2, (2 * again / 3 + b) / 2)]
    assert found_with(list("012345"), list("002345")) == [((a + b) / 2, (again + b) / 2)]
    assert found_with(list("012345"), list("002333")) == [(a, again)]  # of the second prompt one image only
    assert found_with(list("012345"), list("000333")) == []
    assert found_with(list("000345"), list("000000")) == []


def test_numbers_are_those_of_fp64():
    """The plain definitions in double precision, of odd sizes and of images that differ by little."""
    for height, width in ((97, 50), (64, 128), (5, 11)):
        base = noise(3, height, width)
        policy = (base.int() + torch.randint(-1, 2, base.shape)).clamp(0, 255).to(torch.uint8)
        one, other = base.double() / 255, policy.double() / 255
        assert distance(base, policy) == pytest.approx((one - other).square().mean().sqrt().item(), rel=1e-6)
        small = [adaptive_avg_pool2d(of, 8) for of in (one, other)]
        assert coarse_distance(base, policy) == pytest.approx(
            (small[0] - small[1]).square().mean().sqrt().item(), rel=1e-6
        )
        luma = torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]).double(), base.double())
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).double()
        edges = conv2d(luma[None, None], kernel[None, None])
        assert sharpness(base) == pytest.approx(edges.var(correction=0).item(), rel=1e-6)
        highest, lowest = base.amax(0).double(), base.amin(0).double()
        assert saturation(base) == pytest.approx(((highest - lowest) / highest.clamp(min=1)).mean().item(), rel=1e-6)


def test_no_image_is_held_in_double():
    """Eight bytes a number made one pair of 1024 x 1024 a third of a second."""

    class Largest(TorchDispatchMode):
        double = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype in (torch.float64, torch.int64):
                self.double = max(self.double, made.numel())
            return made

    base, policy = noise(3, 128, 128), noise(3, 128, 128)
    with Largest() as largest:
        for of in (saturation, sharpness):
            of(base)
        for of in (distance, coarse_distance):
            of(base, policy)
        diversity([base, policy, base])
    assert 0 < largest.double <= 3 * 128 * 8


def test_what_over_optimisation_does_is_said():
    prompts = [str(k // 2) for k in range(12)]
    base = noise(12, 3, 16, 16) // 4 + 96  # pale and soft
    policy = noise(6, 3, 16, 16).repeat_interleave(2, 0)  # colourful, sharp, and twice the same
    warnings = [signal.warning() for signal in measure(base, policy, prompts)]
    assert "saturation is" in warnings[0] and "sharpness is" in warnings[1]
    assert warnings[2:] == ["diversity is 0% of the base's", None, None]
    assert [s.warning() for s in measure(policy, base, prompts)] == [None] * 5


def test_what_cannot_be_measured_is_left_out():
    names = [s.name for s in measure([noise(3, 16, 16)] * 2, [noise(3, 24, 24)] * 2, ["a", "b"])]
    assert names == ["saturation", "sharpness", "coarse distance"]
