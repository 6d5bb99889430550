"""The stages of a report, most valuable first; on a CPU the same stages run on small stand-ins."""

import os
import shutil
import sys
from pathlib import Path

from benchmarks.gpu import reading
from benchmarks.gpu.running import Stage

PYTHON = sys.executable
CASES = ("sdxl-1024-lora", "sdxl-1024-full", "turbo-512-lora", "turbo-512-full", "sd15-512-lora", "sd15-512-full")
SANITIZERS = dict(memcheck=0.25, racecheck=0.15, synccheck=0.15, initcheck=0.15)  # tool -> share of the time left
SHAPES = "dpo_fast/shapes"
MARGIN_STEPS = {"cuda": 200, "cpu": 20}


def stages(device: str, work: Path, architecture: str | None) -> list[Stage]:
    """Return all stages in order. device: cuda, or cpu for the stand-ins; architecture: the GPU's, such as 90."""
    first, *later = CASES
    memcheck, *checks = SANITIZERS
    return [
        _build(device, architecture),
        _environment(),
        _tests(device),
        _proof(),
        _kernels(device),
        _sanitizer(device, memcheck),
        _ceilings(device),
        _step(device, first),
        *(_sanitizer(device, tool) for tool in checks),
        *(_step(device, case) for case in later),
        _attention(device),
        *(_variants(device, model, tuning) for model in ("sdxl", "sd15") for tuning in ("lora", "full")),
        _margins(device, work),
        _triton_tests(device),
    ]


def _build(device: str, architecture: str | None) -> Stage:
    environment = {"DPO_FAST_BUILD": device}
    if device == "cuda" and architecture:  # only for this GPU: the others take minutes to compile
        environment["DPO_FAST_CUDA_ARCHS"] = architecture
    command = (PYTHON, "setup.py", "build_ext", "--inplace")
    return Stage("build", (command,), 0.3, reading.nothing, environment)


def _environment() -> Stage:
    return Stage("environment", ((PYTHON, "-m", "dpo_fast.env"),), 0.2, reading.named_lines)


def _proof() -> Stage:
    return Stage("proof", ((PYTHON, "-m", "dpo_fast.env", "--prove", "--json", "{file}"),), 0.2, reading.json_file)


def _pytest(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-p", "benchmarks.gpu.outcomes", "--outcomes", "{file}", "-q", *words)


def _tests(device: str) -> Stage:
    what = ("tests", "-m", "gpu and not exhaustive") if device == "cuda" else ("tests/kernels/test_dispatch.py",)
    return Stage("tests", (_pytest(*what),), 0.35, reading.tests)


def _triton_tests(device: str) -> Stage:
    what = ("tests/kernels/test_triton.py",) + (() if device == "cuda" else ("-k", "refuses"))
    return Stage("triton tests", (_pytest(*what),), 1.0, reading.tests)


def _kernels(device: str) -> Stage:
    small = ("--pairs", "1", "8") if device == "cuda" else ("--pairs", "8", "--cases", "sd15-512", "--no_compile")
    command = (PYTHON, "benchmarks/kernels.py", "--device", device, "--json", "{file}", *small)
    return Stage("kernels", (command,), 0.3, reading.json_file)


def _sanitizer(device: str, tool: str) -> Stage:
    program = _compute_sanitizer()
    # the tests of large tensors are left out: under the sanitizer they take hours
    chosen = ("-k", "native and not large")
    what = (
        ("tests/kernels", "-m", "gpu and not exhaustive")
        if device == "cuda"
        else ("tests/kernels/test_pair_errors.py",)
    )
    options = ("--tool", tool, "--target-processes", "all", "--error-exitcode", "1")
    return Stage(
        f"sanitizer {tool}",
        ((program or "compute-sanitizer", *options, *_pytest("-n", "0", *what, *chosen)),),
        SANITIZERS[tool],
        reading.sanitizer,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # one allocation per tensor, so that its bounds are checked
        None if program else "compute-sanitizer is not installed: memory accesses were not checked",
    )


def _compute_sanitizer() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which("compute-sanitizer", path=path)


def _ceilings(device: str) -> Stage:
    small = () if device == "cuda" else ("--dtypes", "fp32")  # in half precision a CPU takes minutes
    command = (PYTHON, "-m", "benchmarks.step.ceiling", "--json", "{file}", *small)
    return Stage("ceilings", (command,), 0.1, reading.json_file)


def _step(device: str, case: str) -> Stage:
    name, small = case, ()
    if device == "cpu":
        providers = () if case == "sd15-512-lora" else ("--providers", "ours")  # all providers in the quickest case
        name, small = f"mini-{case}", ("--steps", "1", "--eager", *providers)
    words = ("--device", device, "--case", name, "--profile", "--json", "{file}", *small)
    return Stage(f"step {name}", ((PYTHON, "benchmarks/step_time.py", *words),), 0.6, reading.json_file)


def _margins(device: str, work: Path) -> Stage:
    """Train the built-in model on the GPU and on the CPU, and compare the margins of the two runs."""

    def train(place: str) -> tuple[str, ...]:
        flags = {
            "pretrained_model_name_or_path": f"{SHAPES}/pipeline",
            "dataset_name": f"{SHAPES}/pairs.parquet",
            "label_column": "label_faithfulness",
            "resolution": 16,
            "tuning": "full",
            "beta_dpo": 2000,
            "learning_rate": 1e-5,
            "train_batch_size": 24,
            "max_train_steps": MARGIN_STEPS[device],
            "seed": 0,
            "log_every": 10,
            "output_dir": work / f"margins-{place}",
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        hidden = ("env", "CUDA_VISIBLE_DEVICES=") if place == "cpu" else ()
        return (*hidden, PYTHON, "-m", "dpo_fast.train", *words, "--overwrite")

    compare = (
        PYTHON,
        "benchmarks/margins.py",
        str(work / "margins-cpu"),
        str(work / "margins-gpu"),
        "--json",
        "{file}",
    )
    return Stage("margins", (train("gpu"), train("cpu"), compare), 0.8, reading.json_file)


def _attention(device: str) -> Stage:
    small = ("--dtypes", "bf16") if device == "cuda" else ("--dtypes", "fp32", "--cases", "sd15-512 16x16")
    command = (PYTHON, "benchmarks/attention.py", "--device", device, "--json", "{file}", *small)
    return Stage("attention", (command,), 0.5, reading.json_file)


def _variants(device: str, model: str, tuning: str) -> Stage:
    size = ("320", "64", "bf16") if device == "cuda" else ("32", "8", "fp32")
    sizes = [word for flag, value in zip(("--width", "--size", "--dtype"), size, strict=True) for word in (flag, value)]
    small = () if device == "cuda" else ("--no_compile",)
    words = ("--device", device, "--model", model, "--tuning", tuning, *sizes, "--json", "{file}", *small)
    return Stage(f"variants {model}-{tuning}", ((PYTHON, "benchmarks/variants.py", *words),), 0.5, reading.json_file)
