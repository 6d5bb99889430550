"""Makes the picture of README.md from a run: the voter's page beside the owner's, docs/vote.png.

    python -m dpo_fast.train --output_dir RUN && python -m benchmarks.vote_pictures RUN

Simulated voters answer first: each prefers the image with the higher score by the run's first scorer, the more often
the more the scores differ, but one answers at random and fails checks. A headless Chromium or Chrome, driven by
Playwright, then shows both pages in light colours. Exit status: 0 done, 2 where RUN or the browser cannot be used.
"""

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.pictures import DOCS, PATIENCE, browser
from dpo_fast.errors import BadInput
from dpo_fast.pictures import save_png
from dpo_fast.votes.desk import Desk, Showing
from dpo_fast.voting.options import VoteConfig
from dpo_fast.voting.session import open_session
from tests.helpers.vote_sessions import running

VOTERS, CARELESS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"), "Finn"
COMPARISONS, VOTES, CHECKS = 48, 5, 12  # pairs of images, votes wanted for each, one check in so many showings
SHARE = 1.04  # answers, those to checks included, of the votes that are wanted
TIES, SECONDS = 0.08, 5.0  # the share of ties; what a vote takes, about
SIZE, GAP = (900, 780), 20  # of a page, pixels, and between the two

Scores = dict[tuple[str, int, str], float]  # prompt, seed, base or policy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the output folder of a run that was evaluated")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the picture is written")
    parser.add_argument("--browser", help="the browser's command; left out: the first that is known")
    parser.add_argument("--seed", type=int, default=0, help="of what the voters answer")
    arguments = parser.parse_args()
    try:
        command = browser(arguments.browser)
        with tempfile.TemporaryDirectory() as folder:
            config = VoteConfig(
                folders=(arguments.run,),
                questions=("general",),
                votes=VOTES,
                max_comparisons=COMPARISONS,
                checks=CHECKS,
                votes_file=Path(folder, "votes.sqlite"),
            )
            simulate(config, scores_of(arguments.run), random.Random(arguments.seed))
            with running(replace(config, voters=("Gül",), checks=0)) as server:
                voter, owner = f"/vote#{server.tokens['Gül']}", f"/owner#{server.owner_token}"
                waits = {server.base + voter: "#stage img", server.base + owner: "#by-voter table"}
                pages = screenshots(command, waits)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    picture = Image.new("RGB", (2 * SIZE[0] + GAP, SIZE[1]), "white")
    for number, page in enumerate(pages):
        picture.paste(page, (number * (SIZE[0] + GAP), 0))
    save_png(picture, arguments.docs / "vote.png")
    print(arguments.docs / "vote.png")
    return 0


def scores_of(run: Path) -> Scores:
    """The scores of a run's images by its first scorer. Raises BadInput if there are none."""
    file = run / "scores.parquet"
    if not file.is_file():
        raise BadInput(f"{file} does not exist: name the folder of a run that was evaluated (--eval_scorers)")
    table = pq.read_table(file)
    scorer = table.schema.names[table.schema.names.index("model") + 1]
    columns = (table[name].to_pylist() for name in ("prompt", "seed", "model", scorer))
    return {(prompt, seed, model): score for prompt, seed, model, score in zip(*columns, strict=True)}


def simulate(config: VoteConfig, scores: Scores, draw: random.Random) -> None:
    """Make the file of votes and let the voters answer, in turn, over the last hour."""
    session = open_session(config)
    try:
        now = time.time() - 3600
        desk = Desk(session.store, checks_every=CHECKS, clock=lambda: now, draw=draw)
        seeds = dict(session.store.connection.execute("SELECT id, seed FROM comparisons"))
        answer = answers(desk, {id_: int(seed) for id_, seed in seeds.items()}, scores, draw)
        with session.store.transaction():
            tokens = {name: desk.add_voter(name) for name in VOTERS}
            for _ in range(round(SHARE * COMPARISONS * VOTES / len(VOTERS))):
                for name in VOTERS:
                    voter = desk.voter_of(tokens[name])
                    desk.resume(voter)
                    showings = desk.screen(voter).showings
                    desk.resume(voter)
                    now += SECONDS * math.exp(draw.gauss(0, 0.4)) * (0.3 if name == CARELESS else 1)
                    if showings:
                        desk.vote(voter, showings[0].id, answer(name, showings[0]))
    finally:
        session.close()


def answers(desk: Desk, seeds: Mapping[int, int], scores: Scores, draw: random.Random) -> Callable[[str, Showing], str]:
    """A function from a voter's name and a showing to the voter's choice."""
    others = {(prompt, seed): score for (prompt, seed, side), score in scores.items() if side == "base"}
    spread = statistics.pstdev(score - others[key[:2]] for key, score in scores.items() if key[2] == "policy") / 2

    def answer(name: str, showing: Showing) -> str:
        row = desk.rows[showing.comparison]
        first, second = (scores[row.prompt, seeds[row.id], side] for side in ("base", "policy"))
        chance = 0.5 if name == CARELESS else 1 / (1 + math.exp((second - first) / spread))
        if name != CARELESS and (showing.kind is not None or draw.random() < TIES):
            return "tie"
        return "left" if (draw.random() < chance) == showing.first_left else "right"

    return answer


def screenshots(command: str, waits: Mapping[str, str]) -> list[Image.Image]:
    """The top of pages: link -> what is waited for."""
    pictures = []
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        # its sandbox needs rights that containers often lack; the pages are ours
        chromium = driver.chromium.launch(executable_path=command, args=["--no-sandbox"])
        for link, selector in waits.items():
            page = chromium.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
            page.goto(link)
            page.wait_for_selector(selector, timeout=1000 * PATIENCE)
            file = Path(folder, "page.png")
            page.screenshot(path=file)
            with Image.open(file) as image:
                pictures.append(image.convert("RGB"))
        chromium.close()
    return pictures


if __name__ == "__main__":
    sys.exit(main())
