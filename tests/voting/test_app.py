"""What the pages get: pairs, votes, undo, images; and the owner's results. Against a real server."""

import csv
import io
import threading
import time

import pytest
from PIL import Image

from dpo_fast.voting import app
from dpo_fast.voting.options import QUESTIONS, VoteConfig
from dpo_fast.voting.summaries import summary_of_file
from tests.helpers.vote_sessions import Client, running, vote_all
from tests.voting.conftest import NAMES

SAME_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:;"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def test_a_voter_votes_undoes_and_comes_to_an_end(server):
    ann = server.voter("ann")
    first = ann.pairs()
    assert first.keys() == {"pairs", "done", "target", "can_undo", "finished"}
    assert first["done"] == 0 and not first["can_undo"] and not first["finished"] and len(first["pairs"]) == 2
    pair = first["pairs"][0]
    assert pair.keys() == {"showing", "question", "prompt", "left", "right", "width", "height"}
    assert pair["question"]["text"] == QUESTIONS[pair["question"]["id"]] and pair["prompt"].startswith("a fox number ")
    assert ann.pairs() == first
    response = ann.vote(pair["showing"], "tie")
    assert response.status_code == 200 and response.json() == ann.pairs()
    assert response.json()["done"] == 1 and response.json()["pairs"][0] == first["pairs"][1]
    back = ann.post("/api/undo", {}).json()
    assert back["done"] == 0 and back["pairs"][0]["prompt"] == pair["prompt"]
    assert back["pairs"][0]["showing"] != pair["showing"] and len(back["pairs"]) == 2
    number = vote_all(ann)
    votes = server.session.store.votes()
    assert len(votes) == 18 and number == 18 + len(server.session.store.checks())
    assert ann.post("/api/undo", {}).status_code == 200


def test_an_image_is_a_jpeg_of_the_size_that_the_pair_names(server):
    ann = server.voter("ann")
    for pair in ann.pairs()["pairs"]:
        for side in ("left", "right"):
            response = ann.get(pair[side])
            assert response.status_code == 200 and response.headers["content-type"] == "image/jpeg"
            image = Image.open(io.BytesIO(response.content))
            image.load()
            assert image.format == "JPEG" and image.size == (pair["width"], pair["height"]) == (256, 256)
            assert not image.getexif() and "icc_profile" not in image.info


def test_an_image_that_is_damaged_is_said_and_not_shown(server, caplog):
    ann = server.voter("ann")
    for prepared in server.session.gallery.images.values():
        prepared.file.write_bytes(b"\xff\xd8" + b"x" * (prepared.length - 2))
    response = ann.get(ann.pairs()["pairs"][0]["left"])
    assert response.status_code == 503 and "owner's terminal" in response.json()["error"]
    assert "is damaged: start again" in caplog.text


def test_images_come_after_one_delay_whatever_the_answer_is(folders, tmp_path):
    config = VoteConfig(folders=tuple(folders), voters=("ann",), votes_file=tmp_path / "votes.sqlite", delay=0.3)
    with running(config) as server:
        ann = server.voter("ann")
        pair = ann.pairs()["pairs"][0]
        for path, status in ((pair["left"], 200), (pair["right"], 200), ("/api/image/none", 404)):
            begun = time.monotonic()
            assert ann.get(path).status_code == status
            assert 0.3 <= time.monotonic() - begun < 3


def test_pages_are_the_same_for_everybody(server):
    for path, (_, kind) in app.PAGES.items():
        anyone, ann = Client(server.base, None).get(path), server.voter("ann").get(path)
        assert anyone.status_code == 200 and anyone.content == ann.content and len(anyone.content) > 100
        assert anyone.headers["content-type"] == kind and anyone.headers.items() >= SAME_HEADERS.items()
        assert b"http://" not in anyone.content.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in anyone.content


def test_everyone_with_the_open_link_can_join(server):
    invitation = server.writer.submit(lambda desk: desk.new_invitation()).result()
    anyone = Client(server.base, None)
    tokens = {anyone.post("/api/join", {"invitation": invitation}).json()["token"] for _ in range(3)}
    assert len(tokens) == 3 and len(Client(server.base, tokens.pop()).pairs()["pairs"]) == 2
    assert server.session.store.voters()[-3:] == ["guest 1", "guest 2", "guest 3"]
    for wrong in ("", "x", server.tokens["ann"], server.owner_token):
        assert anyone.post("/api/join", {"invitation": wrong}).status_code == 403


def test_without_an_open_link_nobody_joins(folders, tmp_path):
    with running(VoteConfig(folders=tuple(folders), votes_file=tmp_path / "votes.sqlite")) as server:
        invitation = server.writer.submit(lambda desk: desk.new_invitation()).result()
        assert Client(server.base, None).post("/api/join", {"invitation": invitation}).status_code == 403


