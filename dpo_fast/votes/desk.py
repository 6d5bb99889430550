"""The desk of a session: it hands out showings to voters and takes their votes, on an open store.

What is asked often is kept in memory (tokens, open showings, the counts of `assignment`); whatever changes is written
to the store in the same call. The caller wraps calls that write in `store.transaction()`, may commit several at once,
and calls `load` after a transaction that failed. One thread at a time uses a desk.
"""

import random
import secrets
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dpo_fast.errors import printable
from dpo_fast.votes.assignment import BLOCK, Assignment, Picked
from dpo_fast.votes.store import CHOICES, Row, VoteStore, token_digest

OPEN = 2  # showings a voter has at once: this one and the next
RESERVED_SECONDS = 900.0  # from a voter's last request until the open showings may be given to others
RELEASE_EVERY = 1.0  # seconds between two looks for such showings
UNDO_SECONDS = 1800.0  # a vote can be taken back
LONGEST_NAME = 60  # characters of a voter's name
LONGEST_REASON = 300
MOST_VOTERS = 10_000
TOKEN_BYTES, KEY_BYTES = 24, 18


class Refused(Exception):
    """A request that cannot be granted: `status` is its HTTP status, the message one plain sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Showing:
    """One comparison, or check, with one question, as it is shown to one voter."""

    id: str
    place: int  # in the order in which the voter got them
    question: str  # id
    comparison: int  # id
    kind: str | None  # None: a comparison; else of the check
    side: int | None  # of a check: which of the comparison's images it shows
    first_left: bool
    keys: tuple[str, str]  # of the left and of the right image
    since: float  # Unix time at which it was first given to the voter, or became the first of the open ones
    reserved: bool = True  # False: it was given to others meanwhile


@dataclass
class Voter:
    """A voter, as the desk remembers one."""

    id: int
    name: str
    excluded: bool
    open: dict[str, Showing] = field(default_factory=dict)  # by id, in order of place
    done: int = 0  # answers, checks included
    shown: int = 0  # comparisons answered or open
    next_place: int = 0
    seen_at: float = 0.0  # Unix time of the last request
    voted: list[tuple[int, float, str]] = field(default_factory=list)  # place, time and id of the answers, in order


class Screen(NamedTuple):
    """What a voter is shown."""

    showings: list[Showing]  # at most OPEN
    done: int
    target: int | None
    can_undo: bool
    finished: bool  # False without showings: others hold the last ones, and may leave them


class KeyOf(NamedTuple):
    """What an image's key stands for."""

    voter: int
    comparison: int
    image: int  # its id
    ruined: bool  # the ruined copy of an obvious check


