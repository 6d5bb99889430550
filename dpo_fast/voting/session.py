"""Begin a session of votes, or go on with one: from flags to a store, the images and a desk."""

import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_fast import __version__, locks
from dpo_fast.cli import say
from dpo_fast.errors import BadInput, printable
from dpo_fast.files import exists
from dpo_fast.votes.desk import Desk
from dpo_fast.votes.records import FILE
from dpo_fast.votes.store import Row, VoteStore
from dpo_fast.voting.folders import Compared, is_own_set, read_folders
from dpo_fast.voting.images import Gallery, prepare
from dpo_fast.voting.options import CHECKS, QUESTIONS, VOTES, VoteConfig, changed_questions, questions_of
from dpo_fast.voting.summaries import Summaries

KEPT = ".images"  # behind the name of the file of votes: the folder of the images that are ready to be shown
RUINED = 32  # images of which a ruined copy is made, at most
SHOWN_BROKEN = 5  # broken images that are named


@dataclass
class Session:
    """An open session. `close` releases its file."""

    store: VoteStore
    desk: Desk
    gallery: Gallery
    images: dict[int, Path]  # id -> file
    summaries: Summaries
    held: ExitStack

    def close(self) -> None:
        """Close and release the file of votes."""
        self.held.close()


def votes_file_of(config: VoteConfig) -> Path:
    """Return the file of votes that the flags mean."""
    if config.votes_file is not None:
        return config.votes_file
    if len(config.folders) == 1 and is_own_set(config.folders[0]):
        return config.folders[0] / FILE
    return Path(FILE)


def open_session(config: VoteConfig) -> Session:
    """Read folders, open or create the file of votes, and prepare the images.

    Raises BadInput, before anything is written, for what cannot be compared and for a file of another session; and if
    another process holds the file.
    """
    path = votes_file_of(config)
    if path.is_dir():
        raise BadInput(f"--votes_file {path} is a folder: name a file in it")
    with ExitStack() as stack:
        stack.enter_context(locks.hold_file(path, otherwise="end that first, or name another --votes_file"))
        store = stack.enter_context(VoteStore.open(path)) if exists(path) else None
        settings = store.settings() if store is not None else {}
        config, added = _as_recorded(config, store)
        asked = questions_of(config.questions)
        new_questions = changed_questions(settings.get("questions", {}), asked)
        compared = _absolute(read_folders(config.folders, against=config.against, most=config.max_comparisons))
        for remark in compared.remarks:
            say(remark)
        home = path.with_name(path.name + KEPT)
        checked = _spread([one.files[1] for one in compared.comparisons], RUINED) if config.checks else []
        files = [file for one in compared.comparisons for file in one.files]
        gallery = prepare(files, home, side=config.image_size, ruined=checked)
        compared = _without_broken(compared, gallery)
        versions = {"dpo_fast": __version__}
        if store is None:
            store = stack.enter_context(
                VoteStore.create(path, {"votes": config.votes or VOTES, "versions": versions}, asked or QUESTIONS)
            )
            new_questions = {}
        elif config.votes is not None and config.votes != settings["votes"]:
            say(f"{config.votes} votes are wanted of each pair and question now ({settings['votes']} before)")
        with store.transaction():
            if config.votes is not None:
                store.put(votes=config.votes)
            store.put(
                _folders=[store.name_of(folder) for folder in config.folders],
                _against=config.against,
                _max_comparisons=config.max_comparisons,
                _image_size=config.image_size,
                _checks=config.checks,
                _max_votes=config.max_votes,
            )
            store.add_questions(new_questions)
            sources = {file: gallery.sources[file] for one in compared.comparisons for file in one.files}
            new, gone = store.set_comparisons(compared.folders, compared.comparisons, sources)
        if settings:
            _say_changes(added, list(new_questions), new, gone)
        ids = {id_: file for file, id_ in store.images().items() if (file, False) in gallery.images}
        desk = Desk(
            store,
            checks_every=config.checks,
            most=config.max_votes,
            ruined=_ruined_sides(store.comparisons(), ids, gallery),
            open_link=config.open_link,
        )
        with store.transaction():
            desk.tidy()
        summaries = Summaries(path)
        stack.callback(summaries.close)
        return Session(store, desk, gallery, ids, summaries, stack.pop_all())


def _as_recorded(config: VoteConfig, store: VoteStore | None) -> tuple[VoteConfig, list[str]]:
    """The flags, with what they leave out as the session has it; and the folders that are new in it.

    Raises BadInput if folders of the session are not among those that are named.
    """
    if store is None:
        return replace(config, checks=CHECKS if config.checks is None else config.checks), []
    recorded = [store.path_of(name) for name in store.private("_folders") or ()]
    if config.folders:
        named = [Path(os.path.abspath(folder)) for folder in config.folders]
        if lacking := next((folder for folder in recorded if folder not in named), None):
            raise BadInput(
                f"{store.path} holds votes on {lacking}, which is not named: name it too, or another --votes_file"
            )
        added = [str(folder) for folder in named if folder not in recorded]
    else:
        if lacking := next((folder for folder in recorded if not folder.is_dir()), None):
            raise BadInput(f"{store.path} holds votes on {lacking}, which is no folder any more: put it back")
        config, added = replace(config, folders=tuple(recorded)), []
    if config.against is None:
        config = replace(config, against=store.private("_against"))
    if config.max_comparisons is None:
        config = replace(config, max_comparisons=store.private("_max_comparisons"))
    if config.image_size is None:
        config = replace(config, image_size=store.private("_image_size"))
    if config.max_votes is None:
        config = replace(config, max_votes=store.private("_max_votes"))
    if config.checks is None:
        checks = store.private("_checks")
        config = replace(config, checks=CHECKS if checks is None else checks)
    return config, added


def _say_changes(folders: Sequence[str], questions: Sequence[str], new: int, gone: int) -> None:
    if folders:
        say(f"added to the session: {', '.join(folders)}")
    if questions:
        say(f"added questions: {', '.join(questions)}")
    if new:
        say(f"added {new} pairs of images")
    if gone:
        say(f"{gone} pairs of images are no longer shown; their votes are kept")


def _absolute(compared: Compared) -> Compared:
    """The comparisons with their files named as the store names them: absolute, and without `..`."""
    comparisons = [
        one._replace(files=tuple(Path(os.path.abspath(file)) for file in one.files)) for one in compared.comparisons
    ]
    return replace(compared, comparisons=comparisons)


def _without_broken(compared: Compared, gallery: Gallery) -> Compared:
    """The comparisons whose images open. The others are named. Raises BadInput if none is left."""
    if not gallery.broken:
        return compared
    whole = [one for one in compared.comparisons if not gallery.broken.keys() & set(one.files)]
    for file, reason in list(gallery.broken.items())[:SHOWN_BROKEN]:
        say(f"{file} {printable(reason)}")
    number = len(compared.comparisons) - len(whole)
    say(f"{len(gallery.broken)} images do not open: {number} of {len(compared.comparisons)} pairs are left out")
    if not whole:
        raise BadInput("no pair of images is left, as all have an image that does not open: put them back from a copy")
    return replace(compared, comparisons=whole)


def _ruined_sides(rows: Sequence[Row], files: dict[int, Path], gallery: Gallery) -> dict[int, int]:
    """Comparison -> the side whose image has a ruined copy."""
    return {row.id: side for row in rows for side in (0, 1) if (files[row.images[side]], True) in gallery.images}


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    """`most` of the files, at random: everyone may know which are evenly spread."""
    files = list(dict.fromkeys(files))
    return sorted(random.SystemRandom().sample(files, most)) if len(files) > most else files
