"""What can be said of the CUDA kernels without a GPU: their registers, memory accesses and how they are built."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = ("80", "90")
# kernel: whether it reads and whether it writes arrays of numbers in 16 bytes; the others touch a few numbers a pair
KERNELS = {
    "noise_planes": (True, True),
    "noise_pixels": (True, True),
    "noise_numbers": (False, False),
    "sum_images": (True, False),
    "finish_errors": (False, False),
    "errors_grad": (True, True),
    "finish_loss": (False, False),
    "loss_grad": (True, True),
}


def builder():
    """setup.py as a module, for its flags."""
    spec = importlib.util.spec_from_file_location("dpo_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> str | None:
    """One of CUDA's binary tools: on the PATH or in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = [Path(place) / "backends/nvidia/bin" for place in (triton.submodule_search_locations if triton else ())]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def kernel_name(mangled: str) -> str:
    return next(name for name in KERNELS if re.search(rf"\d{name}E", mangled))


@pytest.mark.slow
def test_kernels_do_not_spill_and_use_128_bit_accesses(tmp_path):
    build = builder()
    nvcc, cuobjdump = build.find_nvcc(), tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("nvcc and cuobjdump are needed: " + ("no nvcc" if nvcc is None else "no cuobjdump"))

    def compile(job):
        source, arch = job
        made = tmp_path / f"{source.stem}.{arch}.cubin"
        flags = [*build.CUDA_FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", str(ROOT / source), "-o", str(made)]
        done = subprocess.run([nvcc, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sass = subprocess.run([cuobjdump, "-sass", str(made)], capture_output=True, text=True, check=True).stdout
        return arch, done.stderr, sass

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(compile, [(source, arch) for source in cuda_sources(build) for arch in ARCHS]))

    rows = {}
    for arch, report, sass in found:
        for section in report.split("Function properties for ")[1:]:
            numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
            *memory, registers = map(int, re.search(numbers, section, re.S).groups())
            rows[kernel_name(section.split()[0]), arch] = [registers, sum(memory)]
        for section in sass.split("Function : ")[1:]:
            count = lambda pattern, text=section: len(re.findall(pattern, text))
            row = rows[kernel_name(section.split()[0]), arch]
            row += [count(r"\b(?:LDL|STL)\b"), count(r"\bLDG\.E\.128"), count(r"\bSTG\.E\.128")]
            assert not count(r"\b(?:ATOMG?|RED)\b"), "an atomic operation: the order of its additions is not fixed"

    print(f"\n{'kernel':<16} sm  registers  stack+spill  local  LDG.128  STG.128")
    for (name, arch), row in sorted(rows.items()):
        print(f"{name:<16} {arch}  {row[0]:>9}  {row[1]:>11}  {row[2]:>5}  {row[3]:>7}  {row[4]:>7}")
    assert set(rows) == {(name, arch) for name in KERNELS for arch in ARCHS}
    for (name, arch), (registers, memory, local, loads, stores) in rows.items():
        assert registers <= 128 and memory == 0 and local == 0, (name, arch)  # 128: two blocks of 256 threads
        assert (loads > 0, stores > 0) == KERNELS[name], (name, arch)


# instructions that approximate, flush subnormal numbers or round a * b + c once, and why they may
ALLOWED = {
    "fma.rn.f64": "in the library's exp and log1p of float64, in the reported loss",
    "rcp.approx.ftz.f64": "where the library's division in log1p begins; what follows makes it exact to one unit",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["noise_pair", "pair_errors", "dpo_loss"])
def test_no_float32_is_computed_approximately(source, tmp_path):
    """Noise, gradients and margins have a CPU's bits: only the loss may, and in float64."""
    build = builder()
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is needed: no nvcc")
    made = tmp_path / "kernels.ptx"
    flags = [*build.CUDA_FLAGS, "-arch=compute_90", "-ptx", str(ROOT / build.CSRC / "cuda" / f"{source}.cu")]
    done = subprocess.run([nvcc, *flags, "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opcodes = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)", made.read_text(), re.MULTILINE))
    inexact = {o for o in opcodes if re.search(r"\.(approx|full|ftz)\b|^fma|^mad\.\w+\.f", o)}
    assert inexact == (set(ALLOWED) if source == "dpo_loss" else set())
    arithmetic = {o for o in opcodes if re.match(r"(add|sub|mul|div|sqrt|rcp)\..*f\d\d$", o)}
    assert arithmetic and all(".rn." in o for o in arithmetic - set(ALLOWED)), arithmetic


def cuda_sources(build) -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / build.CSRC).glob("cuda/*.cu"))]


# ---- what an install does where something is missing -----------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what setup.py reads, so that no installed extension is touched."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "dpo_fast").mkdir()
    (tmp_path / "dpo_fast" / "__init__.py").touch()
    return tmp_path


def install(sources: Path, **variables: str) -> tuple[int, str, list[Path]]:
    """Builds in place; the exit status, all that was said, and the extensions there are."""
    pytest.importorskip("pybind11")
    env = {name: value for name, value in os.environ.items() if not name.startswith("DPO_FAST_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env={**env, "CUDA_HOME": str(sources / "no_cuda"), **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, list(sources.glob("dpo_fast/*.so"))


def test_a_broken_compiler_costs_the_extension_and_not_the_install(sources):
    (sources / "dpo_fast" / "_native.cpython-1-x.so").touch()  # of an earlier build, that would be imported
    status, said, made = install(sources, CXX="no-such-compiler")
    assert status == 0 and "no-such-compiler cannot run" in said and not made
    assert install(sources, CXX="no-such-compiler", DPO_FAST_BUILD="cpu")[0] != 0


def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error(sources):
    status, said, made = install(sources, DPO_FAST_BUILD="cuda")
    assert status != 0 and "DPO_FAST_BUILD=cuda needs nvcc" in said and not made
    status, said, _ = install(sources, DPO_FAST_BUILD="gpu")
    assert status != 0 and "'gpu' is unknown; choose auto, cpu, cuda or none" in said
    status, _, made = install(sources, DPO_FAST_BUILD="none")
    assert status == 0 and not made


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_only_what_has_changed_is_compiled_again(sources):
    """The second build touches nothing, one after a change its file; an nvcc that cannot compile leaves C++."""
    nvcc = sources / "no_cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    nvcc.chmod(0o755)
    status, said, made = install(sources)
    assert status == 0 and "building without CUDA kernels" in said and len(made) == 1
    objects = {path: path.stat().st_mtime_ns for path in sources.rglob("*.o")}
    assert len(objects) == 5
    install(sources)
    assert {path: path.stat().st_mtime_ns for path in objects} == objects
    (sources / "csrc" / "cpu" / "dpo_loss.cpp").touch()
    install(sources)
    changed = [path.name for path in objects if path.stat().st_mtime_ns != objects[path]]
    assert changed == ["dpo_loss.cpp.o"]