def test_the_owner_sees_results_adds_renews_and_excludes(server):
    owner, ann = server.owner(), server.voter("ann")
    results = owner.get("/api/owner/results").json()
    assert results["votes"] == 0 and results["live"]["votes_wanted"] == 6 * 3 * 5
    assert [one["name"] for one in results["live"]["voters"]] == list(NAMES)
    vote_all(ann)
    added = owner.post("/api/owner/voters", {"name": "eve  smith"}).json()
    assert added["name"] == "eve smith" and added["link"].startswith(f"{server.base}/vote#")
    eve = Client(server.base, added["link"].partition("#")[2])
    assert len(eve.pairs()["pairs"]) == 2
    assert owner.post("/api/owner/voters", {"name": "eve smith"}).status_code == 409
    renewed = owner.post("/api/owner/links", {"name": "eve smith"}).json()
    assert eve.get("/api/pairs").status_code == 401
    assert len(Client(server.base, renewed["link"].partition("#")[2]).pairs()["pairs"]) == 2
    for path in ("links", "exclude"):
        assert owner.post(f"/api/owner/{path}", {"name": "nobody", "excluded": True}).status_code == 404
    table = list(csv.reader(io.StringIO(owner.get("/api/owner/votes.csv").text)))
    assert table[0][:3] == ["group", "question", "comparison"] and len(table) == 1 + 18
    assert table[0][6:8] == ["model_0", "model_1"] and {tuple(row[6:8]) for row in table[1:]} == {("blurry", "crisp")}
    results = owner.post("/api/owner/exclude", {"name": "ann", "excluded": True, "reason": "sleepy"}).json()
    assert results["votes"] == 0 and [one["excluded"] for one in results["by_voter"]] == ["sleepy"]
    assert ann.get("/api/pairs").status_code == 403
    results = owner.post("/api/owner/exclude", {"name": "ann", "excluded": False, "reason": ""}).json()
    assert results["votes"] == 18 and results["questions"]["general"]["pairs"][0]["models"] == ["blurry", "crisp"]
    assert ann.get("/api/pairs").status_code == 200


@pytest.mark.exhaustive
def test_results_are_not_made_for_every_request(server, monkeypatch):
    made, make = [], server.session.summaries.make
    monkeypatch.setattr(server.session.summaries, "make", lambda: made.append(1) or make())
    monkeypatch.setattr(app, "SUMMARY_SECONDS", 0.5)
    owner, ann = server.owner(), server.voter("ann")
    assert owner.get("/api/owner/results").json()["votes"] == 0
    for _ in range(2):
        ann.vote(ann.pairs()["pairs"][0]["showing"])
        owner.get("/api/owner/results")
    assert len(made) == 1
    end = time.monotonic() + 30
    while owner.get("/api/owner/results").json()["votes"] == 0:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("path", "content", "kind", "said"),
    [
        ("/api/vote", b"{", "application/json", "is no JSON"),
        ("/api/vote", b"[]", "application/json", "no JSON object"),
        ("/api/vote", b"\xff\xfe", "application/json", "is no JSON"),
        ("/api/vote", b"[" * 3000, "application/json", "is no JSON"),
        ("/api/vote", b'{"showing": "x", "choice": "left"}', "text/plain", "is no JSON"),
        ("/api/vote", b'{"showing": 1, "choice": "left"}', "application/json", "needs showing"),
        ("/api/vote", b'{"showing": "x"}', "application/json", "needs choice"),
        ("/api/vote", b'{"showing": "x", "choice": "both"}', "application/json", "left, right or tie"),
        ("/api/vote", b'{"showing": "\\ud800", "choice": "left"}', "application/json", "needs showing"),
        ("/api/undo", b"", "application/json", "is no JSON"),
        ("/api/join", b"{}", "application/json", "needs invitation"),
    ],
)
def test_bad_requests_get_one_sentence(server, path, content, kind, said):
    response = server.voter("ann").post(path, content=content, headers={"content-type": kind})
    assert response.status_code == 400 and said in response.json()["error"]
    assert server.session.store.votes() == []


def test_results_after_an_exclusion_are_new_though_others_are_being_made(server, monkeypatch):
    ann, summaries = server.voter("ann"), server.session.summaries
    for _ in range(4):
        ann.vote(ann.pairs()["pairs"][0]["showing"])
    made, go_on = threading.Event(), threading.Event()

    def make():  # without the start of a process
        return summary_of_file(server.session.store.path)

    def slow():
        try:
            return make()
        finally:
            made.set()
            go_on.wait(20)

    monkeypatch.setattr(summaries, "make", slow)
    thread = threading.Thread(target=lambda: server.owner().get("/api/owner/results", timeout=120))
    thread.start()
    assert made.wait(60)
    monkeypatch.setattr(summaries, "make", make)
    threading.Timer(0.5, go_on.set).start()
    asked = {"name": "ann", "excluded": True}
    assert server.owner().post("/api/owner/exclude", asked, timeout=120).json()["votes"] == 0
    thread.join(20)
