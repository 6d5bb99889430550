"""The record of an evaluation: what it says, its summary.json, its table in the terminal, scores.parquet."""

import json
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from dpo_fast.errors import BadInput
from dpo_fast.evaluation.findings import About, judge
from dpo_fast.evaluation.formats import decimals
from dpo_fast.evaluation.scored import Scored, write_scores
from dpo_fast.evaluation.signals import measure
from dpo_fast.files import write_json
from dpo_fast.statistics import win_rate

ABOUT = About("base", "runs/x", "a set", "1 May", {"Steps": "50"})


def scored(prompts: int = 30, images: int = 2, gain: float = 0.5) -> Scored:
    rows = prompts * images
    base = {"beauty": torch.randn(rows).double(), "truth": torch.randn(rows).double()}
    policy = {"beauty": base["beauty"] + gain + torch.randn(rows).double(), "truth": base["truth"].clone()}
    categories = [("people", "animals")[row // images % 2] for row in range(rows)]
    return Scored([f"p{row // images}" for row in range(rows)], [*range(rows)], base, policy, categories)


def test_findings_are_those_of_the_statistics():
    of = scored()
    found = judge(of, [], ABOUT, resamples=500)
    beauty, truth = found.overall
    assert beauty.win_rate[0] == win_rate(of.base["beauty"], of.policy["beauty"], of.prompts)[0]
    assert (beauty.prompts, beauty.compared, sum(beauty.won)) == (30, 60, 30)
    assert tuple(truth.interval) == (0.5, 0.5, 0.5) and truth.p_holm == 1 and not truth.decided
    assert (beauty.p_holm, beauty.rate_p_holm) == (min(1, 2 * beauty.p), min(1, 2 * beauty.rate_p))
    assert (beauty.rate_p < 0.05) == beauty.decided
    assert beauty.gain.value == pytest.approx(of.gain("beauty").mean().item())
    assert beauty.policy_median.value == of.policy["beauty"].quantile(0.5).item()
    assert found.categories == ["people", "animals"]
    people = found.of("people")[0]
    rows = [row for row in range(60) if of.categories[row] == "people"]
    assert people.prompts == 15 and people.gain.value == pytest.approx(of.gain("beauty")[rows].mean().item())


def test_medians_of_prompts_can_be_compared():
    of = Scored(["a"] * 3 + ["b"] * 3, [*range(6)], {"s": torch.zeros(6)}, {"s": torch.tensor([9.0, -1, -1, 1, 1, -9])})
    (images,), (medians,) = (judge(of, [], ABOUT, compare_medians=by, resamples=99).overall for by in (False, True))
    assert (images.win_rate[3:], images.compared) == ((3, 0, 3), 6)
    assert (medians.win_rate[3:], medians.compared, medians.policy_mean.value) == ((1, 0, 1), 2, 0.0)


def test_where_all_is_won_there_is_doubt_still():
    of = Scored(list("abcdef"), [0] * 6, {"s": torch.zeros(6)}, {"s": torch.ones(6)})
    found = judge(of, [], ABOUT, resamples=99)
    (verdict,) = found.overall
    assert verdict.interval == verdict.win_rate[:3] == pytest.approx((1, 6 / (6 + 2.570582**2), 1))
    assert verdict.exact == pytest.approx((1, 0.5407419, 1), abs=1e-7)  # R's binom.test(6, 6)
    assert any("only 6 prompts" in line for line in found.notes()) and "Wilson" in found.notes()[0]


def test_very_different_numbers_of_images_are_said():
    prompts = ["much"] * 20 + ["few"] * 2 + [str(k) for k in range(10)]
    of = Scored(prompts, [*range(32)], {"s": torch.zeros(32)}, {"s": torch.rand(32) - 0.5})
    found = judge(of, [], ABOUT, resamples=99)
    worth = 32**2 / (20**2 + 2**2 + 10)
    assert found.overall[0].effective_prompts == worth == found.for_summary()["scores"]["s"]["effective_prompts"]
    said = f"the 12 prompts carry the information of {worth:.1f} equally sized ones"
    assert any(said in line for line in found.notes())
    for even in (judge(scored(), [], ABOUT, resamples=99), judge(of, [], ABOUT, compare_medians=True, resamples=99)):
        assert not any("very different" in line for line in even.notes())


def test_the_summary_says_which_models_and_scorers_were_used():
    models = {
        "base": {"owner/model": "a" * 40},
        "policy": {"owner/model": "a" * 40, "runs/x": "files 0123456789abcdef"},
    }
    scorers = {"beauty": {"dtype": "float16", "revisions": {"owner/scorer": "b" * 40}}}
    found = judge(scored(), [], replace(ABOUT, models=models, scorers=scorers), resamples=99)
    for summary in (found.numbers(), found.for_summary()):
        assert (summary["models"], summary["scorers"]) == (models, scorers)


def test_the_summary_has_the_keys_of_training(tmp_path):
    of = scored(gain=-3)  # by chance a policy that loses so clearly is not seen to in fewer than 1e-9 of all runs
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    found = judge(of, measure(images, images, of.prompts), ABOUT, resamples=99)
    write_json(tmp_path / "summary.json", found.for_summary())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scorer"] == "beauty" and summary["win_rate"] == found.overall[0].win_rate.rate
    assert summary["score_base"] == pytest.approx(of.base["beauty"].mean().item())
    assert (summary["prompts"], summary["images"]) == (30, 60)
    assert summary["scores"]["beauty"]["win_rate"]["wins"] == found.overall[0].win_rate.wins
    assert summary["categories"]["animals"]["truth"]["exact"] == {"value": 0.5, "low": 0, "high": 1}
    assert summary["diversity_base"] == summary["diversity_policy"] == summary["signals"]["diversity"]["base"] > 0
    assert summary["about"]["settings"] == {"Steps": "50"}
    assert summary["verdict"]["outcome"] == "worse" and summary["verdict"]["sentence"] == str(found.conclusion)
    assert summary["warnings"][0].startswith("the policy loses on beauty: win rate 0.")
    assert found.numbers().items() <= found.for_summary().items()


def test_over_optimisation_is_not_hidden():
    """The first scorer is what was trained towards; each of the others is a price that may have been paid."""

    def warnings(trained: bool = True, **won: float) -> list[str]:
        base = {scorer: torch.zeros(100) for scorer in won}
        policy = {scorer: torch.ones(100) * (torch.arange(100) < 100 * share) * 2 - 1 for scorer, share in won.items()}
        of = Scored([f"p{k}" for k in range(100)], [*range(100)], base, policy)
        return judge(of, [], replace(ABOUT, trained_towards_the_first=trained), resamples=500).warnings()

    assert warnings(a=0.8, b=0.5) == warnings(a=0.5, b=1) == []
    (paid,) = warnings(a=0.8, b=0.2, c=0.5)
    assert paid.startswith("b got worse: win rate 0.200 [0.")
    over, other = warnings(a=0.2, b=0.1)
    assert over.startswith("over-optimisation: the policy loses on a: win rate 0.200 [") and "raise --beta_dpo" in over
    assert other.startswith("the policy loses on b: win rate 0.100 [")
    assert [line[:25] for line in warnings(False, a=0.2, b=0.1)] == [f"the policy loses on {s}: win"[:25] for s in "ab"]


def test_the_table_of_the_terminal():
    of = scored()
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    found = judge(of, measure(images, images, of.prompts), ABOUT, resamples=99)
    text = str(found)
    assert re.search(r"^beauty +" + re.escape(str(found.overall[0].interval)), text, re.M)
    assert re.search(r"^animals +15 +[01]\.\d{3} \[.*0\.500 \[0\.500, 0\.500\]$", text, re.M)
    assert "30 prompts, 60 images of each" in text and "Holm-corrected for 2 scorers" in text
    assert " ".join(text.split()).endswith(f"verdict: {found.conclusion}")
    assert max(map(len, text.splitlines())) <= 110 and all(note.split(";")[0] in text for note in found.notes())
    assert "rough: people, animals" in text and re.search(r"^distance +0\.000 +\[0\.000, 0\.000\]$", text, re.M)


@pytest.mark.parametrize("scorers", [4, 5, 9])
def test_the_table_of_categories_is_no_wider_than_the_terminal(scorers):
    base = {f"scorer-number-{k}": torch.randn(40).double() for k in range(scorers)}
    policy = {name: torch.randn(40).double() for name in base}
    categories = [("people", "the rest of all there is")[k % 2] for k in range(40)]
    found = judge(Scored([str(k) for k in range(40)], [*range(40)], base, policy, categories), [], ABOUT, resamples=99)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 110
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("category ")]
    assert len(tables) == (2 if scorers < 6 else 3)
    assert [name for head, *_ in tables for name in head.split()[2:]] == list(base)
    for category in found.categories:
        rows = " ".join(line for table in tables for line in table if line.startswith(category))
        assert re.findall(r"\d\.\d+ \[.*?\]", rows) == [str(v.interval) for v in found.of(category)]


def test_numbers_are_written_alike():
    assert [decimals(*of) for of in ((21.8, 3.0), (0.27,), (0.0,), (5321.0, -0.1), (1e-20,))] == [2, 4, 3, 0, 9]


def test_scores_are_kept(tmp_path):
    of = scored(prompts=3)
    write_scores(tmp_path / "scores.parquet", of)
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(rows) == 12
    for row in rows:
        side = of.base if row["model"] == "base" else of.policy
        assert {name: row[name] for name in side} == {name: values[row["pair"]].item() for name, values in side.items()}
        assert (row["prompt"], row["seed"]) == (of.prompts[row["pair"]], of.seeds[row["pair"]])
        assert row["category"] == of.categories[row["pair"]]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    write_scores(tmp_path / "plain.parquet", Scored(["a"], [1], {"s": torch.zeros(1)}, {"s": torch.ones(1)}))
    assert pq.read_table(tmp_path / "plain.parquet")["category"].to_pylist() == [None, None]


def test_scores_that_cannot_be_counted_are_refused():
    bad = torch.tensor([0.0, float("nan")])
    with pytest.raises(BadInput, match="s gave nan for the policy's image of 'b', seed 8; run that scorer in fp32"):
        Scored(["a", "b"], [7, 8], {"s": torch.zeros(2)}, {"s": bad})
    with pytest.raises(BadInput, match="cannot be named 'seed'"):
        Scored(["a"], [7], {"seed": torch.zeros(1)}, {"seed": torch.zeros(1)})
