"""What a voter, a stranger and another site try, and exactly what comes of it. Against a real server, over the wire."""

import io
import json
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dpo_fast.voting.guard import Limits, Rate
from dpo_fast.voting.options import VoteConfig
from tests.helpers.vote_sessions import Client, body, image_folder, png, received, running, vote_all
from tests.voting.conftest import NAMES


def request(server, line: str, *headers: str, token: str | None = None, content: bytes = b"") -> bytes:
    """What the server answers to a request whose first line is written as it stands."""
    lines = [line, f"Host: 127.0.0.1:{server.port}", "Connection: close", *headers]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    return server.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + content)


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


def votes(server) -> int:
    return len(server.session.store.votes())


# ---- paths and names ---------------------------------------------------------------------------------------------

PATHS = [
    "/../../../../etc/passwd", "/static/../../../../etc/passwd", "/static/..%2f..%2f..%2fetc%2fpasswd",
    "/static/%2e%2e/%2e%2e/etc/passwd", "/static/..%5c..%5cetc", "/static/%252e%252e/vote.js", "//etc/passwd",
    "/static//etc/passwd", "/static/vote.js%00.png", "/static/vote.js/", "/static/", "/static", "/STATIC/vote.js",
    "/api/image/../../votes.sqlite", "/api/image/%2e%2e%2fvotes.sqlite", "/api/image//etc/passwd",
    "/api/image/votes.sqlite", "/api/image/%00", "/api/image/" + "x" * 5000, "/api/image/\xe9", "/votes.sqlite",
    "/votes.sqlite.images/images.json", "/docs", "/redoc", "/openapi.json", "/favicon.ico", "/vote/..", "/", "/.env",
    "/vote;x", "/api/owner/", "/api/pairs/",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_reaches_the_file_system(shared, path):
    response = request(shared, f"GET {path} HTTP/1.1", token=shared.tokens["ann"])
    if path == "/api/image/\xe9":  # no character of a request's line
        assert status(response) == 400 and body(response) == {"error": "This is no HTTP request."}
    elif path.startswith("/api/image/") and path.count("/") == 3 and "%2f" not in path:
        assert status(response) == 404 and body(response) == {"error": "This image is not shown to you, or no longer."}
    else:
        assert status(response) == 404 and body(response) == {"error": "There is nothing here."}


def test_a_name_of_a_file_is_no_path(tmp_path):
    """Names of images and prompts that look like paths stay text."""
    odd = ["..%2f..%2fetc%2fpasswd", "a fox; rm -rf ~", "a fox\\..\\..\\x"]
    home = tmp_path / "images"
    folders = tuple(image_folder(home / model, odd, seed=k) for k, model in enumerate(("one", "two")))
    with running(VoteConfig(folders=folders, voters=("ann",), votes_file=tmp_path / "v.sqlite", delay=0)) as server:
        pair = server.voter("ann").pairs()["pairs"][0]
        assert re.fullmatch(r"/api/image/[\w-]{24}", pair["left"]) and server.voter("ann").get(pair["left"]).is_success
        written = {path.name for path in tmp_path.rglob("*") if path.is_file() and home not in path.parents}
        assert all(re.fullmatch(r"v\.sqlite(-wal|-shm)?|images\.json|[0-9a-f]{32}(-ruined)?\.jpg|\.lock.*", name)
                   for name in written)  # fmt: skip


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "get"])
@pytest.mark.parametrize("path", ["/vote", "/api/pairs", "/api/vote"])
def test_other_methods_are_refused(shared, method, path):
    response = request(shared, f"{method} {path} HTTP/1.1", token=shared.tokens["ann"])
    assert status(response) == 405 and b"access-control" not in response.lower()


