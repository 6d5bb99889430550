"""The numbers of a log line, against the same numbers worked out pair by pair."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from dpo_fast.checksums import Damaged
from dpo_fast.training.metrics import Clock, Extent, MetricsFile, PairSums, for_trackers, kept_lines, overoptimised

CPU = torch.device("cpu")


def alone(tensors: list[torch.Tensor]) -> None:
    """The reduction of a run of one process."""


def batch(pairs: int) -> dict[str, torch.Tensor]:
    margin = torch.randn(pairs)
    margin[0] = 0.0  # a tie counts one half
    weight = (torch.rand(pairs) < 0.5).float()
    weight[-1] = 1.0  # a mean over no pairs would be none
    return dict(
        margin=margin,
        error_delta=torch.randn(2 * pairs),
        timesteps=torch.randint(0, 1000, (pairs,)),
        weight=weight,
        loss=(torch.nn.functional.softplus(-margin) * weight).mean(),
    )


def by_hand(batches: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    """Means over the pairs of weight 1, in plain Python."""
    rows, loss = [], 0.0
    for b in batches:
        n = len(b["margin"])
        loss += b["loss"].item() * n
        chosen, rejected = b["error_delta"].tolist()[:n], b["error_delta"].tolist()[n:]
        pairs = zip(b["margin"].tolist(), chosen, rejected, b["timesteps"].tolist(), b["weight"].tolist(), strict=True)
        rows += [pair[:4] for pair in pairs if pair[4]]
    mean = lambda values: sum(values) / len(values) if values else None
    correct = lambda margin: {True: 1.0, False: 0.0}[margin > 0] if margin else 0.5
    return {
        "loss": loss / len(rows),
        "margin": mean([m for m, *_ in rows]),
        "margin_rms": math.sqrt(mean([m * m for m, *_ in rows])),
        "implicit_accuracy": mean([correct(m) for m, *_ in rows]),
        "chosen_error_delta": mean([c for _, c, _, _ in rows]),
        "rejected_error_delta": mean([r for _, _, r, _ in rows]),
        "implicit_accuracy_by_timestep": [
            mean([correct(m) for m, _, _, t in rows if t // 100 == bucket]) for bucket in range(10)
        ],
    }


def assert_close(line: dict[str, object], expected: dict[str, object]) -> None:
    assert line.keys() == expected.keys()
    for name, value in expected.items():
        values = zip(line[name], value, strict=True) if isinstance(value, list) else [(line[name], value)]
        for found, wanted in values:
            assert found is wanted is None or found == pytest.approx(wanted, rel=1e-4, abs=1e-6), name


def test_a_line_is_the_mean_over_the_pairs_since_the_last():
    sums = PairSums(CPU, 1000)
    for sizes in ([50, 3, 40], [50]):  # pairs of the first line do not count in the second
        batches = [batch(pairs) for pairs in sizes]
        for b in batches:
            sums.add(**b)
        assert_close(sums.read(alone), by_hand(batches))


def test_a_line_counts_the_pairs_of_all_ranks():
    ranks = [PairSums(CPU, 1000) for _ in range(2)]
    batches = [batch(50), batch(9)]
    for sums, b in zip(ranks, batches, strict=True):
        sums.add(**b)

    def reduce(tensors: list[torch.Tensor]) -> None:
        for tensor, other in zip(tensors, (ranks[1].sums, ranks[1].by_timestep), strict=True):
            tensor += other

    assert_close(ranks[0].read(reduce), by_hand(batches))


def test_the_last_timestep_of_any_schedule_has_a_bucket():
    sums = PairSums(CPU, 37)
    sums.add(torch.tensor(0.5), torch.ones(2), torch.zeros(4), torch.tensor([0, 36]), torch.ones(2))
    assert sums.read(alone)["implicit_accuracy_by_timestep"] == [1.0] + [None] * 8 + [1.0]


def test_an_objective_without_a_margin_reports_its_loss_only():
    sums = PairSums(CPU, 1000)
    b = batch(4)
    sums.add(b["loss"], None, None, b["timesteps"], b["weight"])
    line = sums.read(alone)
    assert line.pop("loss") == pytest.approx(by_hand([b])["loss"])
    assert line.pop("implicit_accuracy_by_timestep") == [None] * 10
    assert set(line.values()) == {None}


def test_what_is_not_finite_is_null_in_its_line_and_forgotten_after():
    sums = PairSums(CPU, 1000)
    good, bad = batch(4), batch(4)
    bad["loss"], bad["error_delta"] = torch.tensor(math.inf), bad["error_delta"] * math.nan
    bad["weight"] = torch.ones(4)
    sums.add(**bad)
    line = sums.read(alone)
    assert line["loss"] is line["chosen_error_delta"] is line["rejected_error_delta"] is None
    assert line["margin"] is not None
    assert not overoptimised({**line, "implicit_accuracy": 0.9})
    assert set(map(str, sums.read(alone).values())) == {"None", str([None] * 10)}  # no pairs at all
    sums.add(**good)
    assert_close(sums.read(alone), by_hand([good]))


@pytest.mark.parametrize(
    "accuracy, chosen, rejected, expected",
    [
        (0.9, 0.1, 0.2, True),
        (0.6, 0.1, 0.2, False),
        (0.9, -0.1, 0.2, False),
        (0.9, 0.1, -0.2, False),
        (None, None, None, False),
        (0.9, None, 0.2, False),
    ],
)
def test_the_signature_of_over_optimisation(accuracy, chosen, rejected, expected):
    line = {"implicit_accuracy": accuracy, "chosen_error_delta": chosen, "rejected_error_delta": rejected}
    assert overoptimised(line) is expected


def test_the_clock_counts_steps_waits_and_no_pauses(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(step=10)
    now += 3
    with clock.waiting():
        now += 1
    with clock.paused():
        now += 50
    assert clock.read(step=12) == (2.0, 0.25)
    clock.restart(12)
    now += 5
    assert clock.read(step=13) == (5.0, 0.0)


def written(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_the_file_goes_on_from_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.write({"step": step, "margin": None})
        assert written(path)[-1] == step  # flushed at once
    with pytest.raises(ValueError):
        file.write({"step": 4, "loss": math.nan})
    file.close()
    path.write_text(path.read_text() + '{"step": 2, "lo')  # what a killed process leaves

    resumed = MetricsFile(path, keep_through_step=2)
    assert written(path) == [1, 2]
    resumed.write({"step": 3})
    resumed.close()
    assert written(path) == [1, 2, 3]
    MetricsFile(path).close()  # a new run
    assert written(path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_trackers_get_flat_numbers():
    buckets = [None] * 10
    buckets[3] = 0.25
    line = {"step": 3, "loss": 0.5, "margin": None, "implicit_accuracy_by_timestep": buckets}
    assert for_trackers(line) == {"step": 3, "loss": 0.5, "implicit_accuracy_by_timestep/30%": 0.25}
    assert for_trackers({"validation_accuracy": 0.5}) == {"validation_accuracy": 0.5}


# ---- resuming ----------------------------------------------------------------------------------------------------


def logged(path: Path, steps: int) -> tuple[bytes, Extent]:
    """A log of some steps, and its extent after the second."""
    file = MetricsFile(path)
    for step in range(1, steps + 1):
        file.write({"step": step, "loss": step / 7})
        if step == 2:
            extent = file.extent()
    file.close()
    return path.read_bytes(), extent


@pytest.mark.faults
def test_a_log_that_changed_is_named_and_not_gone_on_with(tmp_path):
    path = tmp_path / "metrics.jsonl"
    data, extent = logged(path, 4)
    assert extent.size == len(b"".join(data.splitlines(keepends=True)[:2]))
    assert kept_lines(path, 2, extent) == data[: extent.size]
    for place in range(extent.size):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(Damaged, match=r"metrics\.jsonl is damaged .*move it away"):
            MetricsFile(path, 2, extent)
    for changed in (b"", data[: extent.size - 1], data.replace(b'"step": 2', b'"step": 3')):
        path.write_bytes(changed)
        with pytest.raises(Damaged):
            kept_lines(path, 2, extent)
    path.write_bytes(data[: extent.size] + b"\xff whatever was written after the checkpoint\n")
    resumed = MetricsFile(path, 2, extent)
    resumed.write({"step": 3, "loss": 3 / 7})
    assert resumed.path.read_bytes() == b"".join(data.splitlines(keepends=True)[:3])
    assert kept_lines(path, 3, resumed.extent()) == path.read_bytes()
    resumed.close()


OLD = {
    "no JSON": b'{"step": 1, "loss" 0.1}\n',
    "no text": b"\xff\xfe\n",
    "no step": b'{"loss": 0.1}\n',
    "a step that is no number": b'{"step": "1"}\n',
    "a number alone": b"3\n",
    "an earlier step": b'{"step": 1}\n{"step": 3}\n{"step": 2}\n',
}


@pytest.mark.faults
@pytest.mark.parametrize("name", OLD)
def test_a_log_without_an_extent_is_checked_line_by_line(tmp_path, name):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(OLD[name] + b'{"step": 4}\n')
    with pytest.raises(Damaged, match=r"line [13] is not an object with a later step"):
        kept_lines(path, 9, None)
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')  # a killed process was writing
    assert kept_lines(path, 1, None) == b'{"step": 1}\n'
