"""The file of votes: what is written is read, and what is no such file is refused in one line."""

import os
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest

from dpo_fast.errors import BadInput
from dpo_fast.votes.records import Check, Vote
from dpo_fast.votes.store import APPLICATION, Comparison, ImageFile, VoteStore, token_digest
from tests.helpers.vote_sessions import QUESTIONS, store_of


def add(
    store: VoteStore, comparison: int, choice: str | None, *, voter: int = 1, place: int, kind=None, left=1
) -> None:
    seconds, at = (None, None) if choice is None else (1.5, 100.0 + place)
    store.connection.execute(
        "INSERT INTO showings VALUES (?, ?, ?, 'general', ?, ?, ?, ?, 'l', 'r', ?, ?, ?)",
        [f"{voter}-{place}", voter, place, comparison, kind, kind and 1, left, choice, seconds, at],
    )


def add_voter(store: VoteStore, name: str, excluded: str | None = None) -> None:
    values = [name, token_digest(name), excluded]
    store.connection.execute("INSERT INTO voters (name, token, since, excluded) VALUES (?, ?, 0, ?)", values)


def test_votes_are_read_as_they_were_meant(tmp_path):
    with store_of(tmp_path / "votes.sqlite", 4) as store:
        with store.transaction():
            add_voter(store, "ann")
            add_voter(store, "bob", "asleep")
            for place, (choice, left) in enumerate([("left", 1), ("left", 0), ("tie", 1), ("right", 0)]):
                add(store, place + 1, choice, place=place, left=left)
            add(store, 1, "right", voter=2, place=9)
            add(store, 2, None, voter=2, place=10)
            add(store, 1, "tie", place=11, kind="identical")
            add(store, 1, "right", place=12, kind="obvious", left=0)
            add(store, 1, "right", place=13, kind="obvious", left=1)
    with VoteStore.read(tmp_path / "votes.sqlite") as store:
        votes = store.votes()
        assert [vote.outcome for vote in votes] == [1.0, 0.0, 0.5, 1.0]
        assert votes[1] == Vote("set", "general", 2, "prompt 1", "People", 1, ("base", "policy"), 0.0, "ann", False,
                                1.5, 101.0)  # fmt: skip
        assert [vote.voter for vote in store.votes(excluded=True)] == ["ann"] * 4 + ["bob"]
        assert store.excluded() == {"bob": "asleep"} and store.voters() == ["ann", "bob"]
        assert store.checks() == [
            Check("ann", "identical", True, 1.5, 111.0),
            Check("ann", "obvious", True, 1.5, 112.0),
            Check("ann", "obvious", False, 1.5, 113.0),
        ]
        settings = store.settings()
        assert settings["votes"] == 5 and settings["questions"] == QUESTIONS and settings["comparisons"] == 4
        assert settings["models"] == ["base", "policy"] and settings["groups"] == {"set": "folder"}
        assert store.files()[2] == (tmp_path / "1-a.png", tmp_path / "1-b.png")


def test_no_voter_votes_twice_on_a_comparison(tmp_path):
    with store_of(tmp_path / "votes.sqlite", 1) as store:
        add_voter(store, "ann")
        add(store, 1, "left", place=0)
        with pytest.raises(sqlite3.IntegrityError):
            add(store, 1, "left", place=1)


def test_it_is_flushed_private_and_keeps_no_token(tmp_path):
    path = tmp_path / "votes.sqlite"
    with store_of(path, 1) as store:
        assert store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert store.connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
        add_voter(store, "a-secret-token")  # whose token is its name here
        store.connection.execute("UPDATE voters SET name = 'ann'")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"a-secret-token" not in path.read_bytes()


def test_paths_move_with_the_folder(tmp_path):
    with store_of(tmp_path / "here" / "votes.sqlite", 1) as store:
        assert store.connection.execute("SELECT path FROM images").fetchone() == ("0-a.png",)
    shutil.move(tmp_path / "here", tmp_path / "there")
    with VoteStore.read(tmp_path / "there" / "votes.sqlite") as store:
        assert store.files()[1][0] == tmp_path / "there" / "0-a.png"


