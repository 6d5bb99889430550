"""The protocol of a larger set of prompts and voters: the table finds what the simulated voters prefer."""

import math
import random

import pytest

from benchmarks import protocol

VOTERS = 12


def expected(question: str, policy: str) -> float:
    """The win rate by majority of five of these voters, by simulation."""
    draw = random.Random(0)
    leads = [protocol.taste(policy, draw) for _ in range(VOTERS)]
    image = type("File", (), {"parent": type("Folder", (), {"name": policy})})
    logits, wins = [lead(question, "", image) for lead in leads], 0.0
    for _ in range(20_000):
        votes = [of + math.log(1 / draw.uniform(1e-9, 1 - 1e-9) - 1) for of in draw.sample(logits, 5)]
        lead = sum((of > protocol.TIE_BELOW) - (of < -protocol.TIE_BELOW) for of in votes)
        wins += 0.5 + 0.5 * ((lead > 0) - (lead < 0))
    return wins / 20_000


@pytest.mark.exhaustive
def test_the_table_finds_what_voters_prefer(tmp_path):
    table = protocol.run(tmp_path, 40, VOTERS)
    whole = [row for row in table.rows if not row.name.endswith("people")]
    assert sum(row.prompts for row in whole) == 220 and len(table.rows) == 11
    for question in protocol.PREFERENCE:
        rate = sum(row.people[question].rate.value * row.prompts for row in whole) / 220
        assert rate == pytest.approx(expected(question, "dpo"), abs=4 * 0.5 / math.sqrt(220))
        held = [row.people[question].rate for row in table.rows]
        assert sum(of.low <= expected(question, "dpo") <= of.high for of in held) >= len(held) - 2
    assert list(table.remarks) == ["emu has no image of a prompt of hps"]
