"""What a run is asked about, who asks, what is remembered, and what follows."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.choices import choose as module
from dpo_fast.choices import machine, pair_ops, timing
from dpo_fast.choices.choose import Choices, Chosen, choose
from dpo_fast.choices.trial import NO_TIME, Evidence
from dpo_fast.choices.unet import Variant
from dpo_fast.choices.workload import SDXL, Workload
from dpo_fast.kernels import dispatch
from dpo_fast.parallel import Ranks
from tests.helpers.planted_gpu import Machine

GPU = Workload("cuda:0", "bfloat16", 4, 128, SDXL, 77)
CPU = replace(GPU, device="cpu", dtype="float32")
LONG = 100_000


@pytest.fixture
def gpu(monkeypatch) -> Machine:
    """This process on a planted GPU."""
    return Machine.here(monkeypatch)


def ranks(device: str = "cuda:0") -> Ranks:
    return Ranks(None, 0, 1, torch.device(device), None)


def test_a_gpu_runs_what_is_proven_and_fastest_there(gpu, tmp_path):
    chosen = choose(GPU, ranks(), Choices(), LONG, tmp_path)
    assert chosen.choices == Choices("native", "cudnn", "channels_last", "regional")
    assert [outcome.chosen for outcome in chosen.outcomes] == [
        "cudnn, channels_last, off",
        "cudnn, channels_last, regional",
        "native",
    ]
    attention, compiled, ops = chosen.lines
    assert attention.startswith("attention cudnn, memory order channels_last: proven here, 1.11 times as fast")
    assert compiled.startswith("compile regional: proven here, 1.18 times as fast as cudnn, channels_last, off; ")
    assert "cudnn, channels_last, resnets wrong: policy and reference differ" in compiled
    assert ops == "pair ops by native: proven here, 2.00 times as fast as reference"


def test_what_is_not_proven_is_not_used(gpu, tmp_path):
    gpu.wrong = dict.fromkeys(("native", "triton", "cudnn", "flash", "efficient", "xformers", "regional"), "noise")
    chosen = choose(GPU, ranks(), Choices(), LONG, tmp_path)
    assert chosen.choices == Choices("reference", "sdpa", "channels_last", "off")
    assert "native wrong: noise; triton wrong: noise" in chosen.lines[-1]


def test_flags_are_not_asked_about(gpu, tmp_path):
    fixed = Choices("triton", "flash", "contiguous", "off")
    assert choose(GPU, ranks(), fixed, LONG, tmp_path).choices == fixed and gpu.asked == []
    some = choose(GPU, ranks(), Choices(attention="flash", compile="off"), LONG, tmp_path)
    assert some.choices == Choices("native", "flash", "channels_last", "off")
    assert gpu.asked[0] == ("unet", ("flash, contiguous, off",))


def test_a_backend_of_the_environment_is_not_asked_about(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert choose(GPU, ranks(), Choices(), LONG, tmp_path).choices.backend == "auto"
    assert "pair_ops" not in dict(gpu.asked)


def test_a_backend_of_one_hosts_environment_keeps_all_from_asking(gpu, tmp_path):
    """Else only some ranks would take part in what follows."""
    other = two(lambda value: not value if isinstance(value, bool) else value if isinstance(value, str) else None)
    assert choose(GPU, other, Choices(attention="sdpa", memory_order="contiguous", compile="off"), LONG, tmp_path) == (
        Chosen(Choices("auto", "sdpa", "contiguous", "off"))
    )


def test_a_mode_of_compiling_is_proven_with_the_attention(gpu, tmp_path):
    chosen = choose(GPU, ranks(), Choices(compile="regional"), LONG, tmp_path)
    assert chosen.choices == Choices("native", "cudnn", "channels_last", "regional")
    assert all(candidate.endswith(", regional") for candidate in gpu.asked[0][1])
    assert choose(GPU, ranks(), Choices(compile="regional"), 500, tmp_path / "other").choices.attention == "auto"


def test_ten_steps_are_not_proven_and_ten_thousand_are(gpu, tmp_path):
    short = choose(GPU, ranks(), Choices(), 10, tmp_path)
    assert short.choices == Choices() and gpu.asked == [] and short.outcomes == ()
    assert short.lines == (
        "nothing is proven for a run of about 22 s, which would not pay for it: plain defaults are used",
    )
    middle = choose(GPU, ranks(), Choices(), 250, tmp_path)  # a quarter of an hour: too short to try four programs
    assert middle.choices == Choices("native", "cudnn", "channels_last", "auto")
    assert "compile off: a run of about 15 minutes is too short to pay for finding out" in middle.lines
    assert choose(GPU, ranks(), Choices(), 10_000, tmp_path).choices.compile == "regional"


def test_what_was_found_is_remembered(gpu, tmp_path):
    first = choose(GPU, ranks(), Choices(), LONG, tmp_path)
    asked = len(gpu.asked)
    assert choose(GPU, ranks(), Choices(), LONG, tmp_path) == first and len(gpu.asked) == asked == 3
    assert choose(GPU, ranks(), Choices(), 10, tmp_path).choices.backend == "native"  # it costs nothing
    other_gpu = choose(replace(GPU, device="cuda:1"), ranks("cuda:1"), Choices(), LONG, tmp_path)
    assert other_gpu.choices == first.choices and len(gpu.asked) == asked
    choose(replace(GPU, pairs=2), ranks(), Choices(), LONG, tmp_path)
    assert len(gpu.asked) == 2 * asked
    gpu.driver = "2"
    choose(GPU, ranks(), Choices(), LONG, tmp_path)
    assert len(gpu.asked) == 3 * asked


def test_what_could_not_be_tried_is_not_remembered(gpu, tmp_path, monkeypatch):
    for reason in ("could not be proven: exclusive", NO_TIME):
        monkeypatch.setattr(
            module, "judge", lambda plan, base, candidates, *rest, r=reason: Evidence(dict.fromkeys(candidates, r))
        )
        chosen = choose(GPU, ranks(), Choices(compile="off"), LONG, tmp_path)
        assert chosen.choices == Choices(compile="off")  # the defaults, which on a CPU are native kernels
        assert reason in chosen.lines[0] and not list(tmp_path.rglob("*.json"))


def test_a_process_that_cannot_be_started_proves_nothing(gpu, tmp_path, monkeypatch):
    def judge(*arguments):
        raise OSError("too many processes")

    monkeypatch.setattr(module, "judge", judge)
    chosen = choose(GPU, ranks(), Choices(), 500, tmp_path)
    assert chosen.choices.backend == "auto" and "could not be proven: too many processes" in chosen.lines[-1]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"about": 1, "evidence": {"reasons": {"evil": ""}}}'])
def test_a_damaged_memory_is_not_used(gpu, tmp_path, content, caplog):
    first = choose(GPU, ranks(), Choices(), LONG, tmp_path)
    asked = len(gpu.asked)
    for file in tmp_path.rglob("*.json"):
        file.write_bytes(content)
    assert choose(GPU, ranks(), Choices(), LONG, tmp_path) == first and len(gpu.asked) == 2 * asked


def test_without_a_place_to_remember_it_is_proven_each_time(gpu, tmp_path, caplog):
    (tmp_path / "choices").write_text("a file in the way")
    for _ in range(2):
        assert choose(GPU, ranks(), Choices(), LONG, tmp_path).choices.backend == "native"
    assert len(gpu.asked) == 6 and "the next run proves anew" in caplog.text


class TwoRanks(Ranks):
    """Rank 0 of two on two hosts; `other` answers for the second."""

    def gather(self, value: object) -> list[object]:
        return [value, self.other(value)]


def two(other) -> Ranks:
    found = TwoRanks(None, 0, 2, torch.device("cuda:0"), None)
    found.other = other
    found.share = lambda value: value
    return found


def test_two_hosts_that_disagree_take_what_both_prove(gpu, tmp_path):
    def other(value: object) -> object:
        if not isinstance(value, dict):
            return "host 1, planted GPU" if isinstance(value, str) else value
        reasons = {
            name: "wrong: here" if "cudnn" in name or name == "native" else r for name, r in value["reasons"].items()
        }
        kept = {name: rounds for name, rounds in value["rounds"].items() if not reasons.get(name)}
        return value | {"reasons": reasons, "rounds": kept}

    chosen = choose(GPU, two(other), Choices(), LONG, tmp_path)
    assert chosen.choices == Choices("triton", "flash", "channels_last", "regional")
    assert "native wrong: here (on host 1, planted GPU)" in chosen.lines[-1]


def test_one_rank_of_a_host_asks(gpu, tmp_path):
    same = two(lambda value: value if isinstance(value, str) else None)
    assert choose(GPU, same, Choices(), LONG, tmp_path).choices.backend == "native"
    assert module._Asking(same, tmp_path, only_known=False).asks
    assert not module._Asking(replace_rank(same, 1), tmp_path, only_known=False).asks


def replace_rank(ranks: TwoRanks, rank: int) -> TwoRanks:
    found = two(ranks.other)
    found.rank = rank
    return found


def test_a_cpu_has_one_attention_and_no_tuned_programs():
    fixed = Choices()
    assert module.eager_question(CPU, fixed, Variant()).candidates == ("sdpa, contiguous, off",)
    assert module.compile_question(CPU, Variant()).candidates == (
        "sdpa, channels_last, regional",
        "sdpa, channels_last, resnets",
    )
    assert len(module.eager_question(GPU, fixed, Variant()).candidates) == 9
    assert len(module.compile_question(GPU, Variant()).candidates) == 4


def test_the_pair_ops_are_asked_about_at_the_shapes_of_the_run():
    question = module.pair_ops_question(replace(GPU, reference="cached", labels=True), "contiguous")
    shape = pair_ops.Shape.of(question.arguments)
    assert shape == pair_ops.Shape(4, (4, 128, 128), torch.bfloat16, reference_errors=True, labels=True)
    assert question.candidates == pair_ops.BACKENDS and question.arguments["device"] == "cuda:0"


def test_facts_name_all_that_an_outcome_depends_on():
    facts = machine.facts(torch.device("cpu"))
    assert {"device", "code", "torch", "triton", "diffusers", "threads"} <= facts.keys() and facts["device"]
    assert machine.site(torch.device("cpu")).endswith(facts["device"])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_on_this_cpu(tmp_path, sd15_path):
    """The whole path with real trials: native is proven, and the second start takes no time."""
    config = json.loads((Path(sd15_path) / "unet" / "config.json").read_text())
    workload = Workload("cpu", "float32", 2, 8, config, 7)
    first = choose(workload, ranks("cpu"), Choices(compile="off"), 1e9, tmp_path)
    native = not dispatch.usable_backends("cpu")["native"]
    assert first.choices.backend == ("native" if native else "auto") and len(first.outcomes) == 2
    assert all(not row.reason or row.unusable for outcome in first.outcomes for row in outcome.rows)
    started = time.process_time()
    assert choose(workload, ranks("cpu"), Choices(compile="off"), 1e9, tmp_path) == first
    assert time.process_time() - started < 5


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_a_device_without_an_index_can_be_taken(monkeypatch, device, index):
    """So accelerate names it where there is no launcher."""
    taken = []

    def set_device(given):
        assert isinstance(given, int)  # PyTorch refuses a device without an index
        taken.append(given)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: SimpleNamespace(item=lambda: 0.0))
    timing.open_device(device)
    assert taken == [index]