def test_comparisons_come_and_go_and_votes_stay(tmp_path):
    path = tmp_path / "votes.sqlite"
    with store_of(path, 3) as store:
        add_voter(store, "ann")
        add(store, 1, "left", place=0)
        old = [(row.prompt, row.id) for row in store.comparisons()]
        files = (tmp_path / "1-a.png", tmp_path / "1-b.png")
        new = tmp_path / "new.png"
        rows = [Comparison("set", "prompt 1", None, 1, ("base", "policy"), files),
                Comparison("set", "prompt 1", None, 2**64 - 1, ("base", "other"), (files[0], new))]  # fmt: skip
        images = {file: ImageFile(10, "0" * 32) for file in (*files, new)}
        with store.transaction():
            assert store.set_comparisons({"set": "folder"}, rows, images) == (1, 2)
        assert next((row.prompt, row.id) for row in store.comparisons()) == old[1]
        assert len(store.comparisons()) == 2 and len(store.votes()) == 1
        assert store.settings()["comparisons"] == 2


def test_the_order_of_the_two_models_makes_no_other_comparison(tmp_path):
    with store_of(tmp_path / "votes.sqlite", 2) as store:
        add_voter(store, "ann")
        add(store, 1, "left", place=0)
        before = store.comparisons()
        rows = [
            Comparison("set", f"prompt {k}", None, k, ("policy", "base"),
                       (tmp_path / f"{k}-b.png", tmp_path / f"{k}-a.png")) for k in range(2)
        ]  # fmt: skip
        with store.transaction():
            images = {file: ImageFile(10, "0" * 32) for row in rows for file in row.files}
            assert store.set_comparisons({"set": "folder"}, rows, images) == (0, 0)
        assert store.comparisons() == before and store.votes()[0].outcome == 1.0


def test_an_image_that_changed_after_votes_is_refused(tmp_path):
    with store_of(tmp_path / "votes.sqlite", 2) as store:
        add_voter(store, "ann")
        add(store, 1, "left", place=0)
        rows = [Comparison("set", f"prompt {k}", None, k, ("base", "policy"),
                           (tmp_path / f"{k}-a.png", tmp_path / f"{k}-b.png")) for k in range(2)]  # fmt: skip
        images = {file: ImageFile(10, "0" * 32) for row in rows for file in row.files}
        with store.transaction():  # nobody has voted on this one
            store.set_comparisons({"set": "folder"}, rows, images | {rows[1].files[0]: ImageFile(11, "1" * 32)})
        with pytest.raises(BadInput, match=r"0-a\.png has changed since people voted on it"):
            store.set_comparisons({"set": "folder"}, rows, images | {rows[0].files[0]: ImageFile(11, "1" * 32)})


def test_a_changed_image_is_refused_however_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with store_of(tmp_path / "votes.sqlite", 1) as store:
        add_voter(store, "ann")
        add(store, 1, "left", place=0)
        files = (Path("../0-a.png"), Path("../0-b.png"))
        rows = [Comparison("set", "prompt 0", None, 0, ("base", "policy"), files)]
        with store.transaction():
            assert store.set_comparisons(
                {"set": "folder"}, rows, {file: ImageFile(10, "0" * 32) for file in files}
            ) == (0, 0)
        with pytest.raises(BadInput, match=r"0-a\.png has changed since people voted on it"):
            store.set_comparisons({"set": "folder"}, rows, {file: ImageFile(11, "1" * 32) for file in files})


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE votes (x)")


