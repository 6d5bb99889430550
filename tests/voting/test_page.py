"""The pages of a vote in a real browser: whole sessions by keyboard and by touch, what the store holds after them, lost
connections, any prompt on any screen, and the owner's page."""

import html.parser
import os
import random
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

import dpo_fast
from dpo_fast.votes.records import Vote
from dpo_fast.votes.store import VoteStore
from dpo_fast.votes.tally import summary_of
from dpo_fast.voting.options import VoteConfig
from dpo_fast.voting.summaries import summary_of_file
from tests.helpers.browsers import Visit, started_browser
from tests.helpers.vote_sessions import Client, running

PAGES = Path(dpo_fast.__file__).parent / "voting" / "pages"
REPORT = PAGES.parents[1] / "evaluation" / "report" / "base.css"
SHOTS = "DPO_FAST_SCREENSHOTS"  # a folder: pictures of the pages are kept there
MODELS = {"plain": (190, 60, 50), "vivid": (40, 80, 200)}  # the colour of each model's images
PROMPTS = [f"a house number {number} at the sea" for number in range(8)]
ODD_PROMPTS = {
    "long": "a very detailed painting of a lighthouse in a storm " * 39,
    "unbroken": "lighthouse" * 200,
    "right to left": "حصان يركض على الشاطئ عند الغروب، لوحة زيتية بألوان دافئة",
    "mixed": "שקיעה over the city, 夕焼けの街, закат над городом 🌇",
    "markup": "<b>bold</b> <script>document.title = 'taken'</script> <img src=x onerror=alert(1)> &amp; \"quoted\"",
}
PHONE = {"viewport": {"width": 390, "height": 664}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
OFFLINE = ("ERR_INTERNET_DISCONNECTED", "ERR_FAILED")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_browser() as started:
        yield started


class Site(NamedTuple):
    """A vote that is served."""

    links: dict[str, str]  # voter's name -> link
    invitation: str  # the link with which everyone can join
    owner: str  # the owner's link
    file: Path

    def votes(self, voter: str) -> list[Vote]:
        """The votes of one voter, excluded or not, oldest first."""
        with VoteStore.read(self.file) as store:
            return [vote for vote in store.votes(excluded=True) if vote.voter == voter]


def make_images(home: Path, prompts: list[str], size: tuple[int, int], models: dict[str, Any]) -> list[Path]:
    """Write an image of each prompt by each model, and return the models' folders."""
    folders = []
    for model, colour in models.items():
        (home / model).mkdir()
        for number, prompt in enumerate(prompts):
            image = Image.new("RGB", size, colour)
            ImageDraw.Draw(image).ellipse([20, 20, 120 + 10 * number, 120], fill=(240, 220, 60))
            texts = PngInfo()
            texts.add_itxt("prompt", prompt)
            image.save(home / model / f"{number}.png", pnginfo=texts)
        folders.append(home / model)
    return folders


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[Callable[..., Site]]:
    """A function that serves a vote of voters on prompts."""
    with ExitStack() as stack:

        def start(
            voters: list[str],
            prompts: list[str] = PROMPTS,
            size: tuple[int, int] = (320, 320),
            models: dict[str, Any] = MODELS,
            **options: Any,
        ) -> Site:
            home = tmp_path_factory.mktemp("vote")
            config = VoteConfig(
                folders=tuple(make_images(home, prompts, size, models)),
                questions=("general",),
                votes=max(len(voters), 1),
                voters=tuple(voters),
                checks=0,
                delay=0.05,
                votes_file=home / "votes.sqlite",
                **options,
            )
            server = stack.enter_context(running(config))
            # in this process, since the start of another takes seconds; tests/voting/test_app.py has the real one
            server.session.summaries.make = lambda: summary_of_file(config.votes_file)
            links = {name: f"{server.base}/vote#{token}" for name, token in server.tokens.items()}
            invitation = server.writer.submit(lambda desk: desk.new_invitation()).result()
            joining = f"{server.base}/vote#join={invitation}"
            return Site(links, joining, f"{server.base}/owner#{server.owner_token}", config.votes_file)

        yield start


# ---- one voter at the page -------------------------------------------------------------------------------------------


def until(happened: Callable[[], bool]) -> None:
    """Wait for something. (Playwright's own way evaluates text as code, which the pages' policy forbids.)"""
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.03)


