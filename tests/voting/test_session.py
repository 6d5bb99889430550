"""A session begins, goes on, grows, and refuses what it cannot hold."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_fast.errors import BadInput
from dpo_fast.voting.options import VoteConfig, parse, questions_of
from dpo_fast.voting.session import open_session, votes_file_of
from tests.helpers.vote_sessions import image_folder
from tests.voting.test_folders import evaluated

PROMPTS = ["a red fox", "a blue bird", "a green frog", "a grey owl"]


@pytest.fixture
def config(tmp_path) -> VoteConfig:
    folders = tuple(image_folder(tmp_path / name, PROMPTS, seed=k) for k, name in enumerate(("one", "two")))
    return VoteConfig(folders=folders, votes_file=tmp_path / "votes.sqlite", questions=("general",), checks=3)


def begin(config: VoteConfig, votes: int = 0) -> dict:
    """Open the session, cast so many votes of one voter, close it; return its settings."""
    session = open_session(config)
    try:
        desk = session.desk
        with session.store.transaction():
            names = session.store.voters()
            token = desk.new_token("ann") if "ann" in names else desk.add_voter("ann")
            voter = desk.voter_of(token)
            for _ in range(votes):
                desk.vote(voter, desk.screen(voter).showings[0].id, "left")
        kept = len(session.store.votes()) + len(session.store.checks())
        return {**session.store.settings(), "answers": kept, "broken": len(session.gallery.broken)}
    finally:
        session.close()


def said(capsys) -> str:
    return capsys.readouterr().err.replace("dpo_fast: ", "")


def test_the_same_command_and_the_file_alone_go_on(config, capsys):
    assert begin(config, votes=2)["answers"] == 2
    said(capsys)
    for again in (config, VoteConfig(votes_file=config.votes_file)):
        settings = begin(again, votes=1)
        assert settings["comparisons"] == 4 and list(settings["questions"]) == ["general"] and settings["votes"] == 5
        assert "added" not in said(capsys)
    assert settings["answers"] == 4


def test_the_order_of_folders_does_not_matter(config, capsys):
    begin(config, votes=2)
    said(capsys)
    session = open_session(replace(config, folders=config.folders[::-1]))
    assert session.store.settings()["comparisons"] == 4 and "pairs" not in said(capsys)
    assert len(session.desk._ruined) == 4  # checks have ruined copies as before
    session.close()


def test_a_folder_with_its_file_of_votes_can_be_moved(config, capsys, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tmp_path / name, tmp_path / "here" / name)
    folders = tuple(tmp_path / "here" / name for name in ("one", "two"))
    begin(replace(config, folders=folders, votes_file=tmp_path / "here" / "votes.sqlite"), votes=2)
    shutil.move(tmp_path / "here", tmp_path / "there")
    said(capsys)
    settings = begin(VoteConfig(votes_file=tmp_path / "there" / "votes.sqlite"))
    assert settings["comparisons"] == 4 and settings["answers"] == 2
    folders = tuple(tmp_path / "there" / name for name in ("one", "two"))
    begin(replace(config, folders=folders, votes_file=tmp_path / "there" / "votes.sqlite"))
    assert not re.search("added|no longer", said(capsys))


def test_an_evaluation_can_be_renamed(capsys, tmp_path):
    before = begin(VoteConfig(folders=(evaluated(tmp_path / "before"),), checks=0), votes=1)
    shutil.move(tmp_path / "before", tmp_path / "after")
    said(capsys)
    after = begin(VoteConfig(votes_file=tmp_path / "after" / "votes.sqlite"))
    assert (after["comparisons"], after["answers"]) == (before["comparisons"], 1)
    assert not re.search("added|no longer", said(capsys)) and list(after["groups"]) == ["before"]


def test_folders_behind_a_link_go_on(config, capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    linked = replace(config, folders=tuple(tmp_path / "link" / name for name in ("one", "two")))
    begin(linked, votes=2)
    said(capsys)
    for again in (linked, VoteConfig(votes_file=config.votes_file)):
        settings = begin(again)
        assert settings["comparisons"] == 4 and settings["answers"] == 2
    assert not re.search("added|no longer", said(capsys))


def test_the_file_alone_goes_on_with_its_checks_and_its_most_votes(config):
    begin(replace(config, checks=0, max_votes=7))
    for change, expected in (({}, (0, 7)), ({"checks": 4}, (4, 7)), ({"max_votes": 9}, (4, 9)), ({}, (4, 9))):
        session = open_session(replace(VoteConfig(votes_file=config.votes_file), **change))
        assert (session.desk._every, session.desk._most) == expected
        session.close()
    session = open_session(replace(config, checks=None, votes_file=config.votes_file.with_name("new.sqlite")))
    assert (session.desk._every, session.desk._most) == (20, None)
    session.close()


def test_what_can_be_added_is_added_and_said(config, capsys, tmp_path):
    begin(config, votes=2)
    three = image_folder(tmp_path / "three", PROMPTS[:2], seed=3)
    more = replace(config, folders=(*config.folders, three), questions=("general", "appeal"), votes=7)
    settings = begin(more)
    assert settings["votes"] == 7 and list(settings["questions"]) == ["general", "appeal"]
    assert settings["comparisons"] == 8 and settings["answers"] == 2
    text = said(capsys)
    for line in ("7 votes are wanted of each pair and question now (5 before)", f"added to the session: {three}",
                 "added questions: appeal", "added 4 pairs of images"):  # fmt: skip
        assert line in text
    fewer = replace(more, max_comparisons=2)
    assert begin(fewer)["comparisons"] == 2 and "6 pairs of images are no longer shown" in said(capsys)
    assert begin(VoteConfig(votes_file=config.votes_file))["comparisons"] == 2  # what was asked stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, folders=c.folders[1:]), "holds votes on .*one, which is not named"),
        (lambda c: replace(c, questions=("appeal",)), "--questions leaves out general"),
        (lambda c: replace(c, against="four"), "--against four is none of the models: one, two"),
    ],
)
def test_another_session_is_refused(config, change, message):
    begin(config, votes=1)
    with pytest.raises(BadInput, match=message):
        open_session(change(config))
    assert begin(config)["answers"] == 1


def test_a_folder_that_is_gone_is_named(config):
    begin(config, votes=1)
    shutil.rmtree(config.folders[0])
    with pytest.raises(BadInput, match=r"holds votes on .*one, which is no folder any more"):
        open_session(VoteConfig(votes_file=config.votes_file))


def test_a_changed_image_is_noticed(config):
    begin(config, votes=4)
    for folder in config.folders:
        shutil.rmtree(folder)
        image_folder(folder, PROMPTS, seed=99)
    with pytest.raises(BadInput, match="has changed since people voted on it"):
        open_session(config)


@pytest.mark.parametrize("away", ["", "../"])
def test_folders_are_named_from_the_current_one(config, tmp_path, monkeypatch, away):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if away else tmp_path)
    config = replace(config, folders=tuple(Path(away + name) for name in ("one", "two")))
    session = open_session(config)
    with session.store.transaction():
        voter = session.desk.voter_of(session.desk.add_voter("bob"))
        for showing in session.desk.screen(voter).showings:
            for of in (session.desk.image_of(voter, key) for key in showing.keys):
                assert session.gallery.response(session.images[of.image], of.ruined)
    session.close()
    assert begin(config, votes=4)["comparisons"] == 4
    monkeypatch.chdir(tmp_path.parent)
    absolute = replace(config, folders=(tmp_path / "one", tmp_path / "two"))
    assert begin(absolute)["comparisons"] == 4
    monkeypatch.chdir(tmp_path / "elsewhere" if away else tmp_path)
    shutil.rmtree(tmp_path / "one")
    image_folder(tmp_path / "one", PROMPTS, seed=99)
    for _ in range(2):  # what was refused is not taken for what was voted on
        with pytest.raises(BadInput, match="has changed since people voted on it"):
            open_session(config)


def test_broken_images_are_named_with_a_count(config, capsys):
    (config.folders[0] / "a red fox.png").write_bytes(b"nothing")
    settings = begin(config)
    assert settings["comparisons"] == 3 and settings["broken"] == 1
    text = said(capsys)
    assert "a red fox.png cannot identify" in text
    assert "1 images do not open: 1 of 4 pairs are left out" in text
    for file in config.folders[0].iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="no pair of images is left"):
        open_session(replace(config, votes_file=config.votes_file.with_name("other.sqlite")))
    assert not config.votes_file.with_name("other.sqlite").exists()


def test_a_file_is_used_by_one_server(config):
    session = open_session(config)
    with pytest.raises(BadInput, match=r"votes\.sqlite is being written by process \d+ on .*: end that first"):
        open_session(config)
    session.close()
    open_session(config).close()


def test_the_place_of_the_file(tmp_path, config):
    home = evaluated(tmp_path / "eval")
    assert votes_file_of(VoteConfig(folders=(home,))) == home / "votes.sqlite"
    assert str(votes_file_of(VoteConfig(folders=(home, config.folders[0])))) == "votes.sqlite"
    assert votes_file_of(config) == config.votes_file
    with pytest.raises(BadInput, match="is a folder: name a file in it"):
        open_session(replace(config, votes_file=tmp_path))
    other = tmp_path / "notes.sqlite"
    other.write_text("mine")
    with pytest.raises(BadInput, match="cannot be read as a file of votes"):
        open_session(replace(config, votes_file=other))
    assert other.read_text() == "mine"


def test_no_checks_no_ruined_copies(config):
    session = open_session(replace(config, checks=0))
    assert not any(ruined for _, ruined in session.gallery.images)
    session.close()
    session = open_session(config)
    assert sum(ruined for _, ruined in session.gallery.images) == 4
    session.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is named"),
        (["--votes_file", "none.sqlite"], "none.sqlite does not exist"),
        (["nowhere"], "nowhere is no folder"),
        ([".", "--votes", "0"], r"--votes \(0\) must be from 1 to 1000"),
        ([".", "--max_votes", "0"], r"--max_votes \(0\)"),
        ([".", "--max_comparisons", "-1"], r"--max_comparisons \(-1\)"),
        ([".", "--port", "99999"], r"--port \(99999\)"),
        ([".", "--image_size", "5"], r"--image_size \(5\) must be from 64 to 2048"),
        ([".", "--delay", "nan"], r"--delay \(nan\)"),
        ([".", "--checks", "1"], r"--checks \(1\) must be 0, for none, or from 2"),
        ([".", "--questions", "generl"], "'generl' is none of general, appeal, alignment"),
        ([".", "--questions", "general", "general"], "names general twice"),
        ([".", "--questions", "Which one? " * 40], "a question is one line of at most 200"),
        ([".", "--voters", "ann", " ann "], "names ann twice"),
        ([".", "--voters", "a\x07"], "A voter's name has 1 to 60 characters"),
        ([".", "--host", "example.org"], "--host example.org is no address"),
        ([".", "--public_url", "votes.example.org"], "must be like https://votes.example.org"),
        ([".", "--public_url", "https://example.org/votes"], "without a path"),
        ([".", "--public_url", "https://u:p@example.org"], "must be like"),
        ([".", "--voter", "ann"], "did you mean --voters"),
    ],
)
def test_bad_flags_are_refused_in_one_line(words, message):
    with pytest.raises(BadInput, match=message) as caught:
        parse(words)
    assert "\n" not in str(caught.value)


def test_own_questions():
    config = parse([".", "--questions", "general", "Which fox is  more of a fox?"])
    assert questions_of(config.questions) == {
        "general": "Which image do you prefer?",
        "which-fox-is-more-of-a-fox": "Which fox is more of a fox?",
    }
    for text in ("哪张图片更好\uff1f", "どちらが好きですか?"):
        assert list(questions_of((text,)).values()) == [text]
