"""Margins of two runs beside each other."""

import json

import pytest

from benchmarks.margins import compare, table


def write(folder, margins):
    folder.mkdir()
    lines = [{"step": 10 * i, "loss": 0.6, "margin": m, "margin_rms": 0.5} for i, m in enumerate(margins)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_largest_difference_is_told(tmp_path):
    one, other = write(tmp_path / "a", [0.0, 0.25, 0.3]), write(tmp_path / "b", [0.0, 0.2, 0.31, 0.4])
    rows = compare(one, other)
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert "1.00e-01 of their rms, over 20 steps" in table(rows).splitlines()[-1]


def test_runs_without_a_common_step_are_refused(tmp_path):
    one, other = write(tmp_path / "a", []), write(tmp_path / "b", [0.1])
    with pytest.raises(SystemExit, match="no logged step in common"):
        compare(one, other)
