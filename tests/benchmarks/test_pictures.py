"""The pictures of the README are made from a run, or nothing is written and one line says why."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pictures

BROWSER = f"""#!{sys.executable}
import sys
from urllib.parse import unquote
from PIL import Image
flags = dict(flag.partition("=")[::2] for flag in sys.argv[1:])
size = tuple(map(int, flags["--window-size"].split(",")))
page = open(unquote(sys.argv[-1].removeprefix("file://"))).read()
if page == "none":
    sys.exit("no display")
Image.new("RGB", size, page).save(flags["--screenshot"])
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that makes the pictures of a run whose page is a colour; it returns the exit status."""
    run, docs, browser = tmp_path / "a run", tmp_path / "docs", tmp_path / "browser"
    run.mkdir()
    browser.write_text(BROWSER)
    browser.chmod(0o755)

    def make(page: str | None = "green", command: Path = browser, samples: bool = True) -> int:
        if samples:
            Image.new("RGB", (30, 20), "red").save(run / "samples.png")
        if page is not None:
            (run / "report.html").write_text(page)
        words = [str(run), "--docs", str(docs), "--browser", str(command), "--height", "70"]
        monkeypatch.setattr(sys, "argv", ["pictures", *words])
        return pictures.main()

    return make


def test_both_pictures_come_from_the_run(made, tmp_path, capsys):
    assert made() == 0
    for name, size, colour in (("samples", (30, 20), "red"), ("report", (pictures.WIDTH, 70), "green")):
        with Image.open(tmp_path / "docs" / f"{name}.png") as image:
            assert image.tobytes() == Image.new("RGB", size, colour).tobytes()
    assert capsys.readouterr().out.split() == [str(tmp_path / "docs" / f"{n}.png") for n in ("samples", "report")]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"page": None}, "report.html does not exist: name the folder of a run that was evaluated"),
        ({"samples": False}, "samples.png cannot be read"),
        ({"command": Path("no-such-browser")}, "no browser no-such-browser: install one"),
        ({"page": "none"}, "made no picture, exit status 1: no display"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(made, tmp_path, capsys, options, said):
    assert made(**options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "docs").exists()


def test_a_browser_that_never_ends_is_given_up(made, tmp_path, monkeypatch, capsys):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(pictures, "PATIENCE", 0.2)
    assert made(command=slow) == 2 and "made no picture within 0.2 s" in capsys.readouterr().err