def test_refusals_do_not_repeat_what_was_sent(shared):
    mark = "zqxj<script>alert(1)</script>"
    ann = shared.voter("ann")
    for response in (
        ann.get(f"/{mark}"),
        ann.get(f"/api/image/{mark}?{mark}"),
        ann.get("/api/pairs", headers={"authorization": f"Bearer {mark}"}),
        ann.post("/api/vote", {"showing": mark, "choice": "left"}),
        ann.post("/api/vote", {"showing": "x", "choice": mark}),
        ann.get("/api/pairs", headers={"host": "zqxj.example"}),
    ):
        assert response.status_code >= 400 and "zqxj" not in response.text + str(response.headers)
        assert response.headers["content-type"] == "application/json"


# ---- tokens ------------------------------------------------------------------------------------------------------


def test_forged_tokens_are_refused(shared):
    good = shared.tokens["ann"]
    for token in ("x", good[:-1], good + "x", good.swapcase(), good.upper(), "a" * 32, "a" * 5000, " ", "null"):
        response = request(shared, "GET /api/pairs HTTP/1.1", token=token)
        assert status(response) == 401, token
    for header in ("Basic x", good, f"Bearer  {good} x", "Bearer"):
        assert status(request(shared, "GET /api/pairs HTTP/1.1", f"Authorization: {header}")) == 401
    assert status(request(shared, f"GET /api/pairs?token={good} HTTP/1.1", f"Cookie: token={good}")) == 401
    assert status(request(shared, "GET /api/pairs HTTP/1.1", token=good)) == 200


def test_a_foreign_token_sees_and_changes_nothing_of_others(server):
    ann, bob = server.voter("ann"), server.voter("bob")
    pair = ann.pairs()["pairs"][0]
    bob.pairs()
    assert bob.vote(pair["showing"]).status_code == 404
    assert bob.get(pair["left"]).status_code == 404
    assert server.owner().get(pair["left"]).status_code == 403
    assert votes(server) == 0 and ann.pairs()["pairs"][0] == pair


def test_a_replayed_token_is_dead_once_it_was_renewed(server):
    ann = server.voter("ann")
    pair = ann.pairs()["pairs"][0]
    server.owner().post("/api/owner/links", {"name": "ann"})
    assert ann.get("/api/pairs").status_code == 401 and ann.vote(pair["showing"]).status_code == 401
    assert ann.get(pair["left"]).status_code == 401 and votes(server) == 0


def test_a_voter_does_not_get_the_owner_s_page(shared):
    ann, nobody = shared.voter("ann"), Client(shared.base, None)
    asked = [
        ("GET", "results", None), ("GET", "votes.csv", None), ("POST", "voters", {"name": "eve"}),
        ("POST", "links", {"name": "ann"}), ("POST", "exclude", {"name": "bob", "excluded": True, "reason": ""}),
    ]  # fmt: skip
    for method, path, value in asked:
        for client, expected in ((ann, 403), (nobody, 401), (Client(shared.base, "guess"), 401)):
            response = client.http.request(method, f"/api/owner/{path}", json=value)
            assert response.status_code == expected and response.json().keys() == {"error"}
    assert shared.session.store.voters() == list(NAMES) and not shared.session.store.excluded()
    for path in ("/api/pairs",):
        assert shared.owner().get(path).status_code == 403


def test_no_token_is_logged(shared, caplog, capfd):
    caplog.set_level(0)
    ann = shared.voter("ann")
    pair = ann.pairs()["pairs"][0]
    ann.get(pair["left"])
    ann.vote(pair["showing"])
    ann.get(f"/api/image/{shared.tokens['bob']}")
    shared.raw(f"GET /x{shared.tokens['bob']} HTTP/9\r\n\r\n".encode())
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # not the client's
    said = "".join([*ours, *capfd.readouterr()])
    assert not any(token in said for token in (*shared.tokens.values(), shared.owner_token))


# ---- votes -------------------------------------------------------------------------------------------------------


