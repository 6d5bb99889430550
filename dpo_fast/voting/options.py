"""The flags of the vote, and what is refused before anything is read."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import tyro

from dpo_fast.cli import one_line_errors
from dpo_fast.command_line import refuse_empty
from dpo_fast.errors import BadInput
from dpo_fast.files import exists, user_path
from dpo_fast.help_text import Page, asks_help, show_help
from dpo_fast.votes.desk import Refused, voter_name

PROG = "python -m dpo_fast.vote"
QUESTIONS = {  # those of the published win rates
    "general": "Which image do you prefer?",
    "appeal": "Which image looks better, whatever the text says?",
    "alignment": "Which image fits the text better?",
}
VOTES = 5
CHECKS = 20
LONGEST_QUESTION = 200  # characters
MOST_PIXELS = 2048  # of --image_size


@dataclass(frozen=True)
class VoteConfig:
    """Serve a page on which people compare images blindly: two images of one prompt, one question.

    Folders are evaluations (dpo_fast.evaluate, or runs that were evaluated), a protocol (evaluate --protocol), images
    of dpo_fast.generate, or plain folders of images, one a model, whose prompts are in their names or in what ComfyUI,
    A1111/Forge or diffusers wrote into them. Votes go into one file; the same command, or --votes_file alone, goes on
    with it. `vote results FILE` prints what the votes say, `vote export FILE --to FILE` writes them as CSV or as pairs
    to train on.
    """

    # ---- what is compared --------------------------------------------------------------------------------------------
    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders, in any order and number. The flag may be left out: dpo_fast.vote FOLDER ... None are needed to go on
    with a --votes_file."""
    against: str | None = None
    """Of three models and more, compare this one with each of the others; None: every two."""
    max_comparisons: int | None = None
    """Show N pairs of images, evenly spread over all; None: all."""

    # ---- what is asked -----------------------------------------------------------------------------------------------
    questions: tuple[str, ...] = ()
    """Of general, appeal, alignment (those of the published win rates), or your own, each in quotation marks. None: the
    three; going on with a file, the file's."""
    votes: int | None = None
    """Votes for each pair and question, each by another voter. None: 5; going on with a file, the file's."""
    max_votes: int | None = None
    """Pairs that one voter is shown at most, checks included. None: as long as there are any; going on with a file, the
    file's."""
    checks: int | None = None
    """One showing in N is no comparison but a check whether the voter looks: an image beside itself, or beside a ruined
    copy. Checks are counted apart. 0: none. None: 20; going on with a file, the file's."""

    # ---- who votes ---------------------------------------------------------------------------------------------------
    voters: tuple[str, ...] = ()
    """Names of voters; each gets a link of their own, which is printed. Only you see the names."""
    open_link: bool = False
    """Also print a link with which everyone who has it can join, as guest 1, guest 2 ..."""

    # ---- the server --------------------------------------------------------------------------------------------------
    host: str = "127.0.0.1"
    """The address to listen at. 127.0.0.1: only this machine; 0.0.0.0: everyone in your network who has a link."""
    port: int = 0
    """The port to listen at; 0: a free one."""
    public_url: str | None = None
    """The address at which voters reach a reverse proxy before this server, such as https://votes.example.org: links
    begin with it, and the proxy's X-Forwarded-For is believed. None: there is no proxy."""
    delay: float = 0.2
    """Seconds from the request of an image to its response, always the same, so that no image is known by its time."""

    # ---- places ------------------------------------------------------------------------------------------------------
    votes_file: Path | None = None
    """The file of votes; images ready to be shown are kept beside it. None: votes.sqlite in the folder that is named,
    if that is a single evaluation or set of generated images, else in the current folder."""
    image_size: int | None = None
    """Longer side of the images shown, in pixels. None: that of the largest image, from 256 to 1024."""


