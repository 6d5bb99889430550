"""People's votes in an evaluation's report and summary: beside the scorers', measured against them, and deciding."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast.checksums import write_signed_json
from dpo_fast.evaluate import main
from dpo_fast.evaluation import comparison, run_evaluation, sides
from dpo_fast.evaluation.people import People
from dpo_fast.evaluation.protocol_table import show_votes
from dpo_fast.evaluation.reopened import names_of, pairs_of, reopen
from dpo_fast.evaluation.sides import Side
from dpo_fast.evaluation.voted import people_of, refresh
from dpo_fast.scorers import Scorer
from dpo_fast.train import main as train
from dpo_fast.votes.records import Vote
from dpo_fast.votes.store import Comparison, VoteStore
from dpo_fast.votes.tally import summary_of
from tests.helpers.runs import flags_for
from tests.helpers.voters import QUESTIONS, session, vote

PROMPTS = 24


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.double().mean((1, 2, 3))


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -images.double().mean((1, 2, 3))


@pytest.fixture(autouse=True)
def own_scorers(monkeypatch):
    """Two scorers that know any prompt, of opposite opinions."""
    for module in (run_evaluation, sides):
        monkeypatch.setattr(module, "check_names", lambda names: None)
    score = {"bright": brightness, "dark": darkness}
    monkeypatch.setattr(comparison, "load_scorer", lambda name, device, **_: Scorer(score[name]))
    monkeypatch.setattr(comparison, "facts", lambda name, device, **_: {"scorer": name})
    monkeypatch.setattr(comparison, "provenance", lambda name, device, **_: {"dtype": "float64", "revisions": {}})


def prompts_in(folder: Path, number: int) -> list[str]:
    texts = [f"thing {'abcdefghijklmnopqrstuvwxyz'[k]}" for k in range(number)]
    (folder / "prompts.txt").write_text("\n".join(texts))
    return texts


def images_for(texts: list[str], folder: Path, level: int) -> Path:
    folder.mkdir()
    for text in texts:
        pixels = np.random.randint(0, 40, (16, 16, 3)) + level + np.random.randint(-20, 20)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{text}.png")
    return folder


@pytest.fixture
def evaluated(tmp_path):
    """An evaluation of two folders of images: the policy's are the brighter ones, nearly always."""

    def run(number: int = PROMPTS) -> Path:
        texts = prompts_in(tmp_path, number)
        policy, base = images_for(texts, tmp_path / "ours", 135), images_for(texts, tmp_path / "theirs", 100)
        argv = ["--policy", policy, "--baseline", base, "--prompts", tmp_path / "prompts.txt"]
        argv += ["--scorers", "dark", "bright", "--output_dir", tmp_path / "out"]
        assert main([str(word) for word in argv]) == 0
        return tmp_path / "out"

    return run


def begin(out: Path, file: Path, *, turned: bool = False, **options: object) -> Path:
    """A session on an evaluation's pairs. turned: the policy first, under other names."""
    pairs, names = pairs_of(out), names_of(out)
    order = -1 if turned else 1
    files = [files[::order] for files in zip(pairs.base.paths, pairs.policy.paths, strict=True)]
    rows = [
        Comparison("g", prompt, None, seed, names[::order], both)
        for prompt, seed, both in zip(pairs.prompts, pairs.seeds, files, strict=True)
    ]
    session(file, rows, **options)
    return file


def likes_bright(question: str, prompt: str, file: Path) -> float:
    """Bright images in general; dark ones by looks; by text no difference."""
    return {"general": 1.0, "appeal": -1.0, "alignment": 0.0}[question] * np.asarray(Image.open(file)).mean() / 3


def read(out: Path, name: str) -> str:
    return (out / name).read_text(encoding="utf-8")


def test_a_report_is_written_again_as_it_was(evaluated):
    out = evaluated()
    before = {name: read(out, name) for name in ("report.html", "summary.json")}
    assert show_votes(out / "votes.sqlite") == f"report: {out / 'report.html'}"  # nobody has voted
    assert {name: read(out, name) for name in before} == before
    begin(out, out / "votes.sqlite")
    assert show_votes(out / "votes.sqlite") == f"report: {out / 'report.html'}"  # a session without votes
    assert {name: read(out, name) for name in before} == before


def test_what_an_evaluation_says_of_its_policy_stays(evaluated):
    out = evaluated(3)
    own = {"run": {"seed": 1}, "step": 400, "strength": 0.5}
    summary = json.loads(read(out, "summary.json"))
    del summary["digest"]
    write_signed_json(out / "summary.json", summary | own)
    refresh(out)
    assert own.items() <= json.loads(read(out, "summary.json")).items()