class Voter:
    """Does what a person does, and writes down what was on the screen."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.page = visit, visit.page
        self.voted: list[tuple[str, str, str]] = []  # prompt, model on the left, choice

    def ready(self, done: int | None = None) -> None:
        """Wait until a pair takes votes: it is shown, and new no longer."""
        if done is not None:
            self.counts(done)
        self.page.wait_for_selector("body[data-state=voting]")
        self.page.wait_for_timeout(300)

    def counts(self, done: int) -> None:
        """Wait until the page says that so many votes are done."""
        until(lambda: self.page.locator("#count").text_content().startswith(f"{done} "))

    def prompt(self) -> str:
        return self.page.locator("#prompt-text").text_content()

    def model(self, side: str) -> str:
        """Whose image stands at a side, by the colour of its corner."""
        red, _, blue = self.page.evaluate(
            """(side) => {
              const canvas = document.createElement("canvas");
              const pen = canvas.getContext("2d");
              pen.drawImage(document.querySelector(`#${side} img`), 0, 0);
              return [...pen.getImageData(2, 2, 1, 1).data].slice(0, 3);
            }""",
            side,
        )
        return "plain" if red > blue else "vivid"

    def vote(self, choice: str, act: Callable[[], None]) -> None:
        """Vote by `act`, and wait for the next pair."""
        done = len(self.voted)
        self.voted.append((self.prompt(), self.model("left"), choice))
        assert {self.model("left"), self.model("right")} == set(MODELS)
        act()
        self.counts(done + 1)

    def undo(self, act: Callable[[], None]) -> None:
        """Take the last vote back by `act`, and check that its pair is there again as it was."""
        prompt, left, _ = self.voted.pop()
        act()
        self.ready(len(self.voted))
        assert (self.prompt(), self.model("left")) == (prompt, left)

    def press(self, key: str) -> Callable[[], None]:
        return lambda: self.page.keyboard.press(key)

    def middle(self, selector: str) -> tuple[float, float]:
        box = self.page.locator(selector).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def same_as_stored(voted: list[tuple[str, str, str]], stored: list[Vote]) -> None:
    """Every vote is in the store once, for the model that stood where the voter chose."""
    seen = []
    for vote in stored:
        left, right = vote.models if vote.first_left else vote.models[::-1]
        chosen = {1.0: vote.models[0], 0.0: vote.models[1], 0.5: None}[vote.outcome]
        choice = {left: "left", right: "right", None: "tie"}[chosen]
        seen.append((vote.prompt, left, choice))
        assert vote.question == "general" and 0 < vote.seconds < 600
    assert seen == voted


def transforms(page: Any) -> set[tuple[str, ...]]:
    """How both images are placed in their frames."""
    places = "(all) => all.map(({ style }) => [style.transform, style.width, style.height])"
    return set(map(tuple, page.locator("figure img").evaluate_all(places)))


def frames(page: Any) -> tuple[dict[str, float], dict[str, float]]:
    return page.locator("#left").bounding_box(), page.locator("#right").bounding_box()


@pytest.fixture(scope="module")
def site(serve) -> Site:
    return serve(["Ada", "Ben", "Cleo", "Dan"])


def test_a_session_by_keyboard(browser, site):
    visit = Visit(browser, site.links["Ada"], viewport={"width": 1280, "height": 720})
    voter, page = Voter(visit), visit.page
    voter.ready()
    assert page.locator("#question").text_content() == "Which image do you prefer?"
    assert page.get_by_alt_text("Left image").count() == page.get_by_alt_text("Right image").count() == 1
    left, right = frames(page)
    assert (left["width"], left["height"]) == (right["width"], right["height"]) and left["y"] == right["y"]

    whole = transforms(page)
    voter.press(" ")()
    zoomed = transforms(page)
    assert len(whole) == len(zoomed) == 1 and whole != zoomed  # both alike
    voter.press("ArrowDown")()  # moves, and is no vote
    assert len(transforms(page)) == 1 and transforms(page) != zoomed
    voter.press(" ")()
    assert transforms(page) == whole

    for choice, key in [("left", "1"), ("right", "2"), ("tie", "0"), ("left", "ArrowLeft"), ("right", "ArrowRight")]:
        voter.vote(choice, voter.press(key))
        assert len(site.votes("Ada")) == len(voter.voted)
        voter.ready()
    assert "Pair 6 of 8" in page.locator("#say").text_content()
    voter.undo(voter.press("u"))
    voter.undo(voter.press("u"))
    same_as_stored(voter.voted, site.votes("Ada"))

    voter.voted.append((voter.prompt(), voter.model("left"), "right"))
    for _ in range(12):  # a key held down
        page.keyboard.down("2")
    page.keyboard.up("2")
    voter.ready(4)
    page.reload()
    voter.ready(4)
    page.locator("[data-choice=tie]").focus()
    voter.vote("tie", voter.press("Enter"))
    voter.ready()
    assert page.evaluate("document.activeElement.dataset.choice") == "tie"  # focus stays for the next pair
    page.locator("#pause").click()
    page.wait_for_selector("body[data-state=pause]")
    assert page.evaluate("document.activeElement.id") == "message-title"
    assert "5 votes, all saved. 3 to go. You can stop here" in page.locator("#message-text").text_content()
    page.locator("#go-on").click()
    voter.ready(5)
    voter.vote("left", voter.press("1"))
    voter.ready()
    voter.vote("right", voter.press("2"))
    voter.ready()
    voter.vote("tie", voter.press("0"))
    page.wait_for_selector("body[data-state=finished]")
    assert "Your 8 votes are saved" in page.locator("#message-text").text_content()
    same_as_stored(voter.voted, site.votes("Ada"))
    assert sorted(vote.prompt for vote in site.votes("Ada")) == PROMPTS
    visit.close()


def test_a_session_by_touch(browser, site):
    visit = Visit(browser, site.links["Ben"], **PHONE)
    voter, page = Voter(visit), visit.page
    voter.ready()
    left, right = frames(page)
    assert (left["width"], left["height"]) == (right["width"], right["height"]) and left["y"] == right["y"]
    assert left["x"] >= 0 and right["x"] + right["width"] <= 390  # both seen at once
    assert page.locator("#controls").bounding_box()["y"] + page.locator("#controls").bounding_box()["height"] <= 664

    def tap(selector: str) -> Callable[[], None]:
        return lambda: page.touchscreen.tap(*voter.middle(selector))

    x, y = voter.middle("#images")
    visit.swipe(x, y, 30)  # too short, and
    visit.swipe(x, y, 20, 150)  # not sideways
    visit.swipe(x, y, 120, 140)
    page.wait_for_timeout(300)
    assert not site.votes("Ben") and page.locator("figure.chosen").count() == 0
    voter.vote("left", lambda: visit.swipe(x, y, -130))
    voter.ready()
    voter.vote("right", lambda: visit.swipe(x, y, 130))
    voter.ready()
    voter.vote("left", tap("#left"))
    voter.ready()
    voter.vote("right", tap("#right"))
    voter.ready()
    voter.undo(tap("#undo"))
    voter.vote("tie", tap("[data-choice=tie]"))
    voter.ready()

    visit.fingers("touchStart", (x - 30, y))
    visit.fingers("touchStart", (x - 30, y), (x + 30, y))
    for apart in (50, 80, 110):
        visit.fingers("touchMove", (x - apart, y), (x + apart, y))
    visit.fingers("touchEnd")
    zoomed = transforms(page)
    assert page.locator("#zoom").get_attribute("aria-pressed") == "true" and len(zoomed) == 1
    visit.swipe(x, y, 60, 10)  # moves both images, and is no vote
    assert len(transforms(page)) == 1 and transforms(page) != zoomed
    page.touchscreen.tap(*voter.middle("#left"))
    tap("#zoom")()
    page.wait_for_timeout(300)
    assert len(site.votes("Ben")) == 4
    assert page.locator("#zoom").get_attribute("aria-pressed") == "false"

    visit.context.set_offline(True)
    voter.voted.append((voter.prompt(), voter.model("left"), "left"))
    tap("#left")()
    page.wait_for_selector("#trouble:visible")
    assert "Your vote is kept" in page.locator("#trouble-text").text_content()
    tap("#right")()  # nothing else can be voted meanwhile
    visit.swipe(x, y, 130)
    assert len(site.votes("Ben")) == 4
    visit.context.set_offline(False)
    voter.ready(5)
    assert page.locator("#trouble").is_hidden()
    visit.forget(*OFFLINE)
    same_as_stored(voter.voted, site.votes("Ben"))
    for _ in range(3):
        voter.ready()
        voter.vote("right", lambda: visit.swipe(x, y, 130))
    page.wait_for_selector("body[data-state=finished]")
    same_as_stored(voter.voted, site.votes("Ben"))
    visit.close()


def test_a_vote_is_kept_until_it_is_confirmed(browser, site):
    visit = Visit(browser, site.links["Cleo"], viewport={"width": 1000, "height": 700})
    voter, page = Voter(visit), visit.page
    voter.ready()
    answers = []

    def lose_the_answer(route: Any) -> None:
        if not answers:
            answers.append(route.fetch())  # it arrives, but the page does not learn of it
            route.abort()
        else:
            route.continue_()

    page.route("**/api/vote", lose_the_answer)
    voter.vote("left", voter.press("1"))
    voter.ready()
    page.unroute("**/api/vote")
    assert [answer.status for answer in answers] == [200]
    same_as_stored(voter.voted, site.votes("Cleo"))

    voter.voted.append((voter.prompt(), voter.model("left"), "right"))
    page.locator("[data-choice=right]").dblclick()  # is one vote
    voter.ready(2)

    page.route("**/api/vote", lambda route: route.abort())
    voter.voted.append((voter.prompt(), voter.model("left"), "tie"))
    voter.press("0")()
    page.wait_for_selector("#trouble:visible")
    assert len(site.votes("Cleo")) == 2
    page.on("dialog", lambda dialog: dialog.accept())  # the page asks before it is left with a vote unsent
    page.unroute("**/api/vote")
    page.goto("about:blank")
    page.goto(site.links["Cleo"])
    voter.ready(3)
    visit.forget(*OFFLINE)
    same_as_stored(voter.voted, site.votes("Cleo"))

    other = Visit(browser, site.links["Cleo"], viewport={"width": 1000, "height": 700})  # a second window
    elsewhere = Voter(other)
    elsewhere.voted = [*voter.voted]
    elsewhere.ready(3)
    elsewhere.vote("left", elsewhere.press("1"))
    voter.press("2")()  # the first vote on a pair stands
    voter.ready(4)
    assert "did not count" in page.locator("#note").text_content()
    same_as_stored(elsewhere.voted, site.votes("Cleo"))
    other.close()
    visit.forget("409")
    visit.close()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.exhaustive) for name in ODD_PROMPTS] + ["all"])
def test_any_prompt_on_any_screen(browser, serve, name):
    prompts = list(ODD_PROMPTS.values()) if name == "all" else [ODD_PROMPTS[name]]
    site = serve(["Eve"], prompts)
    screens = [(320, 568), (640, 360), (390, 664), (1280, 720)]  # 640 x 360: 1280 x 720 at a zoom of 200 %
    visit = Visit(browser, site.links["Eve"], viewport={"width": 320, "height": 568})
    voter, page = Voter(visit), visit.page
    seen = []
    for done in range(len(prompts)):
        voter.ready(done)
        seen.append(voter.prompt())
        for width, height in screens:
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(50)
            left, right = frames(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.documentElement.scrollHeight") <= height  # nothing to scroll for
            assert (left["width"], left["height"]) == (right["width"], right["height"])
            assert left["width"] >= min(width / 2 - 20, 0.4 * height)
            for box in (left, right, page.locator("#controls").bounding_box()):
                assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
        assert page.locator("#prompt-text *").count() == 0  # text, whatever it looks like
        voter.press("0")()
    assert sorted(seen) == sorted(" ".join(prompt.split()) for prompt in prompts)
    visit.close()


@pytest.mark.parametrize("size, stacked", [((640, 360), True), ((360, 640), False)])
@pytest.mark.exhaustive
def test_wide_images_stand_above_each_other_on_a_phone(browser, serve, size, stacked):
    site = serve(["Eve"], PROMPTS[:2], size=size)
    visit = Visit(browser, site.links["Eve"], **PHONE)
    voter, page = Voter(visit), visit.page
    voter.ready()
    left, right = frames(page)
    assert (left["width"], left["height"]) == (right["width"], right["height"])
    assert (left["x"] == right["x"] and left["y"] < right["y"]) is stacked
    names = ("Top", "Bottom") if stacked else ("Left", "Right")
    assert [page.get_by_alt_text(f"{name} image").count() for name in names] == [1, 1]
    voter.vote("left", voter.press("ArrowUp" if stacked else "ArrowLeft"))
    voter.ready()
    voter.vote("right", lambda: page.touchscreen.tap(*voter.middle("#right")))
    same_as_stored(voter.voted, site.votes("Eve"))
    visit.close()


def test_the_open_link_makes_one_voter_of_a_browser(browser, serve):
    site = serve([], PROMPTS, open_link=True)
    visit = Visit(browser, site.invitation, viewport={"width": 1000, "height": 700})
    voter, page = Voter(visit), visit.page
    voter.ready()
    voter.vote("left", voter.press("1"))
    page.reload()
    voter.ready(1)
    page.goto("about:blank")
    page.goto(site.invitation)
    voter.ready(1)
    same_as_stored(voter.voted, site.votes("guest 1"))

    page.locator("#help").click()
    page.locator("#keys").uncheck()
    page.get_by_role("button", name="Close").click()
    voter.press("1")()  # keys were switched off
    page.reload()  # also for the next time
    voter.ready(1)
    voter.press("1")()
    page.wait_for_timeout(300)
    same_as_stored(voter.voted, site.votes("guest 1"))
    voter.vote("right", page.locator("[data-choice=right]").click)
    page.wait_for_selector("body[data-state=voting]")
    same_as_stored(voter.voted, site.votes("guest 1"))
    with VoteStore.read(site.file) as store:
        assert store.voters() == ["guest 1"]
    visit.close()


@pytest.mark.exhaustive
def test_the_page_offers_a_break(browser, serve):
    site = serve(["Eve"], [f"a house number {number} at the sea" for number in range(26)])
    visit = Visit(browser, site.links["Eve"], viewport={"width": 1000, "height": 700})
    voter, page = Voter(visit), visit.page
    for _ in range(20):
        voter.ready()
        voter.vote("tie", voter.press("0"))
    page.wait_for_selector("body[data-state=pause]")
    assert page.locator("#message-text").text_content().startswith("20 votes, all saved. 6 to go. You can stop here")
    voter.undo(page.locator("#take-back").click)
    for _ in range(7):
        voter.ready()
        voter.vote("left", voter.press("1"))
    page.wait_for_selector("body[data-state=finished]")
    same_as_stored(voter.voted, site.votes("Eve"))
    visit.close()


def test_one_vote_is_not_many(browser, serve):
    visit = Visit(browser, serve(["Fay"], PROMPTS[:1]).links["Fay"], viewport={"width": 1000, "height": 700})
    voter = Voter(visit)
    voter.ready()
    voter.vote("left", voter.press("1"))
    visit.page.wait_for_selector("body[data-state=finished]")
    assert "Your vote is saved. You can" in visit.page.locator("#message-text").text_content()
    visit.close()


def test_links_that_do_not_work_say_so(browser, site):
    for ending, said in (("#wrong", "This link does not work"), ("", "This link is not whole")):
        visit = Visit(browser, site.links["Ada"].partition("#")[0] + ending)
        visit.page.wait_for_selector("body[data-state=refused]")
        assert visit.page.locator("h1:visible").text_content() == said
        visit.forget("401")
        visit.close()


def fixed(value: float, digits: int) -> str:
    """A number as JavaScript's toFixed writes it: halves away from 0, where Python takes the even neighbour."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


