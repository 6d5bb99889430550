"""Load of the vote server: many voters at once on 127.0.0.1, votes a second, time a vote and an image takes.

    python benchmarks/vote_load.py [--voters 100] [--rate 50] [--seconds 30] [--json FILE]

Starts `python -m dpo_fast.vote` on images made up for it, in a process of its own. Votes are offered at fixed times,
`rate` a second in all, whether or not earlier ones were answered (an open loop): the time of a vote is counted from
when it was due. After each vote the voter's page fetches the two images of the next pair. All voters share this machine
with the server. With --rate 0 every voter votes as fast as the server answers (a closed loop).
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dpo_fast.votes.store import VoteStore

DELAY = 0.2  # seconds, the server's constant delay of images, which is taken off
STARTING_SECONDS, ANSWER_SECONDS = 600, 60


def make_images(home: Path, prompts: int, side: int) -> list[Path]:
    """Two folders of images like photographs in size: smooth colours under mild noise."""
    draw, folders = np.random.default_rng(0), []
    for model in ("one", "two"):
        folder = home / model
        folder.mkdir()
        for number in range(prompts):
            coarse = Image.fromarray(draw.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)
            pixels = (smooth + draw.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"prompt number {number}.png", compress_level=1)
        folders.append(folder)
    return folders


class Server:
    """The command in a process of its own."""

    def __init__(self, home: Path, folders: list[Path], voters: list[str]) -> None:
        self.log = home / "server.log"
        words = ["--voters", *voters, "--votes_file", home / "votes.sqlite", "--votes", "1000", "--delay", DELAY]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpo_fast.vote", *map(str, [*folders, *words])],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        end = time.monotonic() + STARTING_SECONDS
        while "Ctrl-C" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise SystemExit(self.log.read_text())
            time.sleep(0.1)
        text = self.log.read_text()
        self.base = re.search(r"(http://127\.0\.0\.1:\d+)/owner", text)[1]
        self.owner = re.search(r"/owner#(\S+)", text)[1]
        self.tokens = re.findall(r"/vote#(\S+)", text)

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


class Times:
    """Seconds that requests took, and what went wrong."""

    def __init__(self) -> None:
        self.votes: list[float] = []
        self.images: list[float] = []
        self.faults: list[str] = []


class Connection:
    """One connection of a browser: a request at a time. A library would cost more time than the server."""

    def __init__(self, port: int, token: str) -> None:
        self._port, self._token = port, token
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._free = asyncio.Lock()

    async def ask(self, method: str, path: str, value: object = None) -> tuple[int, bytes]:
        """Return the status and the body of the response."""
        body = b"" if value is None else json.dumps(value).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nAuthorization: Bearer {self._token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        async with self._free:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
            reader, writer = self._streams
            writer.write(head.encode() + body)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ANSWER_SECONDS)
            length = int(re.search(rb"(?i)content-length: (\d+)", answer)[1])
            return int(answer[9:12]), await asyncio.wait_for(reader.readexactly(length), ANSWER_SECONDS)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def one_voter(port: int, token: str, due, times: Times, images: bool, end: float) -> None:
    """Vote at the times that `due` yields; fetch the images of each new pair by two further connections."""
    voting, *fetchers = [Connection(port, token) for _ in range(3)]
    now = json.loads((await voting.ask("GET", "/api/pairs"))[1])

    async def image(by: Connection, path: str) -> None:
        begun = time.perf_counter()
        status, _ = await by.ask("GET", path)
        times.images.append(time.perf_counter() - begun - DELAY)
        if status != 200:
            times.faults.append(f"image: {status}")

    fetching: list[asyncio.Task] = []
    for at in due:
        if at is not None:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
        await asyncio.gather(*fetching)  # nobody votes on what is not there yet
        begun = time.perf_counter()
        if begun > end or now["finished"]:
            break
        choice = {"showing": now["pairs"][0]["showing"], "choice": "left"}
        status, body = await voting.ask("POST", "/api/vote", choice)
        times.votes.append(time.perf_counter() - (begun if at is None else at))
        if status != 200:
            times.faults.append(f"vote: {status} {body[:100]!r}")
            break
        now = json.loads(body)
        if images and now["pairs"]:
            following = now["pairs"][-1]
            sides = zip(fetchers, ("left", "right"), strict=True)
            fetching = [asyncio.create_task(image(by, following[side])) for by, side in sides]
    await asyncio.gather(*fetching)
    for one in (voting, *fetchers):
        one.close()


async def owner_looks(port: int, token: str, end: float) -> None:
    """The owner's page, which asks every five seconds."""
    connection = Connection(port, token)
    while time.perf_counter() < end:
        await connection.ask("GET", "/api/owner/results")
        await asyncio.sleep(5)
    connection.close()


async def load(server: Server, rate: float, seconds: float, owner: bool) -> tuple[Times, float]:
    times, number, port = Times(), len(server.tokens), int(server.base.rpartition(":")[2])
    begun = time.perf_counter() + 1.0
    end = begun + seconds

    def due(voter: int):
        if not rate:
            while True:
                yield None
        step = number / rate  # seconds between two votes of a voter
        for k in range(int(seconds / step) + 1):
            yield begun + (k + voter / number) * step

    looking = asyncio.create_task(owner_looks(port, server.owner, end if owner else begun))
    await asyncio.gather(
        *(one_voter(port, token, due(k), times, bool(rate), end) for k, token in enumerate(server.tokens))
    )
    took = time.perf_counter() - begun
    await looking
    return times, took


def quantiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    found = np.quantile(values, [0.5, 0.9, 0.99, 1.0]) * 1e3 if values else [float("nan")] * 4
    return {name: round(float(value), 1) for name, value in zip(("p50", "p90", "p99", "max"), found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voters", type=int, default=100)
    parser.add_argument("--rate", type=float, default=50.0, help="votes offered a second; 0: as fast as possible")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--side", type=int, default=768, help="pixels of the images")
    parser.add_argument("--no_owner", action="store_true", help="without the owner's page, which asks every 5 seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folders = make_images(Path(home), arguments.prompts, arguments.side)
        server = Server(Path(home), folders, [f"voter {k}" for k in range(arguments.voters)])
        before = server.cpu()
        try:
            times, took = asyncio.run(load(server, arguments.rate, arguments.seconds, not arguments.no_owner))
            cpu = server.cpu() - before
        finally:
            server.stop()
        with VoteStore.read(Path(home) / "votes.sqlite") as store:
            kept = len(store.votes()) + len(store.checks())
        length = max(path.stat().st_size for path in (Path(home) / "votes.sqlite.images").glob("*.jpg"))
    result = {
        "voters": arguments.voters,
        "offered_per_second": arguments.rate,
        "seconds": round(took, 1),
        "votes": len(times.votes),
        "votes_per_second": round(len(times.votes) / took, 1),
        "votes_kept": kept,
        "vote_ms": quantiles(times.votes),
        "image_ms_without_delay": quantiles(times.images),
        "image_kib": length >> 10,
        "faults": times.faults[:5],
        "server_cpu_ms_a_vote": round(1e3 * cpu / max(1, len(times.votes)), 1),
        "cpus": os.cpu_count(),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if times.faults or kept != len(times.votes):
        raise SystemExit("not every vote was taken once")


if __name__ == "__main__":
    main()
