"""docs/python.md: its examples run as they stand, one after another, as in a notebook."""

import re
from pathlib import Path

import pytest

import dpo_fast

PAGE = Path(dpo_fast.__file__).parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "notebook"}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert len(BLOCKS) >= 8
    made = {path.parent.name for path in tmp_path.glob("runs/*/summary.json")}
    assert made == {"first", "hotter", "again", "watched", "penalised"}
    assert names["result"].findings is not None and "runs/first/report.html" in out
    assert names["stopped"].stopped and names["done"].summary["steps"] == len(names["watch"].losses)
    assert "objective: python:penalised\n" in (tmp_path / "runs" / "penalised" / "config.yaml").read_text()
    assert "3e-05 full\n" in out and len(names["found"].findings.overall) == 2
    images = names["images"]
    assert len(images.rows) == 4 and all((images.folder / row.file).is_file() for row in images.rows)
    assert len(names["scores"]) == 2 and names["trainer"].run.step == 1