# ---- the owner -------------------------------------------------------------------------------------------------------


def test_the_owners_page(browser, serve):
    site = serve(["Eve", "Finn"])
    voting = Visit(browser, site.links["Eve"], viewport={"width": 1000, "height": 700})
    voter = Voter(voting)
    for key, choice in (("1", "left"), ("2", "right"), ("0", "tie")):
        voter.ready()
        voter.vote(choice, voter.press(key))
    visit = Visit(browser, site.owner, viewport={"width": 390, "height": 700})
    page = visit.page
    page.wait_for_selector("#by-voter tbody tr")
    row = page.locator("#by-voter tr", has_text="Eve")
    assert page.locator("#by-voter tr", has_text="Finn").locator("td").first.text_content() == "0"  # not yet
    seen = page.locator("#by-voter tbody tr td:nth-child(8)").all_text_contents()
    assert seen == ["now", "–"]
    assert row.locator("td").first.text_content() == "3"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # tables scroll in their own boxes
    assert page.locator("svg[role=img]").first.get_attribute("aria-label").startswith("vivid against plain: win rate")

    voter.ready()
    voter.vote("left", voter.press("1"))
    voting.close()
    until(lambda: row.locator("td").first.text_content() == "4")  # live

    row.get_by_role("button", name="Exclude").click()
    page.locator("#sure-yes").click()  # a reason is wanted
    assert page.locator("#sure").is_visible()
    page.locator("#reason").fill("<i>asleep</i>")
    page.keyboard.press("Enter")
    page.wait_for_selector("#by-voter tr.out")
    assert "Excluded: <i>asleep</i>" in row.text_content()
    with VoteStore.read(site.file) as store:
        assert store.excluded() == {"Eve": "<i>asleep</i>"} and not store.votes()
    row.get_by_role("button", name="Include").click()
    page.locator("#sure-yes").click()
    page.wait_for_selector("#by-voter tr.out", state="detached")
    with VoteStore.read(site.file) as store:
        assert not store.excluded() and len(store.votes()) == 4

    page.locator("#name").fill("Gül")
    page.get_by_role("button", name="Add").click()
    page.wait_for_selector("#link:visible")
    page.wait_for_selector("#by-voter tr >> text=Gül")
    link = page.locator("#link-value").input_value()
    page.locator("#name").fill("Gül")  # there is one already: a new link, and the old one is dead
    page.get_by_role("button", name="Add").click()
    page.locator("#sure-yes").click()
    until(lambda: page.locator("#link-value").input_value() != link)
    visit.forget("409")
    for url, state in ((link, "refused"), (page.locator("#link-value").input_value(), "voting")):
        guest = Visit(browser, url)
        guest.page.wait_for_selector(f"body[data-state={state}]")
        guest.forget("401")
        guest.close()

    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "votes.csv"
    assert len(Path(download.value.path()).read_text().splitlines()) == 5

    visit.close()


