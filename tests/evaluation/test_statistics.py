"""Win rates with ties, their intervals, and diversity."""

import pytest
import torch

from dpo_fast.evaluation.statistics import diversity, win_rate


def test_ties_count_half():
    base = torch.tensor([0.0, 1.0, 2.0, 3.0])
    rate = win_rate(base, torch.tensor([1.0, 1.0, 1.0, 5.0]), ["a", "b", "c", "d"])
    assert (rate.rate, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)


def test_a_model_against_itself_is_one_half():
    scores = torch.rand(50)
    assert win_rate(scores, scores, [str(k) for k in range(50)])[:3] == (0.5, 0.5, 0.5)


def test_the_interval_of_independent_prompts_is_the_binomials():
    generator = torch.Generator().manual_seed(0)
    policy = (torch.rand(2000, generator=generator) < 0.6).double() * 2 - 1
    rate = win_rate(torch.zeros(2000), policy, [str(k) for k in range(2000)])
    half = 1.96 * (rate.rate * (1 - rate.rate) / 2000) ** 0.5
    assert rate.low == pytest.approx(rate.rate - half, abs=2e-3)
    assert rate.high == pytest.approx(rate.rate + half, abs=2e-3)
    assert win_rate(torch.zeros(2000), policy, [str(k) for k in range(2000)]) == rate


def test_images_of_one_prompt_are_not_independent():
    """Where all images of a prompt win or lose together, only the prompts count: the interval is as wide as theirs."""
    won = (torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.5).double() * 2 - 1
    prompts = [str(k) for k in range(40)]
    few = win_rate(torch.zeros(40), won, prompts)
    many = win_rate(torch.zeros(400), won.repeat_interleave(10), [p for p in prompts for _ in range(10)])
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.05)


def test_diversity_is_between_images_of_one_prompt():
    black, white = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 255, dtype=torch.uint8)
    images = torch.stack([black, white, black, black])
    assert diversity(images, ["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert diversity(images, ["a", "b", "c", "d"]) is None
    assert diversity(images[[0, 1, 1]], ["a", "a", "a"]) == pytest.approx(2 / 3)
