"""Successive halving: how prompts are split and shared out, what is dropped, and whether the best is found."""

import pytest
import torch

from dpo_fast.evaluation.halving import FIRST, Race, in_two, shares

PROMPTS = [f"a photo of {number} cats" for number in range(200)]


def test_the_two_halves_share_no_prompt_and_do_not_depend_on_the_order():
    one, other = in_two(PROMPTS)
    assert not set(one) & set(other) and set(one) | set(other) == set(PROMPTS) and abs(len(one) - len(other)) <= 1
    assert in_two(PROMPTS[::-1]) == (one, other) and in_two(PROMPTS * 2) == (one, other)
    assert len(set(PROMPTS[:100]) & set(one)) < 75  # by no order of the list


@pytest.mark.parametrize("prompts", [1, 2, 3, 31, 36, 64, 100, 200])
@pytest.mark.parametrize("images", [1, 5, 64, 144, 256, 1000])
def test_rounds_double_and_no_image_is_made_twice(prompts, images):
    rounds = shares(PROMPTS[:prompts], images)
    made = [(text, seed) for share in rounds for text in share.prompts for seed in share.seeds]
    assert len(made) == len(set(made)) <= images or (len(rounds) == 1 and rounds[0].images <= prompts)
    total = 0
    for number, share in enumerate(rounds):
        assert share.images == len(share.prompts) * len(share.seeds) > 0
        assert number == 0 or share.images == total
        total += share.images
    assert 2 * total > images or prompts > images  # there was no room for another round
    assert rounds[0].images <= max(2 * FIRST, 1)


def scored(race: Race, effects: dict[str, float], number: int, generator: torch.Generator, offset: int) -> None:
    texts = [f"prompt {k % 40}" for k in range(offset, offset + number)]
    base = torch.randn(number, generator=generator).double()
    scores = {
        name: base + effects[name] + 0.5 * torch.randn(number, generator=generator).double() for name in race.alive
    }
    race.add(texts, base, scores)


@pytest.mark.parametrize("by", ["gain", "win_rate"])
def test_the_best_of_many_is_found_with_few_images(by, seed):
    effects = {f"p{k}": -0.1 * k for k in range(16)} | {"best": 0.4}
    race, generator, made = Race([*effects], by), torch.Generator().manual_seed(seed), 0
    for number in (32, 32, 64, 128):
        scored(race, effects, number, generator, made)
        made += number
        race.drop_the_worse_half()
    assert race.best() == "best" and len(race.alive) == 2
    assert len(race.scores["best"]) == 256 and len(race.scores["p15"]) == 32
    interval = race.gain("best")
    assert interval.low < 0.4 < interval.high and race.win_rate("best").rate > 0.6
    assert race.gain("p15").value < -1


def test_halving_keeps_two_and_never_loses_all():
    race = Race(["a", "b", "c"], "gain")
    race.add(
        ["x", "y"],
        torch.zeros(2).double(),
        {"a": torch.ones(2).double(), "b": -torch.ones(2).double(), "c": torch.zeros(2).double()},
    )
    race.drop_the_worse_half()
    assert race.alive == ["a", "c"]
    race.drop_the_worse_half()
    assert race.alive == ["a", "c"]
    one = Race(["only"], "gain")
    one.add(["x"], torch.zeros(1).double(), {"only": torch.ones(1).double()})
    one.drop_the_worse_half()
    assert one.alive == ["only"] == [one.best()]


def test_ties_count_half():
    race = Race(["a"], "win_rate")
    race.add(["x", "y", "z", "w"], torch.zeros(4).double(), {"a": torch.tensor([1.0, 0.0, -1.0, 1.0]).double()})
    assert race.value("a") == 0.625