@pytest.mark.exhaustive
def test_the_owners_page_asks_only_while_it_is_seen(browser, site):
    visit = Visit(browser, site.owner)
    page = visit.page
    page.wait_for_selector("#by-voter *", state="attached")
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    before = len(visit.requested)
    page.wait_for_timeout(4600)
    assert len(visit.requested) == before + 1
    page.evaluate(hide, True)
    page.wait_for_timeout(6000)
    assert len(visit.requested) == before + 1
    page.evaluate(hide, False)
    until(lambda: len(visit.requested) == before + 2)
    visit.close()


@pytest.mark.exhaustive
def test_the_owners_page_of_several_models(browser, serve, seed):
    site = serve(["Eve", "Finn", "Gus"], models=MODELS | {"dark": (20, 20, 20), "<u>pale": "white"})
    draw = random.Random(seed)
    for link in site.links.values():
        base, _, token = link.partition("/vote#")
        client = Client(base, token)
        while pairs := client.pairs()["pairs"]:
            assert client.vote(pairs[0]["showing"], draw.choice(("left", "right", "tie"))).status_code == 200
    with VoteStore.read(site.file) as store:
        summary = summary_of(store.votes(), store.checks(), store.settings())["questions"]["general"]
    visit = Visit(browser, site.owner, viewport={"width": 1280, "height": 800})
    page = visit.page
    page.wait_for_selector("#by-voter tbody tr")
    spoken = page.locator("svg[role=img]").evaluate_all("(all) => all.map((one) => one.getAttribute('aria-label'))")
    expected = [
        f"{second} against {first}: win rate {fixed(pair['win_rate'], 3)},"
        f" 95% interval {fixed(low, 3)} to {fixed(high, 3)}"
        for pair in summary["pairs"]
        for (first, second), (low, high) in [(pair["models"], pair["ci95"])]
    ]
    expected += [
        f"{row['model']}: strength {fixed(row['strength'], 2)},"
        f" 95% interval {fixed(row['ci95'][0], 2)} to {fixed(row['ci95'][1], 2)}"
        for row in summary["ranking"]
    ]
    assert len(spoken) == 6 + 4 and spoken == [line.replace("-", "\N{MINUS SIGN}") for line in expected]
    alpha = f"alpha {fixed(summary['alpha'], 2)}".replace("-", "\N{MINUS SIGN}")
    assert alpha in page.locator(".agreement").text_content()
    table = page.locator("#questions table").first
    page.locator("summary").first.click()
    won = [[str(pair[name]) for name in ("wins", "ties", "losses", "votes")] for pair in summary["pairs"]]
    rows = table.locator("tbody tr").all()
    assert [[cell.text_content() for cell in row.locator("td").all()[2:6]] for row in rows] == won
    assert page.locator("main u").count() == 0  # a model's name is text
    visit.close()


