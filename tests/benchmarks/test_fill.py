"""The tables of README and docs are what the committed results give, and a GPU's report fills its cells."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import fill, tables
from benchmarks.step.cases import CASES

ROOT = Path(fill.__file__).parents[1]
PAGE = "docs/step_time.md"
RESULTS = "benchmarks/results"


@pytest.fixture
def copy(tmp_path):
    """README, docs and results, to write in; as if no GPU had reported yet."""
    for name in fill.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / RESULTS).mkdir(parents=True)
    for path in (ROOT / RESULTS).glob("*.json"):
        if fill._report(path) is None:
            shutil.copy(path, tmp_path / RESULTS)
    fill.fill(tmp_path, fill.sources_of(tmp_path), write=True)
    return tmp_path


def record(results: object, status: str = "ok", command: str = "python the_command.py") -> dict:
    return {"status": status, "commands": [command], "seconds": 1.0, "results": results}


def made_up_report(kernels: dict, step: dict) -> dict:
    """A report with every stage, its benchmarks being those of a CPU under other names."""
    passed = {"passed": 7, "failed": 0, "skipped": 1, "failures": {}, "unfinished": []}
    hung = {**passed, "failed": 2, "failures": {"a": "", "b": ""}, "unfinished": ["tests/x.py::test_y"]}
    triton = [{**row, "implementation": "triton"} for row in kernels["rows"] if row["implementation"] == "native"]
    wrong = [
        {"case": f"{case} B=8", "op": "noise_pair", "implementation": "compile"} for case in ("sd15-512", "sdxl-1024")
    ]
    stages = {
        "tests": record(passed),
        "triton tests": record(hung, "timed out"),
        **{f"sanitizer {tool}": record({"errors": 0, "tests": passed}) for tool in ("memcheck", "racecheck")},
        **{
            f"sanitizer {tool}": record({"errors": None, "tests": None}, "failed")
            for tool in ("synccheck", "initcheck")
        },
        "kernels": record(
            {**kernels, "rows": kernels["rows"] + triton, "wrong": wrong}, command="python benchmarks/kernels.py"
        ),
        "ceilings": record({"fp32_tflops": 51.2, "fp16_tflops": 790.4, "bf16_tflops": 800.6, "copy_gb_per_s": 4321.0}),
        "margins": record({"rows": [{"step": 10, "margin_rms": 0.25, "difference_over_rms": 0.0123}]}),
        "attention": record(
            {
                "rows": [
                    {"case": "sdxl", "dtype": "bf16", "kernel": kernel, "forward_ms": ms, "backward_ms": 2 * ms}
                    for kernel, ms in (("auto", 0.5), ("cudnn", 0.25), ("math", 5.0))
                ]
            }
        ),
    }
    variant = dict(step_ms=60.0, reference_ms=20.0, with_both_ms=22.0, kept_mb=900.0, compile_s=31.0)
    for name in ("sdxl-lora", "sdxl-full", "sd15-lora", "sd15-full"):
        stages[f"variants {name}"] = record({"dtype": "bf16", "rows": [{"variant": "channels_last", **variant}]})
    for name, case in CASES.items():
        if not case.mini:
            rows = [{**row, "provider": row["provider"].split("-")[0]} for row in step["rows"]]
            for row in rows:
                row["provider"] = tables.PEERS[case.tuning] if row["provider"] == "peer" else row["provider"]
            cached = {**rows[0], "provider": "ours-cached"}
            stages[f"step {name}"] = record({**step, "case": name, "rows": [*rows, cached], "unmeasured": []})
    return {
        "device": "cuda",
        "gpu": "NVIDIA H200",
        "driver": "570.86",
        "started": "2026-12-01 10:00:00 UTC",
        "commit": "0123456789abcdef",
        "changed": False,
        "versions": {"torch": "2.13.0", "triton": "3.9.0", "diffusers": "0.42.1"},
        "stages": stages,
    }


@pytest.fixture
def report():
    kernels = json.loads((ROOT / RESULTS / "cpu-2026-11-20.json").read_text())
    step = json.loads((ROOT / RESULTS / "step-mini-sdxl-1024-lora-cpu-2026-11-21.json").read_text())
    return made_up_report(kernels, step)


def rendered(root: Path) -> dict[str, str]:
    """Every table in the documents of a folder."""
    found = {}
    for document in fill.DOCUMENTS:
        found |= {match[1]: match[2] for match in fill._TABLE.finditer((root / document).read_text())}
    return found


def test_the_documents_say_what_the_results_give():
    assert fill.fill(ROOT, fill.sources_of(ROOT), write=False) == [], "run: python -m benchmarks.fill"


def test_a_number_that_was_typed_is_found(copy, monkeypatch, capsys):
    monkeypatch.setattr(fill, "ROOT", copy)
    monkeypatch.setattr(sys, "argv", ["fill", "--check"])
    assert fill.main() == 0
    page = (copy / PAGE).read_text()
    assert page.count("| 7,203 |") == 2
    (copy / PAGE).write_text(page.replace("| 7,203 |", "| 7,202 |", 1))
    assert fill.main() == 1
    assert "docs/step_time.md, table counts: is not what the results give" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fill"])
    assert fill.main() == 0 and (copy / PAGE).read_text() == page


def test_results_that_changed_are_found(copy):
    path = copy / RESULTS / "counts.json"
    path.write_text(path.read_text().replace('"launches": 3048', '"launches": 3049'))
    assert fill.fill(copy, fill.sources_of(copy), write=False) == ["docs/step_time.md, table counts"]


def test_without_a_gpu_its_cells_are_not_measured(copy):
    for name, text in rendered(copy).items():
        assert ("gpu" in name) == (tables.NOT_MEASURED in text), name
        assert ("gpu" in name) == (f"To be measured by `{tables.REPORT}`" in text), name


def test_a_gpus_report_fills_every_cell(copy, report, monkeypatch, capsys):
    before = rendered(copy)
    file = copy / "nvidia-h200-2026-12-01.json"
    file.write_text(json.dumps(report))
    monkeypatch.setattr(fill, "ROOT", copy)
    monkeypatch.setattr(sys, "argv", ["fill", str(file)])
    assert fill.main() == 0
    said = capsys.readouterr().out
    assert "does this still hold? README.md:" in said and "copy the file to benchmarks/results/" in said
    after = rendered(copy)
    for name, text in after.items():
        assert (text != before[name]) == ("gpu" in name), name
        assert tables.NOT_MEASURED not in text, name
        if "gpu" in name:
            assert "on NVIDIA H200, driver 570.86, torch 2.13.0, triton 3.9.0" in " ".join(text.split()), name
            assert "commit 0123456789ab, by" in " ".join(text.split()) and file.name in text, name
    for name, line in {
        "kernels-gpu": "| SD1.5 512, fp16 | noise_pair | 4.510 (165) | wrong values | 0.277 (2) | 0.277 (2) |",
        "step-gpu": "| sdxl-1024-lora | 614 (554 to 733) | 614 (554 to 733) | 632 (582 to 677) | 1180 (1044 to 1456)"
        " | 1.03 times, 1.92 times | 1.1 | yes |",
        "gpu-ceilings": "| | 51.2 | 790 | 801 | 4321 |",
        "gpu-margins": "| 10 | 0.25 | 1.2e-02 |",
        "gpu-attention": "| sdxl, bf16 | 1.500 | 0.750 | cannot | cannot | 15.000 | cudnn |",
        "gpu-variants": "| sd15-full, bf16: channels_last | 60.0 | 20.0 | 22.0 | 900 | 31 |",
    }.items():
        assert line in after[name].splitlines(), after[name]
    for line in (
        "| tests that need a GPU | 7 passed, 0 failed, 1 skipped |",
        "| tests of the Triton kernels | 7 passed, 2 failed, 1 skipped, 1 not finished (timed out) |",
        "| compute-sanitizer memcheck | 0 errors; 7 passed, 0 failed, 1 skipped |",
        "| compute-sanitizer synccheck | no summary (failed) |",
    ):
        assert line in after["gpu-checks"].splitlines()

    monkeypatch.setattr(sys, "argv", ["fill", "--check"])  # the file is not among the committed results
    assert fill.main() == 1
    shutil.copy(file, copy / RESULTS)
    assert fill.main() == 0


def test_half_a_report_fills_what_it_has(copy, report):
    """A step that was cut off after its first provider, and one that did other work."""
    stages = report["stages"]
    for name in [name for name in stages if not name.startswith("step ")]:
        del stages[name]
    stages["step sdxl-1024-lora"]["results"]["rows"][1:] = []
    stages["step sdxl-1024-full"]["results"]["rows"][0]["problems"] = ["gradient norm"]
    stages["step sd15-512-full"] = record(None, "timed out")
    (copy / RESULTS / "gpu.json").write_text(json.dumps(report))
    fill.fill(copy, fill.sources_of(copy), write=True)
    lines = rendered(copy)["step-gpu"].splitlines()
    [lora] = [line for line in lines if line.startswith("| sdxl-1024-lora")]
    assert lora.split(" | ")[1:6] == ["614 (554 to 733)", *[tables.NOT_MEASURED] * 4] and lora.endswith("| 1.1 | yes |")
    assert next(line for line in lines if line.startswith("| sdxl-1024-full")).endswith("| no: ours |")
    [cut] = [line for line in lines if line.startswith("| sd15-512-full")]
    assert cut.count(tables.NOT_MEASURED) == 6 and cut.endswith("| |")
    assert rendered(copy)["gpu-checks"].count(tables.NOT_MEASURED) == 6


def test_the_newest_report_counts(copy, report):
    for day, driver in (("02", "new"), ("01", "old")):
        later = report | {"started": f"2026-12-{day} 10:00:00 UTC", "driver": driver}
        (copy / RESULTS / f"a-{driver}.json").write_text(json.dumps(later))
    assert fill.sources_of(copy).report["driver"] == "new"


def test_files_that_are_no_report_are_refused(copy, report, monkeypatch, capsys):
    monkeypatch.setattr(fill, "ROOT", copy)
    (copy / "other.json").write_text("{}")
    (copy / "cpu.json").write_text(json.dumps(report | {"device": "cpu"}))
    (copy / "half.json").write_text('{"stages": ')
    for name, message in {
        "other.json": "is not the report of a GPU",
        "cpu.json": "is not the report of a GPU",
        "half.json": "is not JSON",
        "none.json": "cannot be read",
    }.items():
        monkeypatch.setattr(sys, "argv", ["fill", str(copy / name)])
        assert fill.main() == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("<!-- table counts -->", "<!-- table count -->", "markers of tables without their partner"),
        ("table counts", "table count", "markers of tables"),
        ("counts -->", "other -->", "a table 'other': choose from kernels-cpu"),
        ("<!-- end counts -->", "", "markers of tables without their partner"),
    ],
)
def test_markers_that_do_not_fit_are_refused(copy, before, after, message):
    page = (copy / PAGE).read_text()
    (copy / PAGE).write_text(page.replace(before, after))
    with pytest.raises(ValueError, match=message):
        fill.fill(copy, fill.sources_of(copy), write=True)


def test_a_table_without_a_place_is_refused(copy):
    page = (copy / PAGE).read_text()
    (copy / PAGE).write_text(fill._TABLE.sub("", page))
    with pytest.raises(ValueError, match="no document has the table step-gpu"):
        fill.fill(copy, fill.sources_of(copy), write=False)