def parse(argv: list[str]) -> VoteConfig:
    """Parse a command line. Raises BadInput for an unknown flag and for a value that cannot be used."""
    if asks_help(argv):
        show_help(Page(PROG, VoteConfig, usage="FOLDER ... [--FLAG VALUE ...] | results FILE | export FILE --to FILE"))
    refuse_empty(argv)
    with one_line_errors(VoteConfig):
        config = tyro.cli(VoteConfig, args=[word for word in argv if word != "--folders"], prog=PROG)
    config = replace(
        config,
        folders=tuple(user_path(folder) for folder in config.folders),
        votes_file=None if config.votes_file is None else user_path(config.votes_file),
    )
    check(config)
    return config


def check(config: VoteConfig) -> None:
    """Raise BadInput, naming value and remedy, for values that cannot be used and folders that do not exist."""
    if not config.folders and config.votes_file is None:
        raise BadInput("nothing is named: give folders of images, or --votes_file to go on with a session")
    if not config.folders and not exists(config.votes_file):
        raise BadInput(f"--votes_file {config.votes_file} does not exist: name one that does, or folders of images")
    for folder in config.folders:
        if not exists(folder) or not folder.is_dir():
            raise BadInput(f"{folder} is no folder: name the folder of an evaluation, or of images")
    for name, least, most in (
        ("votes", 1, 1000),
        ("max_votes", 1, 1_000_000),
        ("max_comparisons", 1, 10_000_000),
        ("port", 0, 65535),
        ("image_size", 64, MOST_PIXELS),
        ("delay", 0.0, 10.0),
    ):
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise BadInput(f"--{name} ({value}) must be from {least} to {most}")
    if config.checks not in (None, 0) and not 2 <= config.checks <= 10_000:
        raise BadInput(f"--checks ({config.checks}) must be 0, for none, or from 2 to 10000: one showing in so many")
    questions_of(config.questions)
    names = []
    for name in config.voters:
        try:
            names.append(voter_name(name))
        except Refused as refused:
            raise BadInput(f"--voters {name!r:.80}: {refused}") from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"--voters names {twice} twice: give each voter a name of their own")
    try:
        ipaddress.ip_address(config.host)
    except ValueError:
        if config.host != "localhost":
            raise BadInput(
                f"--host {config.host} is no address: name 127.0.0.1, 0.0.0.0 or one of this machine's"
            ) from None
    if config.public_url is not None:
        origin_of(config.public_url)


def questions_of(given: tuple[str, ...]) -> dict[str, str]:
    """Return id -> text of the questions that the flag names; none for none. Raises BadInput."""
    found: dict[str, str] = {}
    for one in given:
        text = " ".join(one.split())
        if text in QUESTIONS:
            name, text = text, QUESTIONS[text]
        elif len(text.split()) < 2 and not re.fullmatch(r".*\w.*[?\uff1f]", text):  # not all languages write spaces
            raise BadInput(f"--questions {one!r:.80} is none of {', '.join(QUESTIONS)}: name one, or write a question")
        elif len(text) > LONGEST_QUESTION or not text.isprintable():
            raise BadInput(f"--questions {one!r:.80}: a question is one line of at most {LONGEST_QUESTION} characters")
        else:
            name = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:40].strip("-") or "own"
        if name in found:
            raise BadInput(f"--questions names {name} twice: leave one out, or word it otherwise")
        found[name] = text
    return found


def origin_of(url: str) -> str:
    """Return `scheme://host[:port]` of --public_url, in lower case. Raises BadInput if it is more or less than that."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        whole = False
    if not whole or parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise BadInput(f"--public_url {url} must be like https://votes.example.org, without a path")
    return f"{parts.scheme}://{parts.netloc}".lower()


def changed_questions(recorded: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    """Return the questions to add to those of a session. Raises BadInput where `asked` leaves out or rewords one."""
    for name, text in recorded.items():
        if asked and name not in asked:
            raise BadInput(
                f"--questions leaves out {name}, on which this file has votes or may have: name it too, or another"
                " --votes_file"
            )
        if name in asked and asked[name] != text:
            raise BadInput(f"--questions: {name} is {text!r} in this file; name another --votes_file")
    return {name: text for name, text in asked.items() if name not in recorded}