def test_the_owners_page_is_not_a_voters(browser, site):
    visit = Visit(browser, site.links["Dan"].replace("/vote#", "/owner#"))
    visit.page.wait_for_selector("#trouble:visible")
    assert "owner" in visit.page.locator("#trouble").text_content()
    assert visit.page.locator("#voters").is_hidden()
    visit.forget("403")
    visit.close()


# ---- what can be told without a browser ------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


@pytest.mark.parametrize("name", ["vote", "owner"])
def test_pages_hold_no_code_and_load_nothing_from_elsewhere(name):
    tags = Tags((PAGES / f"{name}.html").read_text()).tags
    assert "style" not in {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not [key for key in attributes if key == "style" or key.startswith("on")]
        assert tag != "script" or attributes == {"src": f"/static/{name}.js", "defer": None}
        assert (attributes.get("href") or attributes.get("src") or "/static/").startswith("/static/")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    script = (PAGES / f"{name}.js").read_text()
    assert len(ids) == len(set(ids)) and set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(ids)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    assert set(re.findall(r"https?:[^\"]*", script)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "url(" not in (PAGES / f"{name}.css").read_text() and "@import" not in (PAGES / f"{name}.css").read_text()


def test_colours_are_those_of_the_report():
    roots = [re.findall(r":root \{.*?\}", " ".join(file.read_text().split())) for file in (PAGES / "vote.css", REPORT)]
    assert roots[0] == roots[1] and len(roots[0]) == 2


# ---- accessibility, and pictures to look at --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """axe-core's script from npm; where npm cannot get it, the test is skipped."""
    home = tmp_path_factory.mktemp("axe")
    try:
        subprocess.run(["npm", "pack", "axe-core", "--silent"], cwd=home, check=True, timeout=120, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"npm gets no axe-core: {error}")
    (archive,) = home.glob("axe-core-*.tgz")
    with tarfile.open(archive) as opened:
        return opened.extractfile("package/axe.min.js").read().decode()


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 664)])
def test_axe_finds_no_serious_fault(browser, serve, axe, tmp_path, scheme, width, height):
    site = serve(["Eve", "Finn"], PROMPTS[:3])
    folder = Path(os.environ.get(SHOTS) or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    touch = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme, **touch}

    def judge(visit: Visit, name: str, full: bool = False) -> None:
        found = visit.page.evaluate(axe + "; axe.run(document, { resultTypes: ['violations'] })")
        faults = [f"{one['impact']} {one['id']}: {one['nodes'][0]['html']}" for one in found["violations"]]
        print(f"{name}, {scheme}, {width}: {found['testEngine']['version']}, {faults or 'no violation'}")
        assert not [line for line in faults if line.startswith(("serious", "critical"))]
        visit.page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=full)

    visit = Visit(browser, site.links["Eve"], **options)
    voter = Voter(visit)
    voter.ready()
    judge(visit, "voter")
    visit.page.locator("#help").click()
    judge(visit, "help")
    visit.page.keyboard.press("Escape")
    visit.page.locator("#pause").click()
    judge(visit, "pause")
    visit.page.locator("#go-on").click()
    for key, choice in (("1", "left"), ("2", "right"), ("0", "tie")):
        voter.ready()
        voter.vote(choice, voter.press(key))
    visit.page.wait_for_selector("body[data-state=finished]")
    judge(visit, "finished")
    visit.close()

    owner = Visit(browser, site.owner, **options)
    owner.page.wait_for_selector("#by-voter tbody tr")
    for summary in owner.page.locator("summary").all():
        summary.click()
    judge(owner, "owner", full=True)
    owner.page.get_by_role("button", name="Exclude").first.click()
    judge(owner, "exclude")
    owner.page.evaluate("document.getElementById('sure').append(document.createElement('button'))")
    with pytest.raises(AssertionError, match="button-name"):  # axe sees what it should
        judge(owner, "planted")
    owner.close()
