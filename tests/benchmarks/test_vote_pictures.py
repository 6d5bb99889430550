"""The picture of the voting pages: simulated voters answer by the scores of a run, and a bad run is refused."""

import sys

import pytest

pytest.importorskip("playwright")
pytest.importorskip("fastapi")

from benchmarks import vote_pictures


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    words = [str(tmp_path / "no run"), "--docs", str(tmp_path), "--browser", sys.executable]
    monkeypatch.setattr(sys, "argv", ["vote_pictures", *words])
    assert vote_pictures.main() == 2
    assert "scores.parquet does not exist: name the folder of a run that was evaluated" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
