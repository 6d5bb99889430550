"""The verdict in one sentence: who decides, when it is aligned, worse or open, and what it was paid for with."""

import pytest
import torch

from dpo_fast.evaluation.conclusion import NOTHING, REMEDY, Conclusion
from dpo_fast.evaluation.findings import About, judge
from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.signals import Signal
from dpo_fast.statistics import Interval

PROMPTS = 100
VIVID = Signal("saturation", "", 0.4, 0.6, Interval(0.2, 0.1, 0.3))
ALIKE = Signal("diversity", "", 0.2, 0.1, Interval(-0.1, -0.2, -0.05))


def verdict(signals: tuple[Signal, ...] = (), trained: bool = True, **won: float) -> Conclusion:
    """Of scorers with the shares of prompts that the policy wins by each, with one image a prompt and no tie."""
    rows = torch.arange(PROMPTS)
    base = {scorer: torch.zeros(PROMPTS).double() for scorer in won}
    policy = {scorer: (rows < round(PROMPTS * share)).double() * 2 - 1 for scorer, share in won.items()}
    about = About("base", "policy", "a set", "1 May", {}, trained_towards_the_first=trained)
    of = Scored([f"p{k}" for k in range(PROMPTS)], rows.tolist(), base, policy)
    return judge(of, list(signals), about, resamples=500).conclusion


def test_the_first_scorer_decides():
    good, bad = verdict(a=0.8, b=0.2), verdict(b=0.2, a=0.8)
    assert (good.outcome, good.scorer, bad.outcome, bad.scorer) == ("aligned", "a", "worse", "b")
    assert str(good).startswith("aligned, as a decides (the first of 2 scorers): win rate 0.800 [0.7")
    assert verdict(a=0.8, trained=False).outcome == "better"
    assert "first of" not in str(verdict(a=0.8)) and "Holm" not in str(verdict(a=0.8))
    assert REMEDY in str(verdict(a=0.2)) and REMEDY not in str(verdict(a=0.2, trained=False)) + str(bad.grounds)


def test_an_interval_that_holds_one_half_shows_nothing():
    open_ = verdict(a=0.55)
    assert open_.outcome == NOTHING and str(open_).startswith("no difference shown, as a decides: win rate 0.550 [0.4")
    assert str(open_).endswith("] holds 0.5") and open_.p_holm > 0.05


def test_the_correction_for_several_scorers_counts():
    """0.61 of a hundred is beyond chance for a scorer alone, and not for the best of five."""
    alone, among = verdict(a=0.61), verdict(a=0.61, b=0.5, c=0.5, d=0.5, e=0.5)
    assert alone.outcome == "aligned" and among.outcome == NOTHING
    assert among.p_holm == pytest.approx(5 * alone.p_holm) and alone.p_holm < 0.05 < among.p_holm
    assert f"excludes 0.5, but corrected for 5 scorers (Holm) p is {among.p_holm:.3f}" in str(among)
    assert verdict(a=0.61, b=0.99).outcome == "aligned"  # corrected least, once the other is beyond doubt


def test_what_it_was_paid_for_with_is_said_in_the_same_sentence():
    paid = verdict((VIVID,), a=0.8, b=0.2, c=0.5)
    assert list(paid.costs) == ["b", "saturation"]
    assert "; paid for with b (win rate 0.200 [0.1" in str(paid)
    assert "mean 0.0000 -> -0.6000, -0.600 [-0.7" in str(paid)
    assert " and saturation (150% of the base's, 0.4000 -> 0.6000, +0.200 [+0.100, +0.300])" in str(paid)
    three = verdict((VIVID, ALIKE), a=0.8, b=0.2)
    assert ") , " not in str(three) and "), saturation (" in str(three) and ") and diversity (50% of" in str(three)
    assert "; and worse by b (" in str(verdict(a=0.5, b=0.2)) and "; worse by b (" in str(verdict(a=0.2, b=0.2))
    calm = Signal("saturation", "", 0.4, 0.41, Interval(0.01, 0.005, 0.02))
    assert verdict((calm,), a=0.8, b=0.5).cost == ""


def test_a_loss_is_named_even_where_the_correction_doubts_it():
    named = verdict(a=0.9, b=0.39, c=0.5, d=0.5, e=0.5)
    assert list(named.costs) == ["b"] and "p 0.1" in named.cost


def test_one_prompt_says_nothing_of_others():
    of = Scored(["a"] * 30, [*range(30)], {"s": torch.zeros(30)}, {"s": torch.ones(30)})
    said = str(judge(of, [], About("base", "policy", "a set", "1 May", {}), resamples=99).conclusion)
    assert "of a single prompt, which says nothing of others" in said


def test_the_summary_holds_the_sentence_and_its_parts():
    paid = verdict(a=0.8, b=0.2)
    assert paid.for_summary() == {
        "outcome": "aligned",
        "scorer": "a",
        "p_holm": paid.p_holm,
        "costs": ["b"],
        "sentence": str(paid),
    }
