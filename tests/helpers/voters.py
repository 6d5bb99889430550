"""Simulated voters: a session in a real file of votes, handed out and answered through its desk, without a network."""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dpo_fast.votes.desk import Desk
from dpo_fast.votes.store import Comparison, ImageFile, VoteStore

QUESTIONS = {
    "general": "Which image do you prefer?",
    "appeal": "Which looks better?",
    "alignment": "Which fits better?",
}
# question, prompt, file -> how good the voter finds the image, in logits
Taste = Callable[[str, str, Path], float]


def session(
    file: Path,
    comparisons: Iterable[Comparison],
    *,
    votes: int = 5,
    questions: Mapping[str, str] = QUESTIONS,
    folders: Mapping[str, str] | None = None,  # group -> its folder; None: of no importance
) -> None:
    """Begin a session: a file of votes with these comparisons, and no voter."""
    comparisons = list(comparisons)
    files = dict.fromkeys(path for one in comparisons for path in one.files)
    images = {path: ImageFile.of(path.read_bytes()) for path in files}
    with VoteStore.create(file, {"votes": votes}, questions) as store, store.transaction():
        groups = dict.fromkeys(one.group for one in comparisons)
        store.set_comparisons(folders or {group: group for group in groups}, comparisons, images)


def vote(
    file: Path,
    voters: Mapping[str, Taste],
    *,
    tie_below: float = 0.0,  # a difference of less is a tie
    most: int | None = None,  # votes of each; None: until nothing is left
    seed: int = 0,
) -> int:
    """Let the voters vote in turn, each by its taste and with logistic noise; return the number of votes."""
    draw, number = random.Random(seed), 0
    with VoteStore.open(file) as store:
        desk = Desk(store, draw=random.Random(seed + 1))
        with store.transaction():
            known = store.voters()
            for name in voters:
                if name not in known:
                    desk.add_voter(name)
        files = store.files()
        waiting = {
            id_: voters[desk.name_of(id_)] for id_ in range(1, len(store.voters()) + 1) if desk.name_of(id_) in voters
        }
        done = dict.fromkeys(waiting, 0)
        while waiting:
            with store.transaction():
                for id_, taste in list(waiting.items()):
                    showings = desk.screen(id_).showings
                    if not showings or done[id_] == most:
                        del waiting[id_]
                        continue
                    showing = showings[0]
                    prompt = desk.rows[showing.comparison].prompt
                    first, second = (taste(showing.question, prompt, path) for path in files[showing.comparison])
                    lead = first - second + math.log(1 / draw.uniform(1e-9, 1 - 1e-9) - 1)
                    side = (lead > 0) == showing.first_left
                    choice = "tie" if abs(lead) < tie_below else "left" if side else "right"
                    desk.vote(id_, showing.id, choice)
                    done[id_] += 1
                    number += 1
    return number
