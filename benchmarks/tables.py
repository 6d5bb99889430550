"""The tables of README and docs, rendered from results. A cell without a result says `not measured`."""

import json
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.step.cases import CASES

NOT_MEASURED = "not measured"
PEERS = {"lora": "peer-diffusers", "full": "peer-salesforce"}
SHAPES = {"sd15-512 B=8": "SD1.5 512, fp16", "sdxl-1024 B=8": "SDXL 1024, bf16"}
OPS = {"noise_pair": "noise_pair", "dpo_loss": "dpo_loss forward", "dpo_loss backward": "dpo_loss backward"}
REPORT = "python benchmarks/gpu_report.py OUT"


@dataclass(frozen=True)
class Sources:
    """The results to show: the committed ones in a folder, and a GPU's report if there is one."""

    folder: Path
    report: dict | None = None
    report_name: str | None = None

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def stage(self, name: str) -> dict:
        """Return the record of a stage in the GPU's report; empty if there is none."""
        return self.report["stages"].get(name, {}) if self.report else {}

    def results(self, name: str) -> dict:
        """Return what a stage measured, as far as it got."""
        return self.stage(name).get("results") or {}

    def origin(self, *names: str) -> str:
        """Return the sentence under a GPU table: command, hardware, versions, commit."""
        ran = [name for name in names if self.results(name)]
        if not ran:
            return wrapped(f"To be measured by `{REPORT}`.")
        command = self.stage(ran[0])["commands"][-1]
        versions = self.report["versions"]
        named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers") if name in versions)
        more = f" (and {len(ran) - 1} more like it)" if len(ran) > 1 else ""
        commit = (self.report["commit"] or "unknown")[:12] + (" with changes" if self.report["changed"] else "")
        return wrapped(
            f"From `{command}`{more} on {self.report['gpu']}, driver {self.report['driver']}, {named}, commit"
            f" {commit}, by `{REPORT}`; everything is in `benchmarks/results/{self.report_name}`."
        )


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a table as Markdown."""
    head = list(head)
    return "\n".join([_row(head), "|---" * len(head) + "|", *(_row(list(row)) for row in rows)])


def _row(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


# ---- the pair kernels ----------------------------------------------------------------------------------------------


WRONG = "wrong values"


def _kernel_rows(results: dict, columns: tuple[str, ...], absent: str, digits: int) -> Iterable[list[str]]:
    """Yield a row for each shape and op, in ms with `digits` decimals; `absent` fills cells without a result."""
    cells = {(row["case"], row["op"], row["implementation"]): row for row in results.get("rows", [])}
    wrong = {(row["case"], row["op"], row["implementation"]) for row in results.get("wrong", [])}
    for case, shape in SHAPES.items():
        for number, (op, words) in enumerate(OPS.items()):
            line = [shape if number == 0 else "", words]
            for column in columns:
                row = cells.get((case, op, column))
                launches = f" ({row['launches']})" if row and row["launches"] is not None else ""
                left_out = WRONG if (case, op, column) in wrong else absent
                line.append(f"{row['ms']:.{digits}f}{launches}" if row else left_out)
            yield line


def kernels_cpu(sources: Sources) -> str:
    columns = ("eager", "compile", "native")
    results = sources.json("cpu-2026-11-20.json")  # it leaves wrong results out without naming them
    return table(("shape", "op", *columns), _kernel_rows(results, columns, WRONG, 2))


def kernels_gpu(sources: Sources) -> str:
    columns = ("eager", "compile", "triton", "native")
    rows = _kernel_rows(sources.results("kernels"), columns, NOT_MEASURED, 3)
    return table(("shape, GPU", "op", *columns), rows) + "\n\n" + sources.origin("kernels")


# ---- the training step ---------------------------------------------------------------------------------------------


def _spread(row: dict | None) -> str:
    if row is None:
        return NOT_MEASURED
    ms = row["ms_a_pair"]
    digits = 0 if ms["median"] >= 20 else 1
    return f"{ms['median']:.{digits}f} ({ms['min']:.{digits}f} to {ms['max']:.{digits}f})"


def _times(rows: dict[str, dict], one: str, *others: str) -> str:
    """Format how many times as fast `one` is as each of the others."""
    ratios = [
        f"{rows[other]['ms_a_pair']['median'] / rows[one]['ms_a_pair']['median']:.2f} times"
        for other in others
        if one in rows and other in rows
    ]
    return ", ".join(ratios) if len(ratios) == len(others) else NOT_MEASURED


def _equal(rows: dict[str, dict]) -> str:
    if not rows:
        return ""
    wrong = [name for name, row in rows.items() if row["problems"]]
    return f"no: {', '.join(wrong)}" if wrong else "yes"


def step_cpu(sources: Sources) -> str:
    lines = []
    for name in ("mini-sdxl-1024-lora", "mini-sd15-512-full"):
        result = sources.json(f"step-{name}-cpu-2026-11-21.json")
        rows = {row["provider"]: row for row in result["rows"]}
        peer = PEERS[CASES[name].tuning]
        cells = [_spread(rows.get(provider)) for provider in ("ours", "tuned", peer)]
        lines.append([name, *cells, _times(rows, "ours", "tuned", peer), _equal(rows)])
    head = ("ms a pair, two CPU cores", "ours", "tuned", "peer", "ours is faster than tuned, peer", "equal work")
    return table(head, lines)


def step_gpu(sources: Sources) -> str:
    lines, names = [], [name for name in CASES if not CASES[name].mini]
    for name in names:
        result = sources.results(f"step {name}")
        rows = {row["provider"]: row for row in result.get("rows", [])}
        peer = PEERS[CASES[name].tuning]
        cells = [_spread(rows.get(provider)) for provider in ("ours", "ours-cached", "tuned", peer)]
        peak = f"{rows['ours']['peak_memory'] / 2**30:.1f}" if "ours" in rows else NOT_MEASURED
        lines.append([name, *cells, _times(rows, "ours", "tuned", peer), peak, _equal(rows)])
    head = (
        "ms a pair, GPU, bf16",
        "ours",
        "ours-cached",
        "tuned",
        "peer",
        "ours is faster than tuned, peer",
        "peak GiB of ours",
        "equal work",
    )
    return table(head, lines) + "\n\n" + sources.origin(*(f"step {name}" for name in names))


def counts(sources: Sources) -> str:
    known = sources.json("counts.json")["cases"]
    rows = [
        [
            name,
            f"{count['flops'] / 1e12:.1f}",
            f"{count['bytes'] / 1e9:.0f}",
            f"{count['launches']:,}",
            f"{count['saved'] / 1e9:.1f}",
            f"{2 * count['vae_flops'] / 1e12:.1f}",
        ]
        for name, count in known.items()
        if not CASES[name].mini
    ]
    head = ("case", "TFLOP", "GB read and written", "operators", "activations kept, GB", "VAE, TFLOP")
    return table(head, rows)


def lora_launches(sources: Sources) -> str:
    """Return a sentence on what running the reference without adapters saves."""
    count = sources.json("counts.json")["cases"]["sdxl-1024-lora"]
    saved = count["forward_launches"] - count["ref_launches"]
    return wrapped(
        f"With LoRA it takes {saved:,} operators of {count['launches'] + saved:,} off a step of SDXL (a forward pass of"
        f" the policy has {count['forward_launches']:,}, one of the reference {count['ref_launches']:,}: `python -m"
        " benchmarks.step.counts`)."
    )


def cached_cpu(sources: Sources) -> str:
    lines = []
    for name in ("mini-sdxl-1024-lora", "mini-sdxl-1024-full", "mini-sd15-512-lora", "mini-sd15-512-full"):
        for words, suffix in (("compiled", ""), ("eager", "-eager")):
            result = sources.json(f"cached-{name}{suffix}-cpu-2026-11-21.json")
            rows = {row["provider"]: row for row in result["rows"]}
            online, cached = rows["ours"], rows["ours-cached"]
            faster = online["ms_a_pair"]["median"] / cached["ms_a_pair"]["median"]
            spreads = (_spread(online), _spread(cached))
            lines.append([f"{name}, {words}", *spreads, f"{faster:.2f}x", f"{online['flops'] / cached['flops']:.2f}x"])
    return table(("ms a pair, two CPU cores, fp32", "online", "cached", "faster", "FLOPs"), lines)


# ---- the rest of a GPU's report ------------------------------------------------------------------------------------


def _tests(results: dict) -> str:
    unfinished = f", {len(results['unfinished'])} not finished" if results["unfinished"] else ""
    return f"{results['passed']} passed, {results['failed']} failed, {results['skipped']} skipped{unfinished}"


def _check(record: dict, words: Callable[[dict], str]) -> str:
    """Format the result of a stage, with its status unless that is ok."""
    if not record or record["status"] in ("missing", "not reached"):
        return NOT_MEASURED
    text = words(record["results"]) if record.get("results") else "no result"
    return text if record["status"] == "ok" else f"{text} ({record['status']})"


def _sanitized(results: dict) -> str:
    errors = "no summary" if results["errors"] is None else f"{results['errors']} errors"
    return f"{errors}; {_tests(results['tests'])}" if results["tests"] else errors


def gpu_checks(sources: Sources) -> str:
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    rows = [
        ["tests that need a GPU", _check(sources.stage("tests"), _tests)],
        ["tests of the Triton kernels", _check(sources.stage("triton tests"), _tests)],
        *([f"compute-sanitizer {tool}", _check(sources.stage(f"sanitizer {tool}"), _sanitized)] for tool in tools),
    ]
    return table(("check on a GPU", "result"), rows) + "\n\n" + sources.origin("tests")


def gpu_ceilings(sources: Sources) -> str:
    names = {
        "fp32_tflops": "TFLOP/s, fp32",
        "fp16_tflops": "fp16",
        "bf16_tflops": "bf16",
        "copy_gb_per_s": "copy, GB/s",
    }
    results = sources.results("ceilings")
    digits = {name: ".0f" if results.get(name, 0) >= 100 else ".3g" for name in names}
    cells = [format(results[name], digits[name]) if name in results else NOT_MEASURED for name in names]
    return table(("what the GPU reaches", *names.values()), [["", *cells]]) + "\n\n" + sources.origin("ceilings")


def gpu_margins(sources: Sources) -> str:
    rows = sources.results("margins").get("rows", [])
    line = [NOT_MEASURED] * 3
    if rows:
        worst = max(row["difference_over_rms"] for row in rows)
        line = [str(rows[-1]["step"]), f"{rows[-1]['margin_rms']:.3g}", f"{worst:.1e}"]
    head = (
        "steps of the built-in model",
        "rms of the margins at the last",
        "largest difference GPU to CPU, of the rms",
    )
    return table(head, [line]) + "\n\n" + sources.origin("margins")


def gpu_attention(sources: Sources) -> str:
    kernels = ("auto", "cudnn", "flash", "efficient", "math")
    rows = sources.results("attention").get("rows", [])
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{row['case']}, {row['dtype']}"
        times.setdefault(name, {})[row["kernel"]] = row["forward_ms"] + row["backward_ms"]
    lines = []
    for name, found in times.items():
        best = min(found.values())
        cells = (f"{found[kernel]:.3f}" if kernel in found else "cannot" for kernel in kernels)
        fastest = [kernel for kernel in kernels if found.get(kernel) == best]
        lines.append([name, *cells, fastest[0]])
    head = ("ms, forward and backward of a pair", *kernels, "fastest")
    lines = lines or [["all shapes", *[NOT_MEASURED] * (len(kernels) + 1)]]
    return table(head, lines) + "\n\n" + sources.origin("attention")


def gpu_variants(sources: Sources) -> str:
    names = [f"variants {model}-{tuning}" for model in ("sdxl", "sd15") for tuning in ("lora", "full")]
    lines = []
    for name in names:
        result = sources.results(name)
        for row in result.get("rows", []):
            lines.append(
                [
                    f"{name.removeprefix('variants ')}, {result['dtype']}: {row['variant']}",
                    f"{row['step_ms']:.1f}",
                    f"{row['reference_ms']:.1f}",
                    f"{row['with_both_ms']:.1f}",
                    f"{row['kept_mb']:.0f}",
                    f"{row['compile_s']:.0f}",
                ]
            )
    head = ("GPU, two images", "step ms", "reference", "with both", "kept MB", "compile s")
    return table(head, lines or [["all", *[NOT_MEASURED] * 5]]) + "\n\n" + sources.origin(*names)


TABLES: dict[str, Callable[[Sources], str]] = {
    "kernels-cpu": kernels_cpu,
    "kernels-gpu": kernels_gpu,
    "step-cpu": step_cpu,
    "step-gpu": step_gpu,
    "counts": counts,
    "lora-launches": lora_launches,
    "cached-cpu": cached_cpu,
    "gpu-checks": gpu_checks,
    "gpu-ceilings": gpu_ceilings,
    "gpu-margins": gpu_margins,
    "gpu-attention": gpu_attention,
    "gpu-variants": gpu_variants,
}