def test_a_double_vote_counts_once(server):
    ann = server.voter("ann")
    showing = ann.pairs()["pairs"][0]["showing"]
    with ThreadPoolExecutor(20) as pool:
        same = list(pool.map(lambda _: server.voter("ann").vote(showing, "left"), range(20)))
    assert {response.status_code for response in same} == {200} and {response.json()["done"] for response in same} == {
        1
    }
    assert ann.vote(showing, "right").status_code == ann.vote(showing, "tie").status_code == 409
    assert len(server.session.store.votes()) + len(server.session.store.checks()) == 1


def test_of_two_votes_at_once_one_is_taken(server):
    showing = server.voter("ann").pairs()["pairs"][0]["showing"]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda k: server.voter("ann").vote(showing, ("left", "right")[k % 2]), range(20)))
    number = Counter(answer.status_code for answer in answers)
    assert number == {200: 10, 409: 10}
    assert len(server.session.store.votes()) + len(server.session.store.checks()) == 1


def test_a_vote_on_a_pair_never_shown_is_refused(server):
    ann = server.voter("ann")
    ann.pairs()
    for showing in ("", "1", "x" * 24, "a' OR '1'='1", "../1", json.dumps({"$ne": 1})):
        response = ann.vote(showing)
        assert response.status_code == 404 and "not yours" in response.json()["error"]
    assert votes(server) == 0


def test_nobody_votes_twice_on_one_pair_and_question(server):
    vote_all(server.voter("ann"))
    cells = Counter((vote.comparison, vote.question) for vote in server.session.store.votes())
    assert len(cells) == 18 and set(cells.values()) == {1}


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_script_and_markup_in_a_prompt_stay_text(tmp_path):
    prompt = "a fox<script>alert(1)<img src=x onerror=alert(2)>&amp;'\"  \u2028 end"
    for k, model in enumerate(("one", "two")):
        png(tmp_path / model / "a.png", {"prompt": prompt}, seed=k)
    folders = (tmp_path / "one", tmp_path / "two")
    questions = ("Which <b>image</b> & why </script>?",)
    config = VoteConfig(
        folders=folders, voters=("ann",), votes_file=tmp_path / "v.sqlite", questions=questions, delay=0
    )
    with running(config) as server:
        response = server.voter("ann").get("/api/pairs")
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-content-type-options"] == "nosniff"
        pair = response.json()["pairs"][0]
        assert pair["prompt"] == " ".join(prompt.split()) and pair["question"]["text"] == questions[0]
        for page in ("/vote", "/owner"):
            content = Client(server.base, None).get(page).text
            assert "a fox" not in content and not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|javascript:", content)
        assert "unsafe" not in response.headers["content-security-policy"]


# ---- bodies, headers and connections -----------------------------------------------------------------------------


def test_an_oversized_body_is_refused_before_it_is_read(shared):
    large = json.dumps({"showing": "x" * 4096, "choice": "left"}).encode()
    kind = "Content-Type: application/json"
    response = request(shared, "POST /api/vote HTTP/1.1", kind, f"Content-Length: {len(large)}",
                       token=shared.tokens["ann"])  # fmt: skip
    assert status(response) == 413 and body(response) == {"error": "A request has at most 4096 bytes."}
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    response = request(shared, "POST /api/vote HTTP/1.1", kind, "Transfer-Encoding: chunked",
                       token=shared.tokens["ann"], content=chunk * 2 + b"0\r\n\r\n")  # fmt: skip
    assert status(response) == 413
    for length in ("9" * 30, "-1", "0x10", "4097"):
        response = request(shared, "POST /api/vote HTTP/1.1", kind, f"Content-Length: {length}")
        assert status(response) in (400, 413)
    assert shared.voter("ann").post("/api/vote", content=b" " * 4096).status_code == 400


QUICK = Limits(header_seconds=0.6, body_seconds=0.6, request_seconds=1.5, idle_seconds=2)


@pytest.fixture
def quick(folders, tmp_path):
    """A server with little patience."""
    config = VoteConfig(folders=tuple(folders), voters=("ann",), votes_file=tmp_path / "votes.sqlite", delay=0)
    with running(config, QUICK) as server:
        yield server