def test_without_scorers_the_summary_says_what_else_was_measured(evaluated, tmp_path):
    out = evaluated(3)
    pairs, before = pairs_of(out), json.loads(read(out, "summary.json"))
    sides_ = SimpleNamespace(base=Side("theirs", tmp_path), policy=Side("ours", tmp_path))
    measured = {"implicit": {"accuracy": 0.75}, "step": 400}
    comparison.leave_unscored(sides_, pairs, out, measured)  # scored before: all that was said stays
    after = json.loads(read(out, "summary.json"))
    assert {name: after[name] for name in before if name != "digest"} == {
        name: value for name, value in before.items() if name != "digest"
    }
    assert measured.items() <= after.items()
    other = tmp_path / "unscored"
    other.mkdir()
    comparison.leave_unscored(sides_, pairs, other, measured)
    found = json.loads(read(other, "summary.json"))
    assert measured.items() <= found.items() and found["prompts"] == 3


@pytest.mark.parametrize("turned", [False, True])
def test_votes_stand_beside_the_scorers(evaluated, turned, capsys):
    out = evaluated()
    file = begin(out, out / "votes.sqlite", turned=turned)
    before = json.loads(read(out, "summary.json"))
    assert vote(file, {f"v{k}": likes_bright for k in range(5)}) == PROMPTS * 3 * 5
    show_votes(out / "votes.sqlite")
    found = json.loads(read(out, "summary.json"))
    people = found.pop("people")
    for name in ("notes", "verdict"):
        before.pop(name), found.pop(name)
    assert {k: v for k, v in found.items() if k != "digest"} == {k: v for k, v in before.items() if k != "digest"}

    assert people["decides"] and people["voters"] == 5 and people["votes"] == PROMPTS * 15
    assert "by_voter" not in people and "v0" not in read(out, "summary.json")  # names are the owner's
    (general,), (appeal,) = (people["questions"][name]["pairs"] for name in ("general", "appeal"))
    assert general["models"] == ["theirs", "ours"] and general["undecided"] == 0
    assert general["win_rate"] > 0.7 > 0.3 > appeal["win_rate"]

    # against an independent count: the majority of five by files, and who is brighter
    reopened = reopen(out)
    gain = reopened.scored.gain("bright")
    lead = {}
    for one in people_of(out, reopened.pairs).votes:
        if one.question == "general":
            lead.setdefault(one.prompt, []).append(one.outcome)
    rows = {prompt: row for row, prompt in enumerate(reopened.scored.prompts)}
    same = [(np.mean(lead[prompt]) < 0.5) == bool(gain[row] > 0) for prompt, row in rows.items() if gain[row] != 0]
    agreement = people["agreement"]
    assert agreement["bright"]["general"]["share"] == pytest.approx(np.mean(same))
    assert agreement["bright"]["general"]["pairs"] == len(same)
    for question in QUESTIONS:  # of opposite scorers one agrees where the other does not
        assert agreement["dark"][question]["share"] == pytest.approx(1 - agreement["bright"][question]["share"])
    low, high = agreement["bright"]["general"]["ci95"]
    assert 0.5 < low < agreement["bright"]["general"]["share"] <= high

    page = read(out, "report.html")
    assert "People&#x27;s votes" in page or "People's votes" in page
    assert f"{general['win_rate']:.1%}</strong> of pairs won by the policy in people" in page


def test_people_decide_once_enough_prompts_have_their_votes(evaluated, capsys):
    out = evaluated()
    file = begin(out, out / "votes.sqlite", questions={"general": "Which?"})
    vote(file, {f"v{k}": likes_bright for k in range(4)})  # four of five on all prompts
    show_votes(out / "votes.sqlite")
    first = json.loads(read(out, "summary.json"))
    assert first["verdict"]["scorer"] == "dark" and first["verdict"]["outcome"] == "worse"
    assert not first["people"]["decides"]
    assert any(
        line.startswith("0 prompts have all 5 votes on general: people decide once 20") for line in first["notes"]
    )
    vote(file, {f"v{k}": likes_bright for k in range(5)})
    argv = ["--policy", out.parent / "ours", "--baseline", out.parent / "theirs", "--scorers", "dark", "bright"]
    argv += ["--prompts", out.parent / "prompts.txt", "--output_dir", out]
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0  # the evaluation itself shows them, too
    said, second = capsys.readouterr().out, json.loads(read(out, "summary.json"))
    verdict = second["verdict"]
    assert (verdict["scorer"], verdict["outcome"], verdict["p_holm"]) == ("people", "better", None)
    assert "dark" in verdict["costs"]  # a scorer that lost is a cost of what people prefer
    assert verdict["sentence"].startswith("better, as people decide (general: 120 votes by 5 voters on 24 prompts)")
    assert "agrees with people" in said and " ".join(verdict["sentence"].split()) in " ".join(said.split())