class Desk:
    """See the module. Times are Unix times."""

    def __init__(
        self,
        store: VoteStore,
        *,
        checks_every: int = 0,  # one check in so many showings, at a random place; 0: none
        most: int | None = None,  # showings of a voter, checks included
        ruined: Mapping[int, int] | None = None,  # comparison -> side whose image has a ruined copy
        open_link: bool = False,
        clock: Callable[[], float] = time.time,
        draw: random.Random | None = None,
    ) -> None:
        """Read the session from `store`. With `checks_every`, `ruined` may be empty: checks are then `identical`."""
        self.store, self.open_link = store, open_link
        self._every, self._most, self._ruined = checks_every, most, dict(ruined or {})
        self._clock, self._draw = clock, draw or random.SystemRandom()
        self.load()

    def load(self) -> None:
        """Read everything from the store again. Who was seen when, and what was shown when, stays as it is known."""
        store = self.store
        known: dict[int, Voter] = getattr(self, "_voters", {})
        settings = store.settings()
        self.wanted: int = settings["votes"]
        self.questions: dict[str, str] = settings["questions"]
        self._question_ids = list(self.questions)
        self.rows: dict[int, Row] = {row.id: row for row in store.comparisons()}
        self._ids = list(self.rows)
        self._places = {id_: place for place, id_ in enumerate(self._ids)}
        kinds: list[Hashable] = [(row.group, row.models) for row in self.rows.values()]
        self._assignment = Assignment(kinds, len(self._question_ids), self.wanted, self._draw)
        self._secret: str = store.private("_secret") or ""
        if not self._secret:
            self._secret = secrets.token_hex(16)
        self._voters: dict[int, Voter] = {}
        self._tokens: dict[bytes, int] = {}
        self._keys: dict[str, KeyOf] = {}
        self._answers: dict[str, tuple[int, str]] = {}  # showing -> voter and choice
        self._owner = bytes.fromhex(store.private("_owner") or "")
        self._invitations = {bytes.fromhex(one) for one in store.private("_invitations") or ()}
        self._released_at = float("-inf")
        now = self._clock()
        run = store.connection.execute
        voters = run(
            """SELECT v.id, name, token, excluded, max(since, coalesce(max(at), since))
            FROM voters v LEFT JOIN showings s ON s.voter = v.id GROUP BY v.id ORDER BY v.id"""
        )
        for id_, name, token, excluded, seen_at in voters.fetchall():
            before = known.get(id_)
            seen_at = seen_at if before is None else max(before.seen_at, seen_at)
            self._voters[id_] = Voter(id_, name, excluded is not None, seen_at=seen_at)
            self._tokens[token] = id_
        rows = run(
            """SELECT id, voter, place, question, comparison, kind, side, first_left, left_key, right_key, choice, at
            FROM showings ORDER BY voter, place"""
        )
        unanswered = []
        for id_, voter, place, question, comparison, kind, side, first_left, left, right, choice, at in rows:
            of = self._voters[voter]
            of.next_place = max(of.next_place, place + 1)
            showing = Showing(id_, place, question, comparison, kind, side, bool(first_left), (left, right), now)
            # An open showing that is not live is deleted by `tidy`. Each start ruins other images.
            live = comparison in self._places and (kind != "obvious" or self._ruined.get(comparison) == side)
            if choice is not None:
                of.done += 1
                of.shown += kind is None
                self._answers[id_] = voter, choice
                if live:
                    of.voted.append((place, at, id_))
                if live and kind is None:
                    self._assignment.add(voter, self._picked(showing))
                    if of.excluded:
                        self._assignment.release(self._picked(showing))
            elif live:
                of.shown += kind is None
                unanswered.append((of, showing))
        for of, showing in unanswered:
            self._open(of, showing)
            if showing.kind is None:
                picked = self._picked(showing)
                showing.reserved = self._assignment.has_room(picked) and not of.excluded
                self._assignment.add(of.id, picked)
                if not showing.reserved:
                    self._assignment.release(picked)
        for of in self._voters.values():
            of.voted.sort(key=lambda one: one[1:])

    def tidy(self) -> None:
        """Write the secret of a new session, and delete open showings that can no longer be shown."""
        self.store.put(_secret=self._secret)
        held = {id_ for of in self._voters.values() for id_ in of.open}
        written = self.store.connection.execute("SELECT id FROM showings WHERE choice IS NULL").fetchall()
        gone = [row for row in written if row[0] not in held]
        self.store.connection.executemany("DELETE FROM showings WHERE id = ?", gone)

    # ---- who asks ------------------------------------------------------------------------------------------------

    def voter_of(self, token: str) -> int | None:
        """Return the voter of a token, or None."""
        return self._tokens.get(token_digest(token))

    def is_owner(self, token: str) -> bool:
        """Whether a token is the owner's."""
        return secrets.compare_digest(self._owner, token_digest(token))

    def name_of(self, voter: int) -> str:
        """Return a voter's name."""
        return self._voters[voter].name

    def new_owner(self) -> str:
        """Make a new token for the owner's page and return it. The old one is dead. Writes."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._owner = token_digest(token)
        self.store.put(_owner=self._owner.hex())
        return token

    def new_invitation(self) -> str:
        """Make a further invitation for `join` and return it. Earlier ones stay valid. Writes."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._invitations.add(token_digest(token))
        self.store.put(_invitations=[one.hex() for one in sorted(self._invitations)])
        return token

    def join(self, invitation: str) -> str:
        """Return the token of a new voter, named guest N. Writes."""
        if not self.open_link or token_digest(invitation) not in self._invitations:
            raise Refused(403, "This link does not let anyone join; ask for another.")
        number = 1 + sum(one.name.startswith("guest ") for one in self._voters.values())
        names = {one.name for one in self._voters.values()}
        while f"guest {number}" in names:
            number += 1
        return self.add_voter(f"guest {number}")

    def add_voter(self, name: str) -> str:
        """Add a voter and return the token. Raises Refused for a name that is taken or cannot be used. Writes."""
        name = voter_name(name)
        if any(one.name == name for one in self._voters.values()):
            raise Refused(409, f"There is a voter named {name} already.")
        if len(self._voters) >= MOST_VOTERS:
            raise Refused(409, f"There are {MOST_VOTERS:,} voters, and no more can be added.")
        token = secrets.token_urlsafe(TOKEN_BYTES)
        digest, now = token_digest(token), self._clock()
        id_ = self.store.connection.execute(
            "INSERT INTO voters (name, token, since) VALUES (?, ?, ?)", [name, digest, now]
        ).lastrowid
        self._voters[id_] = Voter(id_, name, False, seen_at=now)
        self._tokens[digest] = id_
        return token

    def new_token(self, name: str) -> str:
        """Give a voter a new token and return it; the old one is dead. Writes."""
        of = self._named(name)
        token = secrets.token_urlsafe(TOKEN_BYTES)
        digest = token_digest(token)
        self.store.connection.execute("UPDATE voters SET token = ? WHERE id = ?", [digest, of.id])
        self._tokens = {old: id_ for old, id_ in self._tokens.items() if id_ != of.id} | {digest: of.id}
        return token

    def exclude(self, name: str, excluded: bool, reason: str = "") -> None:
        """Leave a voter's votes out of all results, or count them again. Writes.

        The comparisons then want votes of others. The voter's link is closed as long as that lasts.
        """
        of = self._named(name)
        text = " ".join(printable(" ".join(reason.split())).split())[:LONGEST_REASON] or "by the owner"
        self.store.connection.execute(
            "UPDATE voters SET excluded = ? WHERE id = ?", [text if excluded else None, of.id]
        )
        self.load()

    def live(self) -> dict[str, object]:
        """Return counts of this moment: how many votes are wanted, and the answers of each voter, checks included."""
        now = self._clock()
        return {
            "votes_wanted": len(self._ids) * len(self._question_ids) * self.wanted,
            "voters": [
                {"name": of.name, "done": of.done, "open": len(of.open), "idle_seconds": now - of.seen_at}
                for of in self._voters.values()
            ],
        }

    # ---- voting --------------------------------------------------------------------------------------------------

    def screen(self, voter: int) -> Screen:
        """Return what a voter sees now, handing out what is missing. Writes."""
        of, now = self._checked(voter), self._clock()
        of.seen_at = now
        self._reserve_again(of)
        while len(of.open) < OPEN and self._may_see_more(of):
            showing = self._next(of, now)
            if showing is None:
                break
            self._insert(of, showing)
            self._open(of, showing)
        showings = list(of.open.values())[:OPEN]
        finished = not showings and not (self._may_see_more(of) and self._others_hold(of))
        return Screen(showings, of.done, self._target(of), self._undoable(of) is not None, finished)

    def resume(self, voter: int) -> None:
        """Begin to time a voter's open showings anew: the page was opened, or loaded again."""
        now = self._clock()
        for showing in self._checked(voter).open.values():
            showing.since = now

    def vote(self, voter: int, showing: str, choice: str) -> None:
        """Take a vote. Writes.

        The same vote again changes nothing. Raises Refused: 404 for a showing that is not this voter's, or was given to
        others after RESERVED_SECONDS, 409 for another choice on a showing that has its vote.
        """
        of, now = self._checked(voter), self._clock()
        assert choice in CHOICES
        answered = self._answers.get(showing)
        if answered is not None and answered[0] == voter:
            if answered[1] != choice:
                raise Refused(409, "This pair has your vote already; undo takes it back.")
            return
        of.seen_at = now
        self._reserve_again(of)
        voted = of.open.pop(showing, None)
        if voted is None:
            raise Refused(404, "This pair is not yours, or no longer; the next one is ready.")
        self.store.connection.execute(
            "UPDATE showings SET choice = ?, seconds = ?, at = ? WHERE id = ?",
            [choice, max(0.0, now - voted.since), now, showing],
        )
        self._close(voted)
        self._answers[showing] = voter, choice
        of.done += 1
        of.voted.append((voted.place, now, showing))
        for following in list(of.open.values())[:1]:
            following.since = now

    def undo(self, voter: int) -> None:
        """Take back the voter's last vote of the last UNDO_SECONDS: its showing is open again, as another one. Writes.

        Raises Refused (409) if there is none.
        """
        of, now = self._checked(voter), self._clock()
        of.seen_at = now
        last = self._undoable(of)
        if last is None:
            raise Refused(409, "There is no vote to take back.")
        (question, comparison, kind, side, first_left) = self.store.connection.execute(
            "SELECT question, comparison, kind, side, first_left FROM showings WHERE id = ?", [last]
        ).fetchone()
        place = of.voted.pop()[0]
        del self._answers[last]
        of.done -= 1
        showing = Showing(_key(), place, question, comparison, kind, side, bool(first_left), (_key(), _key()), now)
        self.store.connection.execute(
            """UPDATE showings SET id = ?, left_key = ?, right_key = ?, choice = NULL, seconds = NULL, at = NULL
            WHERE id = ?""",
            [showing.id, *showing.keys, last],
        )
        self._open(of, showing)
        of.open = dict(sorted(of.open.items(), key=lambda one: one[1].place))

    def image_of(self, voter: int, key: str) -> KeyOf | None:
        """Return the image that a key stands for, if it is of an open showing of this voter, else None."""
        of = self._keys.get(key)
        return of if of is not None and of.voter == voter and not self._voters[voter].excluded else None

    # ---- within --------------------------------------------------------------------------------------------------

    def _checked(self, voter: int) -> Voter:
        of = self._voters[voter]
        if of.excluded:
            raise Refused(403, "The owner has closed this link.")
        return of

    def _named(self, name: str) -> Voter:
        for of in self._voters.values():
            if of.name == name:
                return of
        raise Refused(404, "There is no voter of this name.")

    def _picked(self, showing: Showing) -> Picked:
        question = self._question_ids.index(showing.question)
        return Picked(question, self._places[showing.comparison], showing.first_left)

    def _may_see_more(self, of: Voter) -> bool:
        return self._most is None or of.done + len(of.open) < self._most

    def _others_hold(self, of: Voter) -> bool:
        """Whether others have open what this voter may get once they leave it."""
        return any(
            showing.reserved and showing.kind is None and not self._assignment.has_seen(of.id, self._picked(showing))
            for other in self._voters.values()
            if other is not of and not other.excluded
            for showing in other.open.values()
        )

    def _target(self, of: Voter) -> int | None:
        """The showings that are this voter's share, or None if that is not known, or reached."""
        if self._most is not None:
            return self._most
        voters = [one for one in self._voters.values() if not one.excluded]
        cells = len(self._ids) * len(self._question_ids)
        share = min(cells, -(-cells * self.wanted // len(voters)))
        if self._every:
            share += share // max(1, self._every - 1)
        return share if not self.open_link and of.done + len(of.open) <= share else None

    def _undoable(self, of: Voter) -> str | None:
        """The showing whose vote can be taken back, if any."""
        if not of.voted or self._clock() - of.voted[-1][1] > UNDO_SECONDS:
            return None
        return of.voted[-1][2]

    def _next(self, of: Voter, now: float) -> Showing | None:
        place = of.next_place
        if self._is_check(of.id, place):
            check = self._check_for(of, place, now)
            if check is not None:
                return check
        self._release_stale(now)
        picked = self._assignment.pick(of.id, of.shown, of.id % len(self._question_ids))
        if picked is None:
            return None
        of.shown += 1
        return self._showing(of, place, self._question_ids[picked.question], self._ids[picked.comparison], None, None,
                             picked.first_left, now)  # fmt: skip

    def _showing(
        self, of: Voter, place: int, question: str, comparison: int, kind: str | None, side: int | None,
        first_left: bool, now: float,
    ) -> Showing:  # fmt: skip
        of.next_place = place + 1
        return Showing(_key(), place, question, comparison, kind, side, first_left, (_key(), _key()), now)

    def _is_check(self, voter: int, place: int) -> bool:
        """Whether a voter's showing of that place is a check: one of each block of `checks_every`."""
        if not self._every:
            return False
        block, within = divmod(place, self._every)
        return random.Random(f"{self._secret}:{voter}:{block}").randrange(self._every) == within

    def _check_for(self, of: Voter, place: int, now: float) -> Showing | None:
        """A check, unless nothing but checks is left for this voter."""
        if not self._has_more(of, now):
            return None
        obvious = bool(self._ruined) and self._draw.random() < 0.5
        comparison = self._draw.choice(list(self._ruined) if obvious else self._ids)
        side = self._ruined[comparison] if obvious else self._draw.randrange(2)
        number = (of.shown // BLOCK + of.id) % len(self._question_ids)
        kind, left = "obvious" if obvious else "identical", self._draw.random() < 0.5
        return self._showing(of, place, self._question_ids[number], comparison, kind, side, left, now)

    def _has_more(self, of: Voter, now: float) -> bool:
        self._release_stale(now)
        picked = self._assignment.pick(of.id, of.shown, 0)
        if picked is None:
            return False
        self._assignment.release(picked)
        self._assignment.forget(of.id, picked)
        return True

    def _insert(self, of: Voter, showing: Showing) -> None:
        self.store.connection.execute(
            """INSERT INTO showings
            (id, voter, place, question, comparison, kind, side, first_left, left_key, right_key)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            [showing.id, of.id, showing.place, showing.question, showing.comparison, showing.kind, showing.side,
             showing.first_left, *showing.keys],
        )  # fmt: skip

    def _open(self, of: Voter, showing: Showing) -> None:
        """Remember an open showing and what its keys stand for."""
        of.open[showing.id] = showing
        row = self.rows[showing.comparison]
        if showing.kind is None:
            first, second = ((image, False) for image in row.images)
        else:
            image = row.images[showing.side]
            first, second = (image, False), (image, showing.kind == "obvious")
        sides = (first, second) if showing.first_left else (second, first)
        for key, (image, ruined) in zip(showing.keys, sides, strict=True):
            self._keys[key] = KeyOf(of.id, showing.comparison, image, ruined)

    def _close(self, showing: Showing) -> None:
        for key in showing.keys:
            self._keys.pop(key, None)

    def _release_stale(self, now: float) -> None:
        """Give to others what voters have open who have not asked for RESERVED_SECONDS."""
        if now - self._released_at < RELEASE_EVERY:
            return
        self._released_at = now
        for of in self._voters.values():
            if of.open and now - of.seen_at > RESERVED_SECONDS:
                for showing in of.open.values():
                    if showing.reserved and showing.kind is None and not of.excluded:
                        showing.reserved = False
                        self._assignment.release(self._picked(showing))

    def _reserve_again(self, of: Voter) -> None:
        """Reserve what was given to others meanwhile, where it still wants votes; delete the other showings."""
        for showing in [one for one in of.open.values() if not one.reserved]:
            picked = self._picked(showing)
            if self._assignment.has_room(picked):
                self._assignment.restore(picked)
                showing.reserved = True
                continue
            self._assignment.forget(of.id, picked)
            self.store.connection.execute("DELETE FROM showings WHERE id = ?", [showing.id])
            del of.open[showing.id]
            of.shown -= 1
            self._close(showing)


def voter_name(name: str) -> str:
    """Return a voter's name, with one space for several. Raises Refused for one that cannot be used."""
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or printable(name) != name:
        raise Refused(400, f"A voter's name has 1 to {LONGEST_NAME} characters that can be shown.")
    return name


def _key() -> str:
    return secrets.token_urlsafe(KEY_BYTES)
