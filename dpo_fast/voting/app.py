"""The application: the pages, what a voter's page asks for, and what the owner's page asks for.

Nothing that leaves here before a vote says which model an image is from. Every image is sent after one constant delay;
no handler uses a path, a query or a condition of a request for anything but a look-up in memory.
"""

import asyncio
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from dpo_fast.errors import BadInput
from dpo_fast.files import parse_json
from dpo_fast.votes.desk import Desk, Refused, Screen, Showing
from dpo_fast.votes.store import CHOICES, VoteStore
from dpo_fast.voting.export import write_votes
from dpo_fast.voting.images import Gallery
from dpo_fast.voting.summaries import Summaries
from dpo_fast.voting.writer import Writer

PAGES = {  # path -> file among the package's data, and its type
    "/vote": ("vote.html", "text/html; charset=utf-8"),
    "/owner": ("owner.html", "text/html; charset=utf-8"),
    "/static/vote.js": ("vote.js", "text/javascript; charset=utf-8"),
    "/static/vote.css": ("vote.css", "text/css; charset=utf-8"),
    "/static/owner.js": ("owner.js", "text/javascript; charset=utf-8"),
    "/static/owner.css": ("owner.css", "text/css; charset=utf-8"),
}
SUMMARY_SECONDS = 3.0  # between two summaries, at least; after one that takes longer, as long as that took
NOT_FOUND = "There is nothing here."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """What the application serves."""

    writer: Writer
    gallery: Gallery
    images: Mapping[int, Any]  # id -> file
    store: VoteStore  # for its path: results are read by connections of their own
    summaries: Summaries
    delay: float  # seconds from the request of an image to its response
    link: Callable[[str], str]  # token -> a voter's link