def test_slow_headers_end_the_connection(quick):
    for begin in (b"", b"GET /vote HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as connection:
            begun = time.monotonic()
            stop = threading.Event()

            def drip(connection=connection, stop=stop):
                while not stop.wait(0.1):
                    try:
                        connection.sendall(b"X-A: b\r\n")
                    except OSError:
                        return

            connection.sendall(begin)
            if begin:
                threading.Thread(target=drip, daemon=True).start()
            assert received(connection) == b""
            stop.set()
            assert 0.4 < time.monotonic() - begun < 5


def test_slow_headers_of_a_later_request_end_the_connection(quick):
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as connection:
        connection.sendall(f"GET /vote HTTP/1.1\r\nHost: 127.0.0.1:{quick.port}\r\n\r\nGET /vo".encode())
        begun = time.monotonic()
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK") and 0.4 < time.monotonic() - begun < 5


def test_a_slow_body_is_refused(quick):
    line = f"POST /api/vote HTTP/1.1\r\nHost: 127.0.0.1:{quick.port}\r\nContent-Length: 100\r\n\r\n{{"
    begun = time.monotonic()
    response = quick.raw(line.encode(), seconds=10)
    assert status(response) == 408 and body(response) == {"error": "The request took too long."}
    assert 0.4 < time.monotonic() - begun < 5


def test_one_who_does_not_take_the_response_is_disconnected(quick):
    ann = quick.voter("ann")
    pair = ann.pairs()["pairs"][0]["left"]
    line = f"GET {pair} HTTP/1.1\r\nHost: 127.0.0.1:{quick.port}\r\nAuthorization: Bearer {quick.tokens['ann']}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", quick.port))
        connection.settimeout(10)
        connection.sendall(line.encode() * 40)  # more than the buffers of the system hold
        time.sleep(3)
        size = len(received(connection))
        assert size < 40 * quick.session.gallery.length
    assert ann.pairs()["pairs"]


def test_an_idle_connection_is_closed(quick):
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as connection:
        connection.sendall(f"GET /vote HTTP/1.1\r\nHost: 127.0.0.1:{quick.port}\r\n\r\n".encode())
        begun = time.monotonic()
        assert received(connection).startswith(b"HTTP/1.1 200 OK") and 1.5 < time.monotonic() - begun < 8


def test_large_headers_are_refused(shared):
    response = request(shared, "GET /vote HTTP/1.1", *(f"X-{k}: {'y' * 4000}" for k in range(8)))
    assert status(response) == 431 and body(response) == {"error": "The headers of a request have at most 16384 bytes."}


def test_connections_are_limited(folders, tmp_path):
    config = VoteConfig(folders=tuple(folders), voters=("ann",), votes_file=tmp_path / "votes.sqlite", delay=0)
    with running(config, Limits(connections=12, connections_of_address=8)) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(8)]
        time.sleep(0.3)
        refused = server.raw(b"GET /vote HTTP/1.1\r\n\r\n")
        assert refused == b""
        for connection in held:
            connection.close()
        time.sleep(0.3)
        assert server.voter("ann").pairs()["pairs"]


def test_rates_are_limited_by_token_and_by_address(folders, tmp_path):
    config = VoteConfig(folders=tuple(folders), voters=("ann", "bob"), votes_file=tmp_path / "votes.sqlite", delay=0)
    with running(config, Limits(token=Rate(1, 5), address=Rate(1, 12))) as server:
        ann, bob = server.voter("ann"), server.voter("bob")
        assert [ann.get("/api/pairs").status_code for _ in range(7)] == [200] * 5 + [429] * 2
        assert [bob.get("/api/pairs").status_code for _ in range(4)] == [200] * 4
        assert {Client(server.base, None).get("/vote").status_code for _ in range(4)} == {200, 429}


