"""Run the server of a session until it is interrupted."""

import errno
import gc
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import uvicorn

from dpo_fast.cli import on_signals, say, show
from dpo_fast.errors import BadInput
from dpo_fast.voting.app import Site, make_app
from dpo_fast.voting.guard import Guard, GuardedProtocol, Limits
from dpo_fast.voting.options import VoteConfig, origin_of
from dpo_fast.voting.session import Session, open_session
from dpo_fast.voting.writer import Writer

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
CLOSING_SECONDS = 5  # for requests in progress, after an interruption
BACKLOG = 512
SPARE_FILES = 100  # of those that a process may open: for all but connections


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the caller."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: VoteConfig) -> Session:
    """Serve until a signal comes; return the session, whose file is still open. Raises BadInput before serving."""
    listener = _listen(config)  # first: preparing images may take minutes
    try:
        session = open_session(config)
    except BaseException:
        listener.close()
        raise
    try:
        with Writer(session.desk) as writer:
            server = make_server(session, writer, listener, config)
            _print_links(config, session, writer, _base(config, listener))
            gc.freeze()  # a collection that walks through all imported libraries would stop everybody for long
            with on_signals(ENDING, _ender(server)):
                server.run(sockets=[listener])
    except BaseException:
        session.close()
        raise
    finally:
        gc.unfreeze()  # else libraries complain at the end of what was never freed
        listener.close()
    return session


def make_server(
    session: Session, writer: Writer, listener: socket.socket, config: VoteConfig, limits: Limits | None = None
) -> Server:
    """Return a server of the session for a listening socket; its `run(sockets=[listener])` serves."""
    base = _base(config, listener)
    site = Site(
        writer,
        session.gallery,
        session.images,
        session.store,
        session.summaries,
        config.delay,
        lambda token: f"{base}/vote#{token}",
    )
    limits = _within_files(limits or Limits(), behind_proxy=config.public_url is not None)
    guard = Guard(make_app(site), limits, _hosts(config, listener), _origins(config))
    protocol = type("Protocol", (GuardedProtocol,), {"limits": limits, "open_of": Counter()})
    options = uvicorn.Config(
        guard,
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=config.public_url is not None,
        forwarded_allow_ips="127.0.0.1,::1",
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=CLOSING_SECONDS,
        h11_max_incomplete_event_size=limits.header_bytes,
        backlog=BACKLOG,
    )
    return Server(options)


def _ender(server: Server) -> Callable[[int, object], None]:
    def end(number: int, frame: object) -> None:
        server.force_exit = server.should_exit  # a second signal does not wait for requests in progress
        server.should_exit = True

    return end


def _listen(config: VoteConfig) -> socket.socket:
    """Listen at the host and port. Raises BadInput if that cannot be done."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput(f"--port {config.port} is in use by another process: name another, or 0") from error
        raise BadInput(
            f"--host {config.host} --port {config.port} cannot be listened at ({error.strerror or error}): name an"
            " address of this machine, and a port from 1024"
        ) from error


def _base(config: VoteConfig, listener: socket.socket) -> str:
    """What links begin with."""
    if config.public_url is not None:
        return origin_of(config.public_url)
    port = listener.getsockname()[1]
    host = config.host
    if host in ("0.0.0.0", "::"):
        host = _address_in_network(listener.family) or "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _address_in_network(family: int) -> str | None:
    """This machine's address in its network, or None. Nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(("fd00::1" if family == socket.AF_INET6 else "10.255.255.255", 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def _hosts(config: VoteConfig, listener: socket.socket) -> set[str]:
    """What a Host header may name, besides the address at which the connection arrived."""
    port = listener.getsockname()[1]
    names = {"localhost", "127.0.0.1", "[::1]", f"[{config.host}]" if ":" in config.host else config.host}
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        name = socket.gethostname().lower()
        names |= {name, f"{name.removesuffix('.local')}.local"}
    hosts = {f"{name}:{port}" for name in names}
    if config.public_url is not None:
        hosts.add(urlsplit(origin_of(config.public_url)).netloc)
    return hosts


def _origins(config: VoteConfig) -> set[str]:
    return {origin_of(config.public_url)} if config.public_url is not None else set()


def _within_files(limits: Limits, *, behind_proxy: bool) -> Limits:
    """The limits with no more connections than the process may open; a proxy's connections are all of one address."""
    most = limits.connections
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = most + SPARE_FILES
        if soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        most = max(8, min(most, soft - SPARE_FILES))
    except (ImportError, OSError, ValueError):  # not every system has such limits, or lets them be raised
        pass
    of_address = most if behind_proxy else min(limits.connections_of_address, most)
    return replace(limits, connections=most, connections_of_address=of_address)


def _print_links(config: VoteConfig, session: Session, writer: Writer, base: str) -> None:
    names = [" ".join(name.split()) for name in config.voters]
    before = set(session.store.voters())

    def work(desk) -> tuple[str, dict[str, str], str | None]:
        known = set(session.store.voters())
        links = {name: desk.add_voter(name) for name in names if name not in known}
        return desk.new_owner(), links, desk.new_invitation() if config.open_link else None

    owner, links, invitation = writer.submit(work).result()
    settings = session.store.settings()
    pairs, questions = settings["comparisons"], len(settings["questions"])
    show(
        f"{pairs} pairs of images x {questions} questions x {settings['votes']} votes ="
        f" {pairs * questions * settings['votes']:,} votes; {len(session.store.votes()):,} are in {session.store.path}"
    )
    show(f"\nyours, with the results:\n  {base}/owner#{owner}")
    if links:
        width = max(map(len, links))
        show("\none for each voter (keep them: they are not shown again; your page can make new ones):")
        for name, token in links.items():
            show(f"  {name.ljust(width)}  {base}/vote#{token}")
    if have := [name for name in names if name in before]:
        show(f"\n{', '.join(have)}: with a link already, which stays valid; your page can make a new one")
    if invitation is not None:
        show(f"\nfor everyone whom you send it:\n  {base}/vote#join={invitation}")
    if not session.store.voters() and invitation is None:
        show("\nnobody can vote yet: add voters on your page, or start with --voters NAME ... or --open_link")
    if base.startswith("http:") and urlsplit(base).hostname not in ("127.0.0.1", "localhost", "::1"):
        say(
            "whoever listens in this network can read along: links, images and votes are not encrypted. docs/vote.md"
            " says how to put the server behind TLS"
        )
    show("\nCtrl-C ends the server; votes are kept")
