"""The summary of a small session counted by hand, its invariances, what excluded voters change, text and picture."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageColor

from dpo_fast.plot import COLOURS
from dpo_fast.votes.agreement import agreement
from dpo_fast.votes.intervals import ONE_VOTER
from dpo_fast.votes.picture import LEFT, RIGHT, picture_of, save_picture
from dpo_fast.votes.records import Check
from dpo_fast.votes.tally import as_text, majority_of, rates_of, summary_of
from tests.votes.drawn import drawn, vote

SETTINGS = {"votes": 3, "questions": {"general": "Which do you prefer?"}, "comparisons": 5}
# comparison -> votes of Ann, Bob and Cem (None: none) for the first model
SMALL = {0: (0, 0, 1), 1: (1, 1, 0.5), 2: (0, 0.5, 0.5), 3: (0, 1, None)}


def small():
    return [
        vote(
            comparison,
            voter,
            outcome,
            category="people" if comparison < 2 else "animals",
            first_left=comparison % 2 == 0,
            seconds=float(comparison + 1 + 10 * number),
        )
        for comparison, outcomes in SMALL.items()
        for number, (voter, outcome) in enumerate(zip(("Ann", "Bob", "Cem"), outcomes, strict=True))
        if outcome is not None
    ]


def test_a_small_session_by_hand():
    votes = small()
    checks = [
        Check("Ann", "identical", True, 1, 0),
        Check("Ann", "obvious", False, 1, 0),
        Check("Zoe", "obvious", True, 1, 0),
    ]
    found = summary_of(votes, checks, SETTINGS)
    assert {key: found[key] for key in ("votes", "comparisons", "complete", "wanted", "voters")} == {
        "votes": 11,
        "comparisons": 5,
        "complete": 3,
        "wanted": 5,
        "voters": 3,
    }
    assert found["seconds_median"] == 12  # of 1 2 3 4, 11 12 13 14, 21 22 23
    question = found["questions"]["general"]
    assert (question["text"], question["votes"]) == ("Which do you prefer?", 11)
    (pair,) = question["pairs"]
    # the policy wins 0 (2:1) and 2 (1 and two ties), loses 1, ties 3
    assert (pair["wins"], pair["ties"], pair["losses"]) == (2, 1, 1)
    assert pair["win_rate"] == (1 + 0 + 1 + 0.5) / 4
    assert pair["by_votes"] == pytest.approx((2 + 0.5 + 2 + 1) / 11)
    assert (pair["models"], pair["group"], pair["comparisons"], pair["votes"]) == (["base", "policy"], "run", 4, 11)
    assert pair["undecided"] == 1 and pair["note"] is None
    assert {name: (of["win_rate"], of["comparisons"]) for name, of in pair["categories"].items()} == {
        "animals": (0.75, 2),
        "people": (0.5, 2),
    }
    ann, bob, cem, zoe = found["by_voter"]
    # Ann votes for the right image three times, then for the left; the others are even on 0, with her on 1, even on 2
    # (two ties), and against her on 3
    assert ann == {
        "name": "Ann",
        "votes": 4,
        "seconds_median": 2.5,
        "left_share": 0.25,
        "tie_share": 0.0,
        "agrees_with_majority": 0.5,
        "checks": 2,
        "checks_failed": 1,
        "excluded": None,
    }
    assert bob["left_share"] == 0 and bob["tie_share"] == 0.25
    # Bob: 0 Ann and Cem are even, 1 with Ann, 2 a tie where Ann is for the policy, 3 against Ann
    assert bob["agrees_with_majority"] == pytest.approx((1 + 0.5 + 0) / 3)
    # Cem: 0 against both, 1 a tie against both, 2 a tie where Ann is for the policy
    assert cem["agrees_with_majority"] == pytest.approx((0 + 0.5 + 0.5) / 3) and cem["left_share"] == 1.0
    assert zoe == dict.fromkeys(zoe) | {"name": "Zoe", "votes": 0, "checks": 1, "checks_failed": 0}


def test_majorities():
    assert majority_of(small()) == {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.5}


def test_numbers_are_those_of_the_parts(seed):
    votes = drawn(3, 15, 6, 3, np.random.default_rng(seed))
    question = summary_of(votes, [], {})["questions"]["general"]
    alpha = agreement(votes)
    assert (question["alpha"], question["alpha_ci95"]) == (alpha.alpha, list(alpha.interval[1:]))
    assert len(question["pairs"]) == len(question["ranking"]) == 3
    for pair in question["pairs"]:
        of = rates_of([v for v in votes if list(v.models) == pair["models"]])
        assert [pair["win_rate"], *pair["ci95"]] == list(of.majority)
        assert [pair["by_votes"], *pair["by_votes_ci95"]] == list(of.votes)


def test_excluded_voters_count_nowhere_and_are_listed(seed):
    votes = drawn(3, 12, 6, 4, np.random.default_rng(seed))
    checks = [Check("voter 0", "obvious", False, 1, 0)]
    kept = [v for v in votes if v.voter != "voter 0"]
    found = summary_of(votes, checks, {"votes": 4}, {"voter 0": "failed the checks"})
    without = summary_of(kept, [], {"votes": 4, "comparisons": found["comparisons"]})
    for key in set(found) - {"by_voter"}:
        assert found[key] == without[key]
    row, *others = found["by_voter"]
    assert others == without["by_voter"]
    assert (
        row["excluded"] == "failed the checks" and row["votes"] == len(votes) - len(kept) and row["checks_failed"] == 1
    )
    against = [
        sum(o.outcome - 0.5 for o in kept if o.comparison == v.comparison) for v in votes if v.voter == "voter 0"
    ]
    own = [v.outcome for v in votes if v.voter == "voter 0"]
    sided = [o if a > 0 else 1 - o for a, o in zip(against, own, strict=True) if a]
    assert row["agrees_with_majority"] == pytest.approx(np.mean(sided))


def test_an_excluded_voter_changes_nothing_whatever_is_voted(seed):
    """Votes of nonsense by one who is excluded, on all comparisons."""
    votes = drawn(2, 12, 6, 4, np.random.default_rng(seed))
    poison = [v._replace(voter="troll", outcome=0.0, seconds=1e9) for v in votes]
    with_, without = summary_of(votes + poison, [], {}, {"troll": "x"}), summary_of(votes, [], {})
    assert with_["by_voter"][0]["name"] == "troll" and with_["by_voter"][1:] == without["by_voter"]
    assert with_["questions"] == without["questions"] and with_["seconds_median"] == without["seconds_median"]


def test_order_changes_nothing(seed):
    generator = np.random.default_rng(seed)
    votes = drawn(2, 12, 6, 4, generator)
    shuffled = summary_of([votes[k] for k in generator.permutation(len(votes))], [], {})

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(of) for key, of in value.items()}
        if isinstance(value, list):
            return [rounded(of) for of in value]
        return round(value, 9) if isinstance(value, float) else value

    assert rounded(shuffled) == rounded(summary_of(votes, [], {}))


def test_swapped_models_have_the_other_rate(seed):
    votes = drawn(2, 12, 6, 4, np.random.default_rng(seed))
    (one,) = summary_of(votes, [], {})["questions"]["general"]["pairs"]
    swapped = [v._replace(models=v.models[::-1], outcome=1 - v.outcome, first_left=not v.first_left) for v in votes]
    found = summary_of(swapped, [], {})
    (other,) = found["questions"]["general"]["pairs"]
    assert other["win_rate"] == pytest.approx(1 - one["win_rate"])
    assert other["ci95"] == pytest.approx([1 - end for end in reversed(one["ci95"])])
    assert (other["wins"], other["losses"]) == (one["losses"], one["wins"])
    assert found["by_voter"] == summary_of(votes, [], {})["by_voter"]


def test_questions_and_groups_are_apart(seed):
    votes = drawn(2, 12, 6, 4, np.random.default_rng(seed))
    other = [v._replace(question="appeal", outcome=1 - v.outcome) for v in votes]
    second = [v._replace(group="late", comparison=v.comparison + 100, outcome=0.0) for v in votes]
    settings = {"questions": {"general": "A?", "appeal": "B?", "alignment": "C?"}, "votes": 4}
    questions = summary_of(votes + other + second, [], settings)["questions"]
    assert list(questions) == ["general", "appeal", "alignment"]
    run, late = questions["general"]["pairs"]
    assert (run["group"], late["group"], late["win_rate"]) == ("run", "late", 1.0)
    assert questions["appeal"]["pairs"][0]["by_votes"] == pytest.approx(1 - run["by_votes"])
    assert questions["alignment"] | {"text": ""} == {
        "text": "",
        "votes": 0,
        "alpha": None,
        "alpha_ci95": None,
        "pairs": [],
        "ranking": None,
        "tie_parameter": None,
        "ranking_note": None,
    }


def test_votes_on_a_question_that_settings_lack_are_shown():
    found = summary_of([*small(), vote(0, "Ann", 1, question="old")], [], SETTINGS)
    assert found["questions"]["old"]["votes"] == 1 and found["votes"] == 12


def test_a_session_without_votes():
    found = summary_of([], [], SETTINGS)
    assert found["votes"] == found["voters"] == found["complete"] == 0 and found["seconds_median"] is None
    assert found["wanted"] == 5 and found["by_voter"] == []
    assert "no votes yet" in as_text(found)
    assert picture_of(found).height > 50


def test_one_voter_is_said():
    votes = [v for v in small() if v.voter == "Ann"]
    found = summary_of(votes, [], SETTINGS)
    assert found["questions"]["general"]["pairs"][0]["note"] == ONE_VOTER
    assert ONE_VOTER in as_text(found).replace("\n  ", " ")


def test_the_summary_is_json(seed):
    found = summary_of(drawn(3, 6, 5, 3, np.random.default_rng(seed)), [Check("voter 0", "obvious", True, 1, 0)], {})
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_text_says_what_the_summary_says(seed):
    votes = drawn(3, 12, 6, 4, np.random.default_rng(seed))
    votes = [v._replace(category="people") for v in votes]
    found = summary_of(votes, [], {"questions": {"general": "Which?"}, "votes": 4}, {"voter 1": "clicks at random"})
    text = as_text(found)
    question = found["questions"]["general"]
    for pair in question["pairs"]:
        first, second = pair["models"]
        line = next(line for line in text.splitlines() if line.startswith(f"{second} against {first} "))
        rates = [pair["win_rate"], *pair["ci95"], pair["by_votes"], *pair["by_votes_ci95"]]
        assert re.findall(r"\d\.\d{3}", line) == [f"{rate:.3f}" for rate in rates]
        counts = [pair[key] for key in ("wins", "ties", "losses", "undecided", "votes")]
        assert line.split()[-5:] == list(map(str, counts))
    for row in question["ranking"]:
        assert any(line.startswith(row["model"]) and f"{row['strength']:+.2f} [" in line for line in text.splitlines())
    assert "  people (12)" in text and "voter 1 (clicks at random)" in text and "voter 1 (excluded)" in text
    assert max(map(len, text.splitlines())) <= 120


def test_names_cannot_write_to_the_terminal():
    evil = "\x1b[2J\u202eolicy"
    votes = [v._replace(models=("base", evil), voter=evil, category=evil, group=evil) for v in small()]
    votes += [v._replace(group="other", comparison=v.comparison + 50) for v in votes]
    text = as_text(summary_of(votes, [], {"questions": {"general": evil}}, {"nobody": evil}))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)


def marks(picture: Image.Image, colour: str) -> np.ndarray:
    """Where a colour is: bool [H, W]."""
    return (np.asarray(picture) == ImageColor.getrgb(colour)).all(-1)


def test_the_picture_shows_rates_and_intervals_where_they_are(seed, tmp_path):
    votes = drawn(2, 12, 6, 4, np.random.default_rng(seed))
    found = summary_of(votes, [], {})
    save_picture(found, tmp_path / "votes.png")
    picture = Image.open(tmp_path / "votes.png").convert("RGB")
    (pair,) = found["questions"]["general"]["pairs"]
    blue = marks(picture, COLOURS[0])
    blue[:60] = False  # the legend
    columns = np.flatnonzero(blue.any(0))
    x_of = lambda rate: LEFT + (RIGHT - LEFT) * rate
    assert columns.min() == pytest.approx(min(x_of(pair["ci95"][0]), x_of(pair["win_rate"]) - 5), abs=2)
    assert columns.max() == pytest.approx(max(x_of(pair["ci95"][1]), x_of(pair["win_rate"]) + 5), abs=2)
    thick = np.flatnonzero(blue.sum(0) >= 9)  # the dot and the ends
    assert np.abs(thick - x_of(pair["win_rate"])).min() <= 2
    assert not marks(picture, COLOURS[1]).any()  # two models have no strengths


def test_the_picture_shows_strengths_of_three_models(seed):
    found = summary_of(drawn(3, 12, 6, 4, np.random.default_rng(seed)), [], {})
    red = marks(picture_of(found), COLOURS[1])
    rows = np.flatnonzero(red.any(1))
    assert 1 + (np.diff(rows) > 5).sum() == 3  # a mark for each model
    dots = [
        np.flatnonzero(red[part].sum(0) >= 9).mean() for part in np.split(rows, np.flatnonzero(np.diff(rows) > 5) + 1)
    ]
    assert dots == sorted(dots, reverse=True)  # the strongest first


@pytest.mark.parametrize("name", ["模型", "نموذج", "a" * 300, "<b>&", "\x1b[31m\n", "🙂"])
def test_names_of_any_script_are_drawn(name):
    votes = [v._replace(models=(name, f"{name} 2"), group=name) for v in small()]
    assert picture_of(summary_of(votes, [], SETTINGS)).width == 1100