def test_joining_is_limited(folders, tmp_path):
    config = VoteConfig(folders=tuple(folders), open_link=True, votes_file=tmp_path / "votes.sqlite", delay=0)
    with running(config, Limits(joins=Rate(0.01, 3))) as server:
        invitation = server.writer.submit(lambda desk: desk.new_invitation()).result()
        anyone = Client(server.base, None)
        answers = [anyone.post("/api/join", {"invitation": invitation}).status_code for _ in range(5)]
        assert answers == [200] * 3 + [429] * 2 and len(server.session.store.voters()) == 3


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "[::]:{port}"])
def test_another_host_is_refused(shared, host):
    response = shared.raw(
        f"GET /vote HTTP/1.1\r\nHost: {host.format(port=shared.port)}\r\nConnection: close\r\n\r\n".encode()
    )
    assert status(response) == 421 and b"content-security-policy" in response


def test_another_site_can_do_nothing(server):
    """Even one that knew the token: its Origin is refused, no answer allows it to read, there are no cookies."""
    ann = server.voter("ann")
    showing = ann.pairs()["pairs"][0]["showing"]
    for origin in ("https://evil.example", "null", f"https://127.0.0.1:{server.port}", "http://127.0.0.1"):
        response = ann.post("/api/vote", {"showing": showing, "choice": "left"}, headers={"origin": origin})
        assert response.status_code == 403 and response.json() == {"error": "Requests from other sites are refused."}
        assert not any(name.startswith("access-control") for name in response.headers)
        assert "set-cookie" not in response.headers
    cross = ann.post("/api/vote", {"showing": showing, "choice": "left"}, headers={"sec-fetch-site": "cross-site"})
    assert cross.status_code == 403
    form = Client(server.base, None).http.post("/api/vote", data={"showing": showing, "choice": "left"})
    assert form.status_code == 401 and votes(server) == 0
    same = {"origin": server.base, "sec-fetch-site": "same-origin"}
    assert ann.post("/api/vote", {"showing": showing, "choice": "left"}, headers=same).status_code == 200


# ---- which model is which ----------------------------------------------------------------------------------------


def head_of(response: bytes) -> bytes:
    """The bytes of a response's headers but for the date."""
    return re.sub(rb"(?im)^date: [^\r]*\r\n", b"", response.partition(b"\r\n\r\n")[0])


def image(server, key: str, *headers: str, name: str = "ann", method: str = "GET") -> bytes:
    return request(server, f"{method} {key} HTTP/1.1", *headers, token=server.tokens[name])


def whose(server, name: str) -> list[tuple[str, str | None]]:
    """The keys of a voter's open showings, each with the model that the image is of."""
    ids = {id_: file.parent.name for id_, file in server.session.images.items()}

    def work(desk):
        voter = desk.voter_of(server.tokens[name])
        showings = desk.screen(voter).showings
        return [(key, desk.image_of(voter, key)) for showing in showings for key in showing.keys]

    found = server.writer.submit(work).result()
    return [(f"/api/image/{key}", ids[of.image] + " ruined" * of.ruined) for key, of in found]


def test_every_image_has_the_same_headers_and_length_to_the_byte(server):
    lengths = {prepared.length for prepared in server.session.gallery.images.values()}
    assert max(lengths) > 1.5 * min(lengths)  # what would give the sharper model away
    heads, sizes, models, keys = set(), set(), Counter(), []
    for name in NAMES:
        for _ in range(4):
            for key, model in whose(server, name):
                response = image(server, key, name=name)
                heads.add(head_of(response))
                sizes.add(len(response.partition(b"\r\n\r\n")[2]))
                models[model] += 1
                keys.append(key)
            client = server.voter(name)
            client.vote(client.pairs()["pairs"][0]["showing"])
    assert len(heads) == len(sizes) == 1 and sizes == {server.session.gallery.length}
    assert {"blurry", "crisp"} < models.keys()
    assert sorted(re.findall(rb"(?m)^([a-z-]+):", heads.pop())) == [
        b"cache-control", b"content-length", b"content-security-policy", b"content-type",
        b"cross-origin-opener-policy", b"cross-origin-resource-policy", b"permissions-policy", b"referrer-policy",
        b"x-content-type-options",
    ]  # fmt: skip


