"""The command: links, Ctrl-C, results, and what is said if something is missing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from PIL import Image

from dpo_fast.vote import main
from dpo_fast.voting import serve as serving
from dpo_fast.voting.guard import Limits, Rate
from dpo_fast.voting.options import VoteConfig
from dpo_fast.voting.session import open_session
from dpo_fast.voting.writer import Writer
from tests.helpers.runs import environment
from tests.helpers.vote_sessions import Client, running, vote_all


class Command:
    """`python -m dpo_fast.vote` in a process of its own."""

    def __init__(self, home, *words):
        self.log = home / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpo_fast.vote", *map(str, words)],
                stdout=log, stderr=subprocess.STDOUT, cwd=home, env={**environment(), "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        end = time.monotonic() + 120
        while "Ctrl-C ends the server" not in self.said():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text()

    def link(self, name: str) -> tuple[str, str]:
        return re.search(rf"{name}\s+(http://\S+)/(?:vote|owner)#(\S+)", self.said()).groups()

    def end(self, number=signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_with_results_and_how_to_go_on(folders, tmp_path, monkeypatch, capfd, number):
    shown, file = [], tmp_path / "votes.sqlite"
    monkeypatch.setattr(serving, "show", shown.append)
    faults = []

    def voter() -> None:
        try:
            end = time.monotonic() + 60
            while not any("Ctrl-C ends the server" in text for text in shown):
                assert time.monotonic() < end
                time.sleep(0.05)
            base, token = re.search(r"ann\s+(http://\S+)/vote#(\S+)", "\n".join(shown)).groups()
            client = Client(base, token)
            client.vote(client.pairs()["pairs"][0]["showing"], "right")
        except BaseException as error:
            faults.append(error)
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=voter)
    thread.start()
    status = main([*map(str, folders), "--votes_file", str(file), "--voters", "ann", "--checks", "0"])
    thread.join()
    out, err = capfd.readouterr()
    assert not faults and status == 0
    assert f"\n1 votes are in {file}\n" in out and "blurry" in out
    assert f"go on: python -m dpo_fast.vote --votes_file {file}; results: " in err and "Traceback" not in err


@pytest.mark.exhaustive
def test_it_serves_until_ctrl_c_and_goes_on(folders, tmp_path):
    words = ["--voters", "ann", "bob", "--open_link", "--questions", "general", "--checks", "0"]
    first = Command(tmp_path, *folders, *words)
    said = first.said()
    assert "6 pairs of images x 1 questions x 5 votes = 30 votes; 0 are in votes.sqlite" in said
    assert "\nyours, with the results:\n" in said and "/vote#join=" in said
    base, ann = first.link("ann")
    voter = Client(base, ann)
    now = voter.pairs()
    for _ in range(4):
        now = voter.vote(now["pairs"][0]["showing"], "right").json()
    owner = Client(base, first.link("results:")[1])
    assert owner.get("/api/owner/results", timeout=60).json()["votes"] == 4
    assert first.end() == 0
    said = first.said().partition("Ctrl-C ends the server")[2]
    assert "\n4 votes are in votes.sqlite\n" in said and "win rate" in said and "Traceback" not in said
    assert "leaked" not in said  # a library's complaint about objects that were never freed
    assert "go on: python -m dpo_fast.vote --votes_file votes.sqlite; results: " in said
    assert not any(token in said for token in (ann, first.link("bob")[1]))
    second = Command(tmp_path, "--votes_file", "votes.sqlite", "--port", first_port := free_port())
    assert "30 votes; 4 are in votes.sqlite" in second.said() and "ann" not in second.said()
    assert Client(f"http://127.0.0.1:{first_port}", ann).pairs()["done"] == 4  # the link of before
    assert second.end(signal.SIGTERM) == 0


def test_a_voter_who_has_a_link_is_named(folders, tmp_path, capfd):
    config = VoteConfig(folders=tuple(folders), voters=("ann",), votes_file=tmp_path / "votes.sqlite")
    for voters, expected in ((("ann",), ()), (("bob", "ann"), ("ann: with a link already, which stays valid",))):
        session = open_session(replace(config, voters=voters))
        try:
            with Writer(session.desk) as writer:
                serving._print_links(replace(config, voters=voters), session, writer, "http://127.0.0.1:1")
        finally:
            session.close()
        lines = capfd.readouterr().out
        assert all(line in lines for line in expected) and ("already" in lines) == bool(expected)
        assert len(re.findall("/vote#", lines)) == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_results_of_a_file(folders, tmp_path, capfd):
    file = tmp_path / "votes.sqlite"
    with running(VoteConfig(folders=tuple(folders), voters=("ann",), votes_file=file, delay=0)) as server:
        vote_all(server.voter("ann"), "tie")
        assert main(["results", str(file)]) == 0  # also while it is in use
        out = capfd.readouterr().out
        assert "blurry" in out and "crisp" in out and "50" in out
        assert main(["results", str(file), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["votes"] == 18
        assert main(["results", "--picture", str(tmp_path / "votes.png"), str(file)]) == 0
        assert "blurry" in capfd.readouterr().out
        with Image.open(tmp_path / "votes.png") as picture:
            assert picture.format == "PNG" and picture.width == 1100 and len(picture.getcolors(1 << 20)) > 8
    for words, said in (
        (["results"], "takes one file of votes"),
        (["results", str(file), "x"], "takes one file of votes"),
        (["results", str(tmp_path / "no.sqlite")], "does not exist"),
        (["results", str(file), "--csv"], "--csv is no flag of `vote results`"),
        (["results", str(file), "--picture"], "--picture needs the file to draw"),
        (["results", str(file), "--picture", "votes.gif"], "--picture needs the file to draw"),
    ):
        assert main(words) == 2
        err = capfd.readouterr().err
        assert said in err and err.count("\n") == 1
    assert main(["results", "--help"]) == 0 and "usage:" in capfd.readouterr().out


def test_the_extra_that_is_missing_is_named(folders, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([*map(str, folders)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "pip install 'dpo_fast[vote]'" in err and "uvicorn" in err


def test_a_port_in_use_is_said(folders, capfd, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [*map(str, folders), "--port", str(port), "--votes_file", str(tmp_path / "votes.sqlite")]
        assert main(words) == 2
    err = capfd.readouterr().err
    assert err == f"dpo_fast: error: --port {port} is in use by another process: name another, or 0\n"
    assert not (tmp_path / "votes.sqlite").exists()


def test_an_address_of_another_machine_is_said(folders, capfd):
    assert main([*map(str, folders), "--host", "192.0.2.1"]) == 2
    assert "--host 192.0.2.1 --port 0 cannot be listened at" in capfd.readouterr().err


def test_links_begin_with_the_address_that_voters_reach(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        base = lambda **options: serving._base(VoteConfig(**options), listener)
        assert base() == f"http://127.0.0.1:{port}"
        assert base(host="::1") == f"http://[::1]:{port}"
        assert base(public_url="https://Votes.example.org/") == "https://votes.example.org"
        monkeypatch.setattr(serving, "_address_in_network", lambda family: "192.168.1.7")
        assert base(host="0.0.0.0") == f"http://192.168.1.7:{port}"


def test_behind_a_proxy(folders, tmp_path):
    """Links, Host and Origin are those of the proxy, and limits are by the address that it names."""
    config = VoteConfig(
        folders=tuple(folders), voters=("ann",), votes_file=tmp_path / "votes.sqlite", delay=0,
        public_url="https://votes.example.org",
    )  # fmt: skip
    with running(config, Limits(address=Rate(0.01, 3))) as server:
        ann = server.voter("ann")
        names = {"host": "votes.example.org", "origin": "https://votes.example.org", "x-forwarded-proto": "https"}
        for address, expected in (("192.0.2.1", [200] * 3 + [429]), ("192.0.2.2", [200])):
            headers = {**names, "x-forwarded-for": address}
            assert [ann.get("/api/pairs", headers=headers).status_code for _ in expected] == expected
        added = server.owner().post(
            "/api/owner/voters", {"name": "bob"}, headers={**names, "x-forwarded-for": "192.0.2.3"}
        )
        assert added.json()["link"].startswith("https://votes.example.org/vote#")
    with running(VoteConfig(folders=tuple(folders), voters=("ann",), votes_file=tmp_path / "2.sqlite", delay=0),
                 Limits(address=Rate(0.01, 3))) as server:  # fmt: skip
        answers = [server.voter("ann").get("/vote", headers={"x-forwarded-for": f"192.0.2.{k}"}) for k in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 3 + [429]  # nobody's word is taken for an address


def test_what_every_flag_is_for_is_said(capfd):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capfd.readouterr().out
    for flag in VoteConfig.__dataclass_fields__:
        assert f"--{flag}" in out


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_ends_the_server_and_a_second_one_does_not_wait():
    server = type("Server", (), {"should_exit": False, "force_exit": False})()
    end = serving._ender(server)
    end(signal.SIGINT, None)
    assert server.should_exit and not server.force_exit
    end(signal.SIGINT, None)
    assert server.force_exit