def with_trigger(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON voters BEGIN DELETE FROM voters; END")


def with_view(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE voters RENAME TO hidden")
        connection.execute("CREATE VIEW voters AS SELECT * FROM hidden")


def other_type(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE comparisons SET prompt = x'00ff'")


def no_number(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE comparisons SET seed = 'seven'")


def no_json(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE settings SET value = '{'")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (newer, "was written by a newer dpo_fast"),
        (foreign, "is no file of votes"),
        (with_trigger, "has other tables"),
        (with_view, "has other tables"),
        (other_type, "is damaged"),
        (no_number, "cannot be read as a file of votes"),
        (no_json, "cannot be read as a file of votes"),
        (cut, "damaged|cannot be read as a file of votes"),
        (lambda path: path.write_bytes(b"\x89PNG" * 1000), "cannot be read as a file of votes"),
        (lambda path: path.write_bytes(b""), "is no file of votes"),
        (Path.unlink, "does not exist"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, spoil, said):
    path = tmp_path / "votes.sqlite"
    with store_of(path, 20) as store:
        add_voter(store, "ann")
        add(store, 1, "left", place=0)
    spoil(path)
    for opening in (VoteStore.open, VoteStore.read):
        with pytest.raises(BadInput, match=said) as caught, opening(path) as store:
            store.settings()
            store.votes()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("votes", '"x"'), ("votes", "0"), ("votes", "null"), ("votes", "true"), ("votes", "1e999"), ("created", "[]"),
        ("_folders", "5"), ("_folders", "[1]"), ("_owner", "1"), ("_owner", '"no"'), ("_invitations", '{"a": 1}'),
        ("_invitations", '["x"]'), ("_secret", "[]"), ("_against", "1"), ("_max_comparisons", '"x"'),
        ("_image_size", "{}"), ("_checks", "-1"), ("_checks", "1"), ("_max_votes", "[]"), ("_owner", "{"),
        ("_folders", "[" * 100_000),
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused(tmp_path, name, value):
    path = tmp_path / "votes.sqlite"
    with store_of(path, 1) as store:
        store.connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", [name, value])
    for opening in (VoteStore.open, VoteStore.read):
        with pytest.raises(BadInput, match=rf"is damaged \(its setting {name}\)|cannot be read as a file of votes"):
            opening(path)


def test_nothing_is_left_of_a_file_that_could_not_be_created(tmp_path):
    with pytest.raises(TypeError):
        VoteStore.create(tmp_path / "votes.sqlite", {"votes": object()}, QUESTIONS)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("votes")]


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path):
    path = tmp_path / "kept" / "votes.sqlite"
    with store_of(path, 2):
        pass
    path.parent.chmod(0o500)
    try:
        with VoteStore.read(path) as store:
            assert len(store.comparisons()) == 2
    finally:
        path.parent.chmod(0o700)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes into any folder")
def test_votes_that_are_not_in_the_file_itself_are_not_left_out(tmp_path):
    log = _with_log(tmp_path)
    log.parent.chmod(0o500)
    try:
        with pytest.raises(BadInput, match=r"without votes\.sqlite-wal.*copy both"):
            VoteStore.read(tmp_path / "kept" / "votes.sqlite")
    finally:
        log.parent.chmod(0o700)


def test_a_log_with_votes_is_named(tmp_path, monkeypatch):
    path = _with_log(tmp_path).with_name("votes.sqlite")
    checked = VoteStore._checked.__func__

    def unwritable(cls, path, mode):
        if mode == "ro":
            raise sqlite3.OperationalError("unable to open database file")
        return checked(cls, path, mode)

    monkeypatch.setattr(VoteStore, "_checked", classmethod(unwritable))
    with pytest.raises(BadInput, match=r"without votes\.sqlite-wal.*copy both"):
        VoteStore.read(path)
    path.with_name("votes.sqlite-wal").write_bytes(b"")
    VoteStore.read(path).close()


def _with_log(home: Path) -> Path:
    """A copy of a file of votes, and of its log, while it is written."""
    (home / "kept").mkdir()
    with store_of(home / "votes.sqlite", 2):
        for name in ("votes.sqlite", "votes.sqlite-wal"):
            shutil.copy(home / name, home / "kept" / name)
    log = home / "kept" / "votes.sqlite-wal"
    assert log.stat().st_size
    shutil.copy(home / "votes.sqlite", log.parent)  # the file alone is whole as well
    return log


def test_the_application_is_noted(tmp_path):
    path = tmp_path / "votes.sqlite"
    with store_of(path, 1):
        pass
    assert path.read_bytes()[68:72] == APPLICATION.to_bytes(4, "big")
