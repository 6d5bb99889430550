"""The store of people's votes: one SQLite file with the comparisons, the voters, what each was shown and answered.

The file is in WAL mode and every commit is flushed (`synchronous=FULL`), so that an acknowledged vote survives a killed
process and a power failure. Tokens are kept as SHA-256 only. Images are not in the file: their paths are, relative to
the file where they lie below its folder, with size and digest.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dpo_fast.errors import BadInput, one_line
from dpo_fast.files import exists, regular_file
from dpo_fast.votes.records import Check, Vote

APPLICATION = 0x64706F76  # "dpov"
VERSION = 1  # of the schema
BUSY_SECONDS = 10.0
CHOICES = ("left", "right", "tie")
KINDS = ("identical", "obvious")  # of checks
SCHEMA = (
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE sets (name TEXT PRIMARY KEY, folder TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE questions (id TEXT PRIMARY KEY, place INTEGER NOT NULL, text TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE images (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER, digest TEXT)",
    """CREATE TABLE comparisons (
        id INTEGER PRIMARY KEY, in_set TEXT NOT NULL REFERENCES sets, prompt TEXT NOT NULL, category TEXT, seed TEXT,
        first_model TEXT NOT NULL, second_model TEXT NOT NULL,
        first_image INTEGER NOT NULL REFERENCES images, second_image INTEGER NOT NULL REFERENCES images,
        live INTEGER NOT NULL, UNIQUE (in_set, prompt, first_image, second_image))""",
    """CREATE TABLE voters (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token BLOB NOT NULL UNIQUE, since REAL NOT NULL,
        excluded TEXT)""",
    """CREATE TABLE showings (
        id TEXT PRIMARY KEY, voter INTEGER NOT NULL REFERENCES voters, place INTEGER NOT NULL,
        question TEXT NOT NULL REFERENCES questions, comparison INTEGER NOT NULL REFERENCES comparisons,
        kind TEXT CHECK (kind IN ('identical', 'obvious')), side INTEGER CHECK (side IN (0, 1)),
        first_left INTEGER NOT NULL CHECK (first_left IN (0, 1)), left_key TEXT NOT NULL, right_key TEXT NOT NULL,
        choice TEXT CHECK (choice IN ('left', 'right', 'tie')), seconds REAL, at REAL,
        UNIQUE (voter, place), CHECK ((choice IS NULL) = (at IS NULL) AND (choice IS NULL) = (seconds IS NULL))
        ) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX once ON showings (voter, question, comparison) WHERE kind IS NULL",
)


class Comparison(NamedTuple):
    """Two images of one prompt by two models."""

    group: str
    prompt: str
    category: str | None
    seed: int | None
    models: tuple[str, str]
    files: tuple[Path, Path]


class Row(NamedTuple):
    """A comparison as the store keeps it."""

    id: int
    group: str
    prompt: str
    models: tuple[str, str]
    images: tuple[int, int]  # ids


class ImageFile(NamedTuple):
    """A file as it was when it was read."""

    size: int  # bytes
    digest: str

    @classmethod
    def of(cls, data: bytes) -> "ImageFile":
        """What a file with these bytes is recorded as."""
        return cls(len(data), hashlib.blake2b(data, digest_size=16).hexdigest())