def test_votes_on_the_evaluation_that_ended_a_run(sd15_path, pairs, tmp_path):
    prompts_in(tmp_path, 3)
    flags = flags_for(sd15_path, pairs, tmp_path / "run", "--sampling_steps", 1, "--eval_scorers", "bright")
    flags += ["--learning_rate", "1e-2", "--checkpointing_steps", "2"]
    assert train([*flags, "--eval_prompts", str(tmp_path / "prompts.txt")]) == 0
    run, home = tmp_path / "run", tmp_path / "run" / "evaluation"
    before = {name: read(run, name) for name in ("report.html", "summary.json")}
    assert show_votes(run / "votes.sqlite") == show_votes(home / "votes.sqlite") == f"report: {run / 'report.html'}"
    assert {name: read(run, name) for name in before} == before
    vote(begin(home, run / "votes.sqlite", votes=1), {"v": lambda *_: 0.0})
    show_votes(run / "votes.sqlite")
    after = json.loads(read(run, "summary.json"))
    assert after["people"]["votes"] == 9 and after["steps"] == json.loads(before["summary.json"])["steps"]
    assert "agree" in read(run, "report.html") and "people" not in json.loads(before["summary.json"])
    file = (run / "votes.sqlite").rename(home / "votes.sqlite")  # as if the inner folder had been named
    further = ["--resume_from_checkpoint", "latest", "--max_train_steps", "6", "--checkpointing_steps", "2"]
    assert train([*flags, "--eval_prompts", str(tmp_path / "prompts.txt"), *further]) == 0
    assert "people" not in json.loads(read(run, "summary.json"))  # they were on the images of the earlier result
    assert file.is_file()


def test_one_voter_does_not_decide_and_a_note_says_why(evaluated):
    out = evaluated()
    vote(begin(out, out / "votes.sqlite", questions={"general": "Which?"}, votes=1), {"v": likes_bright})
    show_votes(out / "votes.sqlite")
    found = json.loads(read(out, "summary.json"))
    assert not found["people"]["decides"] and found["verdict"]["scorer"] == "dark"
    (note,) = (line for line in found["notes"] if line.startswith("people on general: "))
    assert "voter" in note and note in read(out, "report.html")
    assert any("by 2 voters or more" in line for line in found["notes"])


def test_a_prompt_is_complete_once_all_its_seeds_are():
    votes = [
        Vote("g", "general", place, prompt, None, 0, ("base", "policy"), 1.0, f"v{voter}", True, 1.0, 1.0)
        for place, prompt in ((0, "a"), (4, "b"))
        for voter in range(2)
    ]
    asked = {0: "a", 1: "a", 2: "a", 3: "a", 4: "b"}  # of a one of four pictures has its votes, of b its only one
    people = People(votes, {place: place for place in asked}, {"general": "Which?"}, 2, asked)
    assert people.opinions["general"].prompts == 1


def test_pairs_that_are_no_longer_shown_are_asked_as_long_as_they_have_votes(evaluated):
    out = evaluated(4)
    file = begin(out, out / "votes.sqlite", questions={"general": "Which?"}, votes=1)
    vote(file, {"v": likes_bright})
    with VoteStore.open(file) as store, store.transaction():
        store.connection.execute("UPDATE comparisons SET live = 0 WHERE id > 1")
    people = people_of(out, pairs_of(out))
    said = people.opinions["general"]
    assert (said.comparisons, said.prompts, len(people.asked)) == (4, 4, 4)


def test_votes_on_images_that_have_changed_do_not_count(evaluated, tmp_path, caplog):
    out = evaluated(4)
    vote(begin(out, out / "votes.sqlite", votes=1), {"v": likes_bright})
    pairs = pairs_of(out)
    assert len(people_of(out, pairs).votes) == 12
    Image.new("RGB", (16, 16)).save(tmp_path / "ours" / "thing b.png")
    found = people_of(out, pairs)
    assert {one.prompt for one in found.votes} == {"thing a", "thing c", "thing d"} and len(found.asked) == 3
    assert "votes on 1 pairs do not count, as their images have changed since" in caplog.text


def test_votes_of_other_images_do_not_count(evaluated, tmp_path):
    out = evaluated(3)
    texts = [f"thing {letter}" for letter in "abc"]
    others = images_for(texts, tmp_path / "others", 50)
    rows = [
        Comparison(
            "g", text, None, None, ("ours", "others"), (tmp_path / "ours" / f"{text}.png", others / f"{text}.png")
        )
        for text in texts
    ]
    session(out / "votes.sqlite", rows, votes=1)
    vote(out / "votes.sqlite", {"v": likes_bright})
    assert people_of(out, pairs_of(out)) is None


def test_the_summary_is_that_of_the_tally(evaluated):
    out = evaluated(4)
    vote(begin(out, out / "votes.sqlite", votes=3), {f"v{k}": likes_bright for k in range(3)}, most=7)
    people = people_of(out, pairs_of(out))
    expected = summary_of(people.votes, [], {"questions": QUESTIONS, "votes": 3, "comparisons": 4})
    assert all(isinstance(one, Vote) for one in people.votes) and len(people.votes) == 21
    assert people.summary == {key: value for key, value in expected.items() if key != "by_voter"}