def make_app(site: Site) -> FastAPI:
    """Return the application; `guard.Guard` belongs around it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    ask = _Asking(site)
    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, _page(name, kind), methods=["GET"])
    for path, method, handler in (
        ("/api/join", "POST", ask.join),
        ("/api/pairs", "GET", ask.pairs),
        ("/api/vote", "POST", ask.vote),
        ("/api/undo", "POST", ask.undo),
        ("/api/image/{key}", "GET", ask.image),
        ("/api/owner/results", "GET", ask.results),
        ("/api/owner/voters", "POST", ask.add_voter),
        ("/api/owner/links", "POST", ask.new_link),
        ("/api/owner/exclude", "POST", ask.exclude),
        ("/api/owner/votes.csv", "GET", ask.votes_csv),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        sentence = "This method is not offered." if error.status_code == 405 else NOT_FOUND
        return _json({"error": sentence}, 405 if error.status_code == 405 else 404)

    @app.exception_handler(BadInput)
    async def unreadable(request: Request, error: BadInput) -> Response:
        logger.error("%s", error)
        return _json({"error": "The results cannot be read; the owner's terminal says more."}, 503)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        response = _json({"error": str(error)}, error.status)
        if error.status == 503:
            response.headers["retry-after"] = "1"
        return response

    return app


class _Asking:
    """The handlers of /api."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._summary: dict[str, Any] | None = None
        # the store's state of that summary, and when the next one may be made
        self._summarised: tuple[object, float] = (None, 0.0)
        self._summarising = asyncio.Lock()

    # ---- voters --------------------------------------------------------------------------------------------------

    async def join(self, request: Request) -> Response:
        invitation = _text(await _object(request), "invitation")
        return _json({"token": await self._do(lambda desk: desk.join(invitation))})

    async def pairs(self, request: Request) -> Response:
        token = _token(request)

        def work(desk: Desk) -> tuple[Desk, Screen]:
            voter = _voter(desk, token)
            desk.resume(voter)
            return desk, desk.screen(voter)

        return self._shown(*await self._do(work))

    async def vote(self, request: Request) -> Response:
        token, asked = _token(request), await _object(request)
        showing, choice = _text(asked, "showing"), _text(asked, "choice")
        if choice not in CHOICES:
            raise Refused(400, "A choice is left, right or tie.")

        def work(desk: Desk) -> tuple[Desk, Screen]:
            voter = _voter(desk, token)
            desk.vote(voter, showing, choice)
            return desk, desk.screen(voter)

        return self._shown(*await self._do(work))

    async def undo(self, request: Request) -> Response:
        token = _token(request)
        await _object(request)

        def work(desk: Desk) -> tuple[Desk, Screen]:
            voter = _voter(desk, token)
            desk.undo(voter)
            return desk, desk.screen(voter)

        return self._shown(*await self._do(work))

    async def image(self, request: Request) -> Response:
        begun = time.monotonic()
        token, key = _token(request), request.path_params["key"]

        def work(desk: Desk):
            return desk.image_of(_voter(desk, token), key)

        status, content = 200, b""
        try:
            of = await self._do(work)
            if of is None:
                status, content = 404, _error("This image is not shown to you, or no longer.")
            else:
                gallery, file = self._site.gallery, self._site.images[of.image]
                content = await asyncio.to_thread(gallery.response, file, of.ruined)
        except Refused as refused:
            status, content = refused.status, _error(str(refused))
        except (OSError, ValueError) as error:
            logger.error("an image cannot be sent: %s", error)
            status, content = 503, _error("This image cannot be read; the owner's terminal says more.")
        await asyncio.sleep(max(0.0, begun + self._site.delay - time.monotonic()))
        return Response(content, status, media_type="image/jpeg" if status == 200 else "application/json")

    # ---- the owner -----------------------------------------------------------------------------------------------

    async def results(self, request: Request) -> Response:
        await self._as_owner(request)
        return await self._results()

    async def add_voter(self, request: Request) -> Response:
        name = _text(await self._as_owner(request), "name")

        def work(desk: Desk) -> dict[str, str]:
            token = desk.add_voter(name)
            return {"name": desk.name_of(desk.voter_of(token)), "link": self._site.link(token)}

        return _json(await self._do(work))

    async def new_link(self, request: Request) -> Response:
        name = _text(await self._as_owner(request), "name")
        return _json({"name": name, "link": self._site.link(await self._do(lambda desk: desk.new_token(name)))})

    async def exclude(self, request: Request) -> Response:
        asked = await self._as_owner(request)
        name, excluded = _text(asked, "name"), asked.get("excluded")
        reason = asked.get("reason", "")
        if not isinstance(excluded, bool) or not isinstance(reason, str):
            raise Refused(400, "The request needs excluded (true or false), and its reason is a text.")
        await self._do(lambda desk: desk.exclude(name, excluded, reason))
        return await self._results(anew=True)

    async def votes_csv(self, request: Request) -> Response:
        await self._as_owner(request)
        text = await asyncio.to_thread(self._csv)
        headers = {"content-disposition": 'attachment; filename="votes.csv"'}
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    # ---- within --------------------------------------------------------------------------------------------------

    async def _do(self, work: Callable[[Desk], Any]) -> Any:
        future: Future = self._site.writer.submit(work)
        return await asyncio.wrap_future(future)

    async def _as_owner(self, request: Request) -> dict[str, Any]:
        """The body of a request of the owner; raises Refused for anybody else's."""
        token = _token(request)

        def work(desk: Desk) -> None:
            if not desk.is_owner(token):
                _voter(desk, token)
                raise Refused(403, "This page is the owner's.")

        await self._do(work)
        return await _object(request) if request.method == "POST" else {}

    def _shown(self, desk: Desk, screen: Screen) -> Response:
        return _json(
            {
                "pairs": [self._pair(desk, showing) for showing in screen.showings],
                "done": screen.done,
                "target": screen.target,
                "can_undo": screen.can_undo,
                "finished": screen.finished,
            }
        )

    def _pair(self, desk: Desk, showing: Showing) -> dict[str, object]:
        left, right = showing.keys
        return {
            "showing": showing.id,
            "question": {"id": showing.question, "text": desk.questions[showing.question]},
            "prompt": desk.rows[showing.comparison].prompt,
            "left": f"/api/image/{left}",
            "right": f"/api/image/{right}",
            "width": self._site.gallery.size.width,
            "height": self._site.gallery.size.height,
        }

    async def _results(self, anew: bool = False) -> Response:
        """The results. anew: those of this moment, also if a summary is being made or was made just now."""
        async with self._summarising:
            state, after = await asyncio.to_thread(self._state), self._summarised[1]
            if anew or self._summary is None or (state != self._summarised[0] and time.monotonic() >= after):
                begun = time.monotonic()
                self._summary = await asyncio.to_thread(self._site.summaries.make)
                took = time.monotonic() - begun
                self._summarised = state, begun + took + max(SUMMARY_SECONDS, took)
            return _json({**self._summary, "live": await self._do(lambda desk: desk.live())})

    def _state(self) -> tuple[object, ...]:
        with VoteStore.read(self._site.store.path) as store:
            return store.changes()

    def _csv(self) -> str:
        with VoteStore.read(self._site.store.path) as store:
            votes = store.votes(excluded=True)
        text = io.StringIO()
        write_votes(text, votes)
        return text.getvalue()


def _page(name: str, kind: str) -> Callable:
    """A handler that sends one file of the package, read now."""
    content = files("dpo_fast.voting").joinpath("pages", name).read_bytes()

    async def page() -> Response:
        return Response(content, headers={"content-type": kind})

    return page


def _token(request: Request) -> str:
    """The token of a request. Raises Refused (401) if there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > 200:
        raise Refused(401, "Open the link that you were given.")
    return token


def _voter(desk: Desk, token: str) -> int:
    """The voter of a token. Raises Refused: 401 for an unknown one, 403 for the owner's."""
    voter = desk.voter_of(token)
    if voter is None and desk.is_owner(token):
        raise Refused(403, "This link is the owner's, not a voter's.")
    if voter is None:
        raise Refused(401, "This link is not valid, or no longer; ask for another.")
    return voter


async def _object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body. Raises Refused (400) for anything else."""
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ValueError("another type")
        value = parse_json(await request.body())
    except ValueError:
        raise Refused(400, "The request is no JSON.") from None
    if not isinstance(value, dict):
        raise Refused(400, "The request is no JSON object.")
    return value


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise Refused(400, f"The request needs {name}, a text.")
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, which no file can hold
        raise Refused(400, f"The request needs {name}, a text.") from None
    return text


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), status, media_type="application/json")


def _error(sentence: str) -> bytes:
    return json.dumps({"error": sentence}).encode()
