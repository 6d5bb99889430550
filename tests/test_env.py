"""The report of a machine, and the proofs that go with it."""

import json

import pytest

from dpo_fast import env
from dpo_fast.choices.decision import decide
from dpo_fast.choices.trial import Evidence
from dpo_fast.kernels import dispatch

ROUNDS = {"reference": [1.0, 1.1, 1.2], "a": [1.0, 1.1, 1.2]}


def test_the_report_names_versions_and_devices(capsys):
    assert env.main([]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "torch", "cpu", "cuda", "native build", "attention sdpa"} <= set(lines)
    assert lines["cpu kernels reference" if "gpu" in lines else "cuda kernels reference"] == "usable"


@pytest.mark.exhaustive
def test_prove_prints_a_table_for_each_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert env.main(["--prove", "--json", str(tmp_path / "proof.json")]) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "proof.json").read_text())
    assert set(found["versions"]) == set(env.PACKAGES) and len(found["choices"]) == 4
    *of_ops, of_unet = found["choices"]
    for outcome in of_ops:
        assert outcome["choice"] in printed.out and outcome["baseline"] == "reference"
        reasons = {row["candidate"]: row["reason"] for row in outcome["rows"]}
        assert list(reasons) == ["reference", "native", "triton"]
        for name in ("native", "triton"):
            usable = not dispatch.usable_backends("cpu")[name]
            assert (reasons[name] == "") if usable else reasons[name].startswith("cannot be used")
    assert [row["candidate"] for row in of_unet["rows"]] == ["sdpa, channels_last, off", "sdpa, contiguous, off"]
    assert all(row["reason"] == "" and row["median"] > 0 for row in of_unet["rows"])
    assert "proving pair ops on cpu: SDXL" in printed.err


def test_a_file_for_nothing_is_refused(tmp_path, capsys):
    assert env.main(["--json", str(tmp_path / "x.json")]) == 2
    assert "is for the tables of --prove" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
    assert env.main(["--prove", "--json", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert env.main(["--compiled"]) == 2
    assert "--compiled is for --prove" in capsys.readouterr().err


def test_a_wrong_backend_is_in_the_exit_status(monkeypatch, capsys):
    for reason, status in (("", 0), ("cannot be used: no GPU", 0), ("wrong: noise", 1), ("ended with status 3", 1)):
        monkeypatch.setattr(
            env,
            "proofs",
            lambda compiled, reason=reason: iter([decide("ops", "reference", Evidence({"a": reason}, ROUNDS))]),
        )
        assert env.main(["--prove"]) == status