def test_conditions_ranges_and_methods_reveal_nothing(server):
    by_model = {model: key for key, model in whose(server, "ann")}
    answers = {}
    for headers in ((), ("Range: bytes=0-99",), ("Range: bytes=200000-",), ('If-None-Match: "x"',),
                    ("If-None-Match: *",), ("If-Modified-Since: Tue, 01 Jan 2030 00:00:00 GMT",),
                    ("If-Range: x", "Range: bytes=0-0"),
                    ("Accept-Encoding: gzip, br",), ("Accept: image/webp",)):  # fmt: skip
        answers[headers] = {head_of(image(server, key, *headers)) for key in by_model.values()}
        assert answers[headers] == answers[()] and len(answers[()]) == 1
    for method in ("HEAD", "OPTIONS"):
        refused = {image(server, key, method=method).partition(b"\r\n")[0] for key in by_model.values()}
        assert refused == {b"HTTP/1.1 405 Method Not Allowed"}


def test_nothing_that_a_voter_gets_names_a_model_a_file_or_an_order(server):
    everything = b""
    for name in NAMES[:2]:
        client = server.voter(name)
        while pairs := (now := client.get("/api/pairs")).json()["pairs"]:
            pair = pairs[0]
            for response in (now, client.get(pair["left"]), client.vote(pair["showing"])):
                text = response.content if "json" in response.headers["content-type"] else b""
                everything += text + str(response.headers.raw).encode()
        everything += client.get("/vote").content + client.get("/nothing").content
    for word in (b"blurry", b"crisp", b"png", b"sqlite", b"comparison", b"check", b"identical", b"obvious", b"ruined",
                 b"votes_file", str(server.session.store.path.parent).encode()):  # fmt: skip
        assert word not in everything.replace(b"image/", b"").replace(b"same-origin", b"") or word == b"check"


def test_a_repeated_image_comes_with_other_keys_and_other_bytes(server):
    """The same image, shown again with another question or to another voter, has nothing that can be looked up."""
    keys: dict[int, list[str]] = {}
    contents: dict[int, set[bytes]] = {}
    pixels: dict[int, set[bytes]] = {}
    for name in ("ann", "bob"):
        client = server.voter(name)
        while True:
            found = server.writer.submit(
                lambda desk, name=name: (
                    lambda voter: [(key, desk.image_of(voter, key)) for one in desk.screen(voter).showings[:1]
                                   for key in one.keys]
                )(desk.voter_of(server.tokens[name]))
            ).result()  # fmt: skip
            if not found:
                break
            for key, of in found:
                if not of.ruined:
                    content = client.get(f"/api/image/{key}").content
                    keys.setdefault(of.image, []).append(key)
                    contents.setdefault(of.image, set()).add(content)
                    pixels.setdefault(of.image, set()).add(np.asarray(Image.open(io.BytesIO(content))).tobytes())
            client.vote(client.pairs()["pairs"][0]["showing"])
    assert len(keys) == 12 and min(map(len, keys.values())) >= 6
    assert len({key for of in keys.values() for key in of}) == sum(map(len, keys.values()))
    assert all(len(contents[one]) == len(keys[one]) and len(pixels[one]) == 1 for one in keys)


def test_left_and_right_are_even_and_drawn(server):
    for name in NAMES:
        vote_all(server.voter(name))
    left = Counter()
    for vote in server.session.store.votes():
        left[vote.comparison, vote.question] += vote.first_left
    assert len(left) == 18 and set(left.values()) == {2}  # of four voters
    by_voter = Counter(vote.voter for vote in server.session.store.votes() if vote.first_left)
    assert all(1 <= by_voter[name] <= 17 for name in NAMES)
