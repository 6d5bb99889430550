"""What stands between the network and the application: limits on connections, time, size and rate, and the headers.

`GuardedProtocol` is uvicorn's HTTP protocol with limits on connections (all, and of one address) and on time (headers,
a whole request). `Guard` is the ASGI application around the real one: it checks Host and Origin, limits the rate of
each address and each token and the size of a body, and sets the same headers on every response.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:; connect-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
]
METHODS = ("GET", "POST")
TOO_FAST = "That was too fast; try again in a moment."
MOST_BUCKETS = 10_000  # addresses and tokens that are remembered, each


@dataclass(frozen=True)
class Rate:
    """A token bucket: `burst` at once, `per_second` in the long run."""

    per_second: float
    burst: float


@dataclass(frozen=True)
class Limits:
    """What a server bears. Seconds and bytes."""

    connections: int = 800  # open at once
    connections_of_address: int = 400  # of these from one address: voters behind one router share theirs
    header_seconds: float = 10.0  # from a connection, or its first byte of a request, until the headers are there
    body_seconds: float = 10.0
    request_seconds: float = 60.0  # from the headers until the response was taken
    idle_seconds: float = 30.0  # between two requests of a connection
    header_bytes: int = 16 << 10
    body_bytes: int = 4 << 10
    address: Rate = Rate(400, 800)
    token: Rate = Rate(20, 60)  # a vote and its two images are three requests
    joins: Rate = Rate(1, 200)  # of an address: new voters by the open link


class Buckets:
    """Token buckets by key; the least recently used are forgotten, which fills them again."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._levels: OrderedDict[object, tuple[float, float]] = OrderedDict()  # key -> level, and when

    def wait(self, key: object) -> float:
        """Take 1 and return 0, or return the seconds after which that will be possible."""
        now = self._clock()
        level, at = self._levels.pop(key, (self._rate.burst, now))
        level = min(self._rate.burst, level + (now - at) * self._rate.per_second)
        lacking = 1.0 - level
        self._levels[key] = level - (lacking <= 0), now
        while len(self._levels) > MOST_BUCKETS:
            self._levels.popitem(last=False)
        return max(0.0, lacking) / self._rate.per_second


class Guard:
    """An ASGI application around `app`. See the module."""

    def __init__(
        self,
        app: Callable,
        limits: Limits,
        hosts: Collection[str],  # that a Host header may name, in lower case
        origins: Collection[str] = (),  # that an Origin header may name besides http://HOST
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._limits = app, limits
        self.hosts, self.origins = set(hosts), set(origins)
        self._of_address, self._of_token = Buckets(limits.address, clock), Buckets(limits.token, clock)
        self._joins = Buckets(limits.joins, clock)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return  # there is nothing but HTTP here
        headers: dict[bytes, bytes] = dict(scope["headers"])
        address = (scope.get("client") or ("",))[0]
        refusal = self._refusal(scope, headers, address)
        started = False

        async def guarded_send(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        if refusal is not None:
            await _answer(guarded_send, *refusal)
            return
        body = await self._body(receive, headers)
        if isinstance(body, tuple):
            await _answer(guarded_send, *body)
            return
        if body is None:
            return  # the client has gone

        async def whole() -> dict[str, Any]:
            nonlocal body
            if body is not None:
                message = {"type": "http.request", "body": body, "more_body": False}
                body = None
                return message
            return await receive()

        try:
            await self._app(scope, whole, guarded_send)
        except Exception:
            logger.exception("an error in the vote server")
            if not started:
                await _answer(guarded_send, 500, "Something went wrong here; the owner's terminal says more.")

    def _refusal(
        self, scope: dict, headers: dict[bytes, bytes], address: str
    ) -> tuple[int, str] | tuple[int, str, float] | None:
        """The status and sentence of a refusal, and after how many seconds to try again; None: there is none."""
        if seconds := self._of_address.wait(address):
            return 429, TOO_FAST, seconds
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host not in self.hosts and host != _own_host(scope):
            return 421, "This server is not known by the name in the address."
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in self.origins and origin != f"{scope.get('scheme', 'http')}://{host}":
            return 403, "Requests from other sites are refused."
        if headers.get(b"sec-fetch-site", b"same-origin") == b"cross-site" and scope["path"].startswith("/api"):
            return 403, "Requests from other sites are refused."
        if scope["method"] not in METHODS:
            return 405, "This method is not offered."
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.header_bytes:
            return 431, f"The headers of a request have at most {self._limits.header_bytes} bytes."
        seconds = self._of_token.wait(_token_key(headers)) if b"authorization" in headers else 0.0
        if scope["path"] == "/api/join":
            seconds = max(seconds, self._joins.wait(address))
        if seconds:
            return 429, TOO_FAST, seconds
        return None

    async def _body(self, receive: Callable, headers: dict[bytes, bytes]) -> bytes | tuple[int, str] | None:
        """The request's body; a status and sentence that refuse it; or None if the client has gone."""
        most = self._limits.body_bytes
        too_large = 413, f"A request has at most {most} bytes."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > most:
            return too_large
        parts = bytearray()

        async def read() -> bytes | tuple[int, str] | None:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                parts.extend(message.get("body", b""))
                if len(parts) > most:
                    return too_large
                if not message.get("more_body"):
                    return bytes(parts)

        try:
            return await asyncio.wait_for(read(), self._limits.body_seconds)
        except asyncio.TimeoutError:
            return 408, "The request took too long."


async def _answer(send: Callable, status: int, sentence: str, retry_after: float | None = None) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(retry_after + 0.5))))
    if status in (408, 413, 429, 431):
        headers.append((b"connection", b"close"))  # what is left of the request is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _own_host(scope: dict) -> str:
    """The address and port at which this connection arrived, as a Host header has them."""
    server = scope.get("server")
    if server is None:
        return ""
    host, port = server
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port != 80 else host


def _token_key(headers: dict[bytes, bytes]) -> bytes:
    return hashlib.sha256(headers.get(b"authorization", b"")).digest()


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with the limits of `limits`, which `serve` sets on a subclass; its counts are shared."""

    limits = Limits()
    open_of: Counter[str]  # address -> connections

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._counted, self._deadline, self._known = None, None, None
        address = self.client[0] if self.client else ""
        if (
            len(self.connections) > self.limits.connections
            or self.open_of[address] >= self.limits.connections_of_address
        ):
            self.connections.discard(self)
            transport.abort()
            return
        self._counted = address
        self.open_of[address] += 1
        self._expect(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        if self._counted is not None:
            self.open_of[self._counted] -= 1
            if self.open_of[self._counted] <= 0:
                del self.open_of[self._counted]
            self._counted = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._known is None or self._known.response_complete:  # no request is being answered
            if self._deadline is None:
                self._expect(self.limits.header_seconds)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not self._known:  # its headers are there
            self._known = self.cycle
            self._expect(None if self.cycle.response_complete else self.limits.request_seconds)

    def on_response_complete(self) -> None:
        self._expect(None)
        super().on_response_complete()
        if self.conn.trailing_data[0] and self._deadline is None:  # the beginning of a next request is there
            self._expect(self.limits.header_seconds)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, with the headers of all responses, and close the connection."""
        body = b'{"error": "This is no HTTP request."}'
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *HEADERS,
        ]
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is under way
            self.transport.abort()
            return
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection after so many seconds, unless this is called again; None: no longer."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()