class VoteStore:
    """An open file of votes, as a context manager.

    Whoever writes has opened it with `create` or `open` and holds the file (`locks.hold_file`); `read` opens it for
    reading only, also while another process writes. All raise BadInput for a file that is no store of votes, is
    damaged, or is of a newer version.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self.connection = path, connection

    # ---- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, settings: Mapping[str, object], questions: Mapping[str, str]) -> "VoteStore":
        """Create the file, readable by its owner only. questions: id -> text, in their order. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        store = None
        try:
            store = cls._opened(path, "rw")
            store.connection.execute("PRAGMA journal_mode=WAL")
            with store.transaction():
                for statement in SCHEMA:
                    store.connection.execute(statement)
                store.put(**{"created": time.time(), **settings})
                store.add_questions(questions)
                store.connection.execute(f"PRAGMA application_id={APPLICATION}")
                store.connection.execute(f"PRAGMA user_version={VERSION}")
        except BaseException:
            if store is not None:
                store.close()
            with suppress(OSError):
                path.unlink()
            raise
        return store

    @classmethod
    def open(cls, path: Path) -> "VoteStore":
        """Open an existing file to go on with it."""
        return cls._checked(path, "rw")

    @classmethod
    def read(cls, path: Path) -> "VoteStore":
        """Open an existing file for reading."""
        try:
            return cls._checked(path, "ro")
        except sqlite3.OperationalError:  # a folder that cannot be written
            log = path.with_name(path.name + "-wal")
            if exists(log) and log.stat().st_size:  # it holds votes that SQLite cannot read there
                raise BadInput(
                    f"{path} cannot be read without {log.name}, in a folder that cannot be written: copy both to one"
                    " that can"
                ) from None
            with _refused(path):
                return cls._checked(path, "ro&immutable=1")

    @classmethod
    def _opened(cls, path: Path, mode: str) -> "VoteStore":
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        # one thread at a time uses it, not always the one that opened it
        connection = sqlite3.connect(uri, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
        for pragma in ("foreign_keys=ON", "synchronous=FULL", "trusted_schema=OFF", "cell_size_check=ON"):
            connection.execute(f"PRAGMA {pragma}")
        return cls(path, connection)

    @classmethod
    def _checked(cls, path: Path, mode: str) -> "VoteStore":
        if not exists(path):
            raise BadInput(f"{path} does not exist: name the file of votes that dpo_fast.vote wrote")
        regular_file(path)
        with _refused(path, reading=mode == "ro"):
            store = cls._opened(path, mode)
            try:
                store._check()
            except BaseException:
                store.close()
                raise
        return store

    def _check(self) -> None:
        application, version = (self._value(f"PRAGMA {name}") for name in ("application_id", "user_version"))
        if application != APPLICATION:
            raise BadInput(f"{self.path} is no file of votes: name one that dpo_fast.vote wrote, or a new one")
        if version > VERSION:
            raise BadInput(
                f"{self.path} was written by a newer dpo_fast (schema {version}, this one knows {VERSION}): install"
                " that version, or name another --votes_file"
            )
        # No view or trigger of a stranger's file is ever run.
        found = {" ".join(sql.split()) for (sql,) in self.connection.execute("SELECT sql FROM sqlite_schema") if sql}
        if found != {" ".join(sql.split()) for sql in SCHEMA}:
            raise BadInput(f"{self.path} has other tables than dpo_fast.vote writes: put it back from a copy")
        if (fault := self._value("PRAGMA quick_check(1)")) != "ok":
            raise BadInput(f"{self.path} is damaged ({fault:.100}): put it back from a copy")
        # A text where a number belongs would end the statistics, not this.
        for table, columns in _TYPES.items():
            wrong = " OR ".join(f"typeof({name}) NOT IN ({kinds})" for name, kinds in columns.items())
            if self._value(f"SELECT count(*) FROM {table} WHERE {wrong}"):
                raise BadInput(f"{self.path} is damaged (values of another type in {table}): put it back from a copy")
        for name, value in self.connection.execute("SELECT name, value FROM settings"):
            if name in _SETTINGS and not _SETTINGS[name](json.loads(value)):
                raise BadInput(f"{self.path} is damaged (its setting {name:.40}): put it back from a copy")
        if self.private("votes") is None:
            raise BadInput(f"{self.path} is damaged (its setting votes): put it back from a copy")

    def close(self) -> None:
        """Close the file. What was committed is in it."""
        self.connection.close()

    def __enter__(self) -> "VoteStore":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    # ---- reading -------------------------------------------------------------------------------------------------

    def votes(self, excluded: bool = False) -> list[Vote]:
        """Return the votes, oldest first. excluded: also those of voters whom the owner has excluded."""
        rows = self.connection.execute(
            f"""SELECT c.in_set, s.question, c.id, c.prompt, c.category, c.seed, c.first_model, c.second_model,
            s.choice, s.first_left, v.name, s.seconds, s.at
            FROM showings s JOIN comparisons c ON c.id = s.comparison JOIN voters v ON v.id = s.voter
            WHERE s.kind IS NULL AND s.choice IS NOT NULL {"" if excluded else "AND v.excluded IS NULL"}
            ORDER BY s.at, s.voter, s.place"""
        )
        with _refused(self.path):
            return [
                Vote(
                    group=group,
                    question=question,
                    comparison=comparison,
                    prompt=prompt,
                    category=category,
                    seed=None if seed is None else int(seed),
                    models=(first, second),
                    outcome=0.5 if choice == "tie" else float((choice == "left") == bool(first_left)),
                    voter=voter,
                    first_left=bool(first_left),
                    seconds=seconds,
                    at=at,
                )
                for (
                    group, question, comparison, prompt, category, seed, first, second, choice, first_left, voter,
                    seconds, at,
                ) in rows
            ]  # fmt: skip

    def checks(self) -> list[Check]:
        """Return the answers to attention checks, oldest first, of excluded voters too."""
        rows = self.connection.execute(
            """SELECT v.name, s.kind, s.choice, s.first_left, s.seconds, s.at FROM showings s
            JOIN voters v ON v.id = s.voter WHERE s.kind IS NOT NULL AND s.choice IS NOT NULL
            ORDER BY s.at, s.voter, s.place"""
        )
        return [
            Check(voter=voter, kind=kind, passed=choice == _right(kind, first_left), seconds=seconds, at=at)
            for voter, kind, choice, first_left, seconds, at in rows
        ]

    def excluded(self) -> dict[str, str]:
        """Return name -> reason of the voters whom the owner has excluded."""
        return dict(self.connection.execute("SELECT name, excluded FROM voters WHERE excluded IS NOT NULL ORDER BY id"))

    def voters(self) -> list[str]:
        """Return the names of all voters, in the order in which they were added."""
        return [name for (name,) in self.connection.execute("SELECT name FROM voters ORDER BY id")]

    def files(self) -> dict[int, tuple[Path, Path]]:
        """Return comparison -> the files of its two images."""
        rows = self.connection.execute(
            """SELECT c.id, a.path, b.path FROM comparisons c JOIN images a ON a.id = c.first_image
            JOIN images b ON b.id = c.second_image ORDER BY c.id"""
        )
        return {comparison: (self.path_of(first), self.path_of(second)) for comparison, first, second in rows}

    def image_files(self) -> dict[Path, ImageFile]:
        """Return the image files as they were when the session last read them."""
        rows = self.connection.execute("SELECT path, size, digest FROM images WHERE digest IS NOT NULL")
        return {self.path_of(path): ImageFile(size, digest) for path, size, digest in rows}

    def settings(self) -> dict[str, Any]:
        """Return what the session is: votes (wanted of each comparison and question), questions {id: text}, models,
        groups {name: folder}, comparisons (their number), created (Unix time), versions, and the owner's settings."""
        with _refused(self.path):
            own = {name: json.loads(value) for name, value in self.connection.execute("SELECT * FROM settings")}
        texts = self.connection.execute("SELECT id, text FROM questions ORDER BY place")
        models = self.connection.execute(
            """SELECT first_model FROM comparisons UNION SELECT second_model FROM comparisons ORDER BY 1"""
        )
        groups = self.connection.execute(
            "SELECT name, folder FROM sets ORDER BY (SELECT min(id) FROM comparisons WHERE in_set = name)"
        )
        return {
            **{name: value for name, value in own.items() if not name.startswith("_")},
            "questions": dict(texts.fetchall()),
            "models": [name for (name,) in models],
            "groups": dict(groups),
            "comparisons": self._value("SELECT count(*) FROM comparisons WHERE live"),
        }

    def changes(self) -> tuple[object, ...]:
        """Return what differs after any change that results depend on."""
        answers = "SELECT count(at), max(at), (SELECT count(excluded) FROM voters), total(at) FROM showings"
        return (*self.connection.execute(answers).fetchone(), *self.excluded().items())

    def comparisons(self) -> list[Row]:
        """Return the comparisons that are shown, in their order."""
        rows = self.connection.execute(
            """SELECT id, in_set, prompt, first_model, second_model, first_image, second_image FROM comparisons
            WHERE live ORDER BY id"""
        )
        return [Row(id_, group, prompt, (a, b), (i, j)) for id_, group, prompt, a, b, i, j in rows]

    def images(self) -> dict[Path, int]:
        """Return the file -> id of all images."""
        return {self.path_of(path): id_ for id_, path in self.connection.execute("SELECT id, path FROM images")}

    def name_of(self, file: Path) -> str:
        """Return the stored path of an image or a folder: POSIX, and relative below the folder of the file of votes."""
        whole, home = Path(os.path.abspath(file)), Path(os.path.abspath(self.path.parent))
        return (whole.relative_to(home) if whole.is_relative_to(home) else whole).as_posix()

    def path_of(self, name: str) -> Path:
        """Return the absolute path that is stored as `name`."""
        return Path(os.path.abspath(self.path.parent), name)

    # ---- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write what the block writes all at once, flushed to disk at its end, or nothing of it."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def put(self, **settings: object) -> None:
        """Set settings to JSON values. A name that begins with an underscore is not part of `settings`."""
        rows = [(name, json.dumps(value)) for name, value in settings.items()]
        self.connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", rows)

    def private(self, name: str) -> Any:
        """Return a setting that is not part of `settings`, or None."""
        row = self.connection.execute("SELECT value FROM settings WHERE name = ?", [name]).fetchone()
        return row and json.loads(row[0])

    def add_questions(self, questions: Mapping[str, str]) -> None:
        """Add questions, id -> text, behind those that are there."""
        place = self._value("SELECT count(*) FROM questions")
        rows = [(id_, place + k, text) for k, (id_, text) in enumerate(questions.items())]
        self.connection.executemany("INSERT INTO questions VALUES (?, ?, ?)", rows)

    def set_comparisons(
        self, folders: Mapping[str, str], comparisons: Iterable[Comparison], images: Mapping[Path, ImageFile]
    ) -> tuple[int, int]:
        """Show exactly these comparisons from now on; return how many are new, and how many are no longer shown.

        folders: group -> its folder. images: every file of a comparison as it is now. Votes on comparisons that are no
        longer shown stay. Raises BadInput for an image with votes that has changed since.
        """
        run = self.connection.execute
        voted = {
            self.path_of(path)
            for (path,) in run(
                """SELECT DISTINCT i.path FROM showings s JOIN comparisons c ON c.id = s.comparison
                JOIN images i ON i.id IN (c.first_image, c.second_image) WHERE s.choice IS NOT NULL"""
            )
        }
        before = self.image_files()
        for file, now in images.items():
            kept = self.path_of(self.name_of(file))
            if kept in voted and before.get(kept, now) != now:
                raise BadInput(
                    f"{file} has changed since people voted on it: put it back, or begin another --votes_file"
                )
        ids = {}
        for file, now in images.items():
            run(
                """INSERT INTO images (path, size, digest) VALUES (?, ?, ?)
                ON CONFLICT (path) DO UPDATE SET size = excluded.size, digest = excluded.digest""",
                [self.name_of(file), *now],
            )
            (ids[file],) = run("SELECT id FROM images WHERE path = ?", [self.name_of(file)]).fetchone()
        live = {id_ for (id_,) in run("SELECT id FROM comparisons WHERE live")}
        known = {
            (group, prompt, first, second): id_
            for id_, group, prompt, first, second in run(
                "SELECT id, in_set, prompt, first_image, second_image FROM comparisons"
            )
        }
        comparisons = list(comparisons)
        names = self._earlier_names(folders, comparisons, ids)
        for name, folder in folders.items():
            run("INSERT OR IGNORE INTO sets VALUES (?, ?)", [names.get(name, name), folder])
        shown: set[int] = set()
        for one in comparisons:
            one = one._replace(group=names.get(one.group, one.group))
            first, second = (ids[file] for file in one.files)
            id_ = known.get((one.group, one.prompt, first, second))
            if id_ is None:  # folders may be named in another order
                id_ = known.get((one.group, one.prompt, second, first))
            if id_ is None:
                seed = None if one.seed is None else str(one.seed)
                values = [one.group, one.prompt, one.category, seed, *one.models, first, second]
                id_ = run(
                    f"""INSERT INTO comparisons (in_set, prompt, category, seed, first_model, second_model, first_image,
                    second_image, live) VALUES ({", ".join("?" * len(values))}, 1)""",
                    values,
                ).lastrowid
            shown.add(id_)
        run("UPDATE comparisons SET live = 0")
        self.connection.executemany("UPDATE comparisons SET live = 1 WHERE id = ?", [(id_,) for id_ in shown])
        return len(shown - live), len(live - shown)

    def _earlier_names(
        self, folders: Mapping[str, str], comparisons: Iterable[Comparison], ids: Mapping[Path, int]
    ) -> dict[str, str]:
        """The names that groups had before their folders were renamed: groups of the same models and images."""
        run = self.connection.execute
        recorded = {name for (name,) in run("SELECT name FROM sets")}
        earlier: dict[tuple[str, frozenset[int]], str] = {}
        models: dict[str, set[str]] = {}
        for group, prompt, first, second, *two in run(
            """SELECT in_set, prompt, first_image, second_image, first_model, second_model FROM comparisons
            ORDER BY live, id DESC"""
        ):
            if group not in folders:
                earlier[prompt, frozenset((first, second))] = group
                models.setdefault(group, set()).update(two)
        now: dict[str, set[str]] = {}
        for one in comparisons:
            now.setdefault(one.group, set()).update(one.models)
        names: dict[str, str] = {}
        for one in comparisons:
            if one.group not in recorded and one.group not in names:
                before = earlier.get((one.prompt, frozenset(ids[file] for file in one.files)))
                if before is not None and before not in names.values() and models[before] == now[one.group]:
                    names[one.group] = before
        return names

    def _value(self, statement: str, values: Sequence[object] = ()) -> Any:
        return self.connection.execute(statement, values).fetchone()[0]


def token_digest(token: str) -> bytes:
    """Return the SHA-256 of a token, which is what the store keeps of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _right(kind: str, first_left: int) -> str:
    """The answer that passes a check; of an obvious one the whole image counts as the first."""
    return "tie" if kind == "identical" else ("left" if first_left else "right")


_TEXT, _TEXT_OR_NULL, _INT, _REAL = "'text'", "'text', 'null'", "'integer'", "'real', 'integer'"
_REAL_OR_NULL = f"{_REAL}, 'null'"
_TYPES = {
    "settings": {"name": _TEXT, "value": _TEXT},
    "sets": {"name": _TEXT, "folder": _TEXT},
    "questions": {"id": _TEXT, "place": _INT, "text": _TEXT},
    "images": {"path": _TEXT, "size": f"{_INT}, 'null'", "digest": _TEXT_OR_NULL},
    "comparisons": {
        "in_set": _TEXT, "prompt": _TEXT, "category": _TEXT_OR_NULL, "seed": _TEXT_OR_NULL, "first_model": _TEXT,
        "second_model": _TEXT, "first_image": _INT, "second_image": _INT, "live": _INT,
    },
    "voters": {"name": _TEXT, "token": "'blob'", "since": _REAL, "excluded": _TEXT_OR_NULL},
    "showings": {
        "id": _TEXT, "voter": _INT, "place": _INT, "question": _TEXT, "comparison": _INT, "kind": _TEXT_OR_NULL,
        "side": f"{_INT}, 'null'", "first_left": _INT, "left_key": _TEXT, "right_key": _TEXT, "choice": _TEXT_OR_NULL,
        "seconds": _REAL_OR_NULL, "at": _REAL_OR_NULL,
    },
}  # fmt: skip


def _is_number(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(one in "0123456789abcdef" for one in value)


_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "votes": lambda value: _is_number(value, 1),
    "created": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "versions": lambda value: isinstance(value, dict),
    "_secret": lambda value: isinstance(value, str),
    "_owner": _is_hex,
    "_invitations": lambda value: isinstance(value, list) and all(map(_is_hex, value)),
    "_folders": lambda value: (
        isinstance(value, list) and all(isinstance(one, str) and "\0" not in one for one in value)
    ),
    "_against": lambda value: value is None or isinstance(value, str),
    "_max_comparisons": lambda value: value is None or _is_number(value, 1),
    "_image_size": lambda value: value is None or _is_number(value, 1),
    "_checks": lambda value: value is None or value == 0 or _is_number(value, 2),
    "_max_votes": lambda value: value is None or _is_number(value, 1),
}  # what a stranger's file must have, where it has them


@contextmanager
def _refused(path: Path, reading: bool = False) -> Iterator[None]:
    """Raise what SQLite raises in the block as BadInput; with `reading`, let pass that it cannot open the file."""
    try:
        yield
    except (sqlite3.Error, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, BadInput) or (reading and isinstance(error, sqlite3.OperationalError)):
            raise
        raise BadInput(
            f"{path} cannot be read as a file of votes ({one_line(error)}): name one that dpo_fast.vote wrote, or put"
            " it back from a copy"
        ) from error
