"""One vote, and one answer to an attention check, as all statistics take them."""

from typing import NamedTuple

FILE = "votes.sqlite"  # people's votes on the images of a folder, in it


class Vote(NamedTuple):
    """What one voter answered to one question about two images of one prompt."""

    group: str  # which folder or set of the session the comparison belongs to
    question: str  # its id
    comparison: int
    prompt: str
    category: str | None
    seed: int | None
    models: tuple[str, str]  # in the comparison's own order, the base first where known
    outcome: float  # 1: the first model's image won, 0.5: a tie, 0: the second's
    voter: str  # its name
    first_left: bool  # whether the first model's image stood left
    seconds: float  # from shown to voted, as the server measured it
    at: float  # Unix time


class Check(NamedTuple):
    """How one voter answered a showing that compares no models."""

    voter: str
    kind: str  # identical: one image twice, passed by a tie; obvious: beside a ruined copy, passed by choosing it
    passed: bool
    seconds: float  # from shown to voted
    at: float  # Unix time
