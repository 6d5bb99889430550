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

from tests.helpers.setup_file import load_setup

ROOT = Path(__file__).parents[2]
ARCHS = ("80", "90")
# kernel: whether it reads and whether it writes arrays of numbers in 16 bytes; the others touch a few numbers a pair
KERNELS = {
    "noise_planes": (True, True),
    "noise_pixels": (True, True),
    "noise_elements": (False, False),
    "sum_images": (True, False),
    "finish_errors": (False, False),
    "errors_grad": (True, True),
    "finish_loss": (False, False),
    "loss_grad": (True, True),
}


def tool(name: str) -> str | None:
    """One of CUDA's binary tools: on the PATH or in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = [Path(place) / "backends/nvidia/bin" for place in (triton.submodule_search_locations if triton else ())]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def kernel_name(mangled: str) -> str:
    found = [name for name in KERNELS if re.search(rf"\d{name}E", mangled)]
    assert found, f"KERNELS lacks {mangled}"
    return found[0]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_kernels_do_not_spill_and_use_128_bit_accesses(tmp_path):
    build = load_setup()
    nvcc, cuobjdump = build.find_nvcc(), tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("nvcc and cuobjdump are needed: " + ("no nvcc" if nvcc is None else "no cuobjdump"))

    def compile(job):
        source, arch = job
        made = tmp_path / f"{source.stem}.{arch}.cubin"
        flags = [
            *build.CUDA_FLAGS,
            *build.toolkit_flags(nvcc)[0],
            f"-arch=sm_{arch}",
            "-cubin",
            "-Xptxas=-v",
            str(ROOT / source),
            "-o",
            str(made),
        ]
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
@pytest.mark.parametrize("source", sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_no_float32_is_computed_approximately(source, tmp_path):
    """Noise, gradients and margins have a CPU's bits: only the loss may, and in float64."""
    build = load_setup()
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
    """A copy of what setup.py reads, so that no installed extension is touched; it sees no CUDA of this machine."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "dpo_fast").mkdir()
    (tmp_path / "dpo_fast" / "__init__.py").touch()
    text, main = (ROOT / "setup.py").read_text(), 'if __name__ == "__main__":'
    assert text.count(main) == 1
    hidden = f"SYSTEM, pip_folders = Path('system'), lambda: sorted(Path('pip').glob('nvidia/*/bin'))\n{main}"
    (tmp_path / "setup.py").write_text(text.replace(main, hidden))
    (tmp_path / "tools").mkdir()
    for name in ("c++", "as", "ld", "sh"):
        if there := shutil.which(name):
            (tmp_path / "tools" / name).symlink_to(there)
    return tmp_path


def install(sources: Path, **variables: str) -> tuple[int, str, list[Path]]:
    """Builds in place; the exit status, all that was said, and the extensions there are."""
    pytest.importorskip("pybind11")
    hidden = ("DPO_FAST_", "CUDA_HOME", "CUDA_PATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env={**env, "PATH": str(sources / "tools"), **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, list(sources.glob("dpo_fast/*.so"))


def fake(tool: Path, body: str = "") -> Path:
    """A compiler that makes empty files, and notes its arguments in `tool`.log: a line each, a call ends with an empty
    one. `body`: what it does first."""
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text(
        f"""#!/bin/sh
{body}
for word in "$@" ""; do echo "$word" >> "{tool}.log"; done
for word in "$@"; do [ "$last" = -o ] && : > "$word"; last="$word"; done
exit 0
"""
    )
    tool.chmod(0o755)
    return tool


def calls(tool: Path) -> list[list[str]]:
    return [call.splitlines() for call in Path(f"{tool}.log").read_text().split("\n\n")[:-1]]


def call_for(tool: Path, source: str) -> list[str]:
    """The arguments with which a source was compiled."""
    (call,) = [call for call in calls(tool) if any(word.endswith(source) for word in call)]
    return call


LIST_ARCHS = 'if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_86; echo compute_90; exit; fi'


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, on a machine whose every place for CUDA is an empty folder of tmp_path."""
    module = load_setup()
    for name in ("CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "SYSTEM", tmp_path / "usr_local")
    monkeypatch.setattr(module.sys, "prefix", str(tmp_path / "env"))
    monkeypatch.setattr(module.sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setattr(module.site, "getuserbase", lambda: str(tmp_path / "user"))
    return module


PIP = "lib/python3.11/site-packages/nvidia/cu13/bin/nvcc"


def test_nvcc_is_found_in_every_place_and_the_first_wins(build, tmp_path, monkeypatch, capfd):
    """From the last place to the first: each nvcc that is added is then the one that is taken."""
    assert build.find_nvcc() is None
    debian = PIP.replace("site-packages", "dist-packages")
    places = [
        *("usr_local/" + debian, "user/" + PIP, "active/" + PIP, "base/" + PIP, "conda/" + PIP, "venv/" + PIP),
        *("env/" + PIP, "env/" + PIP.replace("cu13", "cu14")),
        *("usr_local/cuda-12.9/bin/nvcc", "usr_local/cuda-12.10/bin/nvcc", "usr_local/cuda/bin/nvcc"),
        *("bin/nvcc", "path/bin/nvcc", "home/bin/nvcc"),
    ]
    (tmp_path / "active" / "bin").mkdir(parents=True)
    (tmp_path / "active" / "pyvenv.cfg").touch()  # of an environment that is on the PATH alone
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), str(tmp_path / "active" / "bin")]))
    for name, value in {"VIRTUAL_ENV": "venv", "CONDA_PREFIX": "conda"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    for place in places:
        nvcc = fake(tmp_path / place)
        monkeypatch.setenv("CUDA_PATH" if place.startswith("path") else "CUDA_HOME", str(nvcc.parents[1]))
        if not place.startswith(("path", "home")):
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "moved"))
        capfd.readouterr()
        assert build.find_nvcc() == str(nvcc)
        passed_over = f"CUDA_HOME ({tmp_path / 'moved'}) has no bin/nvcc; looking elsewhere"
        assert (passed_over in capfd.readouterr().err) == (not place.startswith("home")), place


def test_folders_of_packages_of_pip_are_named_to_nvcc(build, tmp_path):
    """In one folder, as of CUDA 13, with lib and no lib64; or each part in its own; a toolkit knows them itself."""
    packages = tmp_path / "site-packages" / "nvidia"
    one, split, toolkit = packages / "cu13", packages / "cuda_nvcc", tmp_path / "cuda"
    for root in (one, toolkit, packages / "cuda_runtime"):
        for file in ("include/cuda_runtime.h", "lib/libcudart_static.a"):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    for root in (one, split, toolkit):
        fake(root / "bin" / "nvcc")
    assert build.toolkit_flags(str(one / "bin" / "nvcc")) == ([f"-I{one}/include"], [f"-L{one}/lib"])
    shutil.rmtree(one)
    runtime = packages / "cuda_runtime"
    assert build.toolkit_flags(str(split / "bin" / "nvcc")) == ([f"-I{runtime}/include"], [f"-L{runtime}/lib"])
    assert build.toolkit_flags(str(toolkit / "bin" / "nvcc")) == ([], [])


def test_a_build_without_nvcc_says_where_it_looked_and_keeps_that(sources):
    compiler = fake(sources / "fake-c++")
    status, said, made = install(sources, CXX=str(compiler), CUDA_HOME="/nowhere")
    assert status == 0 and len(made) == 1
    (line,) = [line for line in said.splitlines() if "building without CUDA kernels" in line]
    reason = line.partition("building without CUDA kernels: ")[2]
    for place in ("no nvcc in CUDA_HOME (/nowhere), the PATH, system/cuda*, the packages of pip", "pip install nvidia"):
        assert place in reason
    assert "CUDA_HOME (/nowhere) has no bin/nvcc; looking elsewhere" in said
    assert f'-DDPO_FAST_LEFT_OUT="{reason}"' in call_for(compiler, "absent.cpp")
    assert not any("CUBINS" in word for word in call_for(compiler, "bindings.cpp"))


def test_a_build_with_packages_of_pip_knows_its_architectures(sources):
    """An isolated build with the wheels of the user's environment: their folders, and what the extension is told."""
    compiler = fake(sources / "fake-c++")
    nvcc = fake(sources / "pip/nvidia/cu13/bin/nvcc", LIST_ARCHS)
    (sources / "pip/nvidia/cu13/lib").mkdir()
    (sources / "pip/nvidia/cu13/lib/libcudart_static.a").touch()
    status, said, made = install(sources, CXX=str(compiler), DPO_FAST_BUILD="cuda")
    assert status == 0 and len(made) == 1 and "fake-c++" not in said, said
    assert "building CUDA kernels with pip/nvidia/cu13/bin/nvcc for sm_80, sm_86, sm_90" in said
    assert {'-DDPO_FAST_CUBINS="80,86,90"', '-DDPO_FAST_PTX="90"'} <= set(call_for(compiler, "bindings.cpp"))
    compiled = call_for(nvcc, "dpo_loss.cu")
    assert f"-I{sources}/pip/nvidia/cu13/include" in compiled
    assert "-gencode=arch=compute_90,code=compute_90" in compiled and "-gencode=arch=compute_86,code=sm_86" in compiled
    (link,) = [call for call in calls(nvcc) if "-shared" in call]
    assert f"-L{sources}/pip/nvidia/cu13/lib" in link and "-cudart=static" in link


@pytest.mark.parametrize(
    ("output", "first", "remedy"),
    [
        (
            ["nvcc warning : old", "x.cu(3): error: none", "1 error"],
            "x.cu(3): error: none",
            "DPO_FAST_BUILD=cuda shows",
        ),
        (["a.h:1: fatal error: nv/target: not there"], "nv/target: not there", "pip install nvidia-cuda-nvcc nvidia-"),
        ([], "exit status 3", "DPO_FAST_BUILD=cuda shows"),
    ],
)
def test_an_nvcc_that_fails_is_left_out_and_its_first_error_kept(sources, output, first, remedy):
    compiler = fake(sources / "fake-c++")
    said = [f"echo '{line}' >&2" for line in output]
    nvcc = fake(sources / "home/bin/nvcc", "\n".join([LIST_ARCHS, *said, "exit 3"]))
    status, log, made = install(sources, CXX=str(compiler), CUDA_HOME=str(nvcc.parents[1]))
    assert status == 0 and len(made) == 1
    (line,) = [line for line in log.splitlines() if "building without CUDA kernels" in line]
    assert f"{nvcc} failed: " in line and first in line and remedy in line
    (kept,) = [word for word in call_for(compiler, "absent.cpp") if word.startswith("-DDPO_FAST_LEFT_OUT=")]
    assert first in kept and remedy in kept


def test_architectures_that_are_asked_for_are_checked_and_ordered(build, monkeypatch):
    monkeypatch.setenv("DPO_FAST_CUDA_ARCHS", "12.0, 8.6 90a,8.0,86")
    archs = build.cuda_archs("no-nvcc")
    assert archs == ["80", "86", "90a", "120"]
    assert build.arch_flags(["80", "100", "90a"])[-1] == "-gencode=arch=compute_100,code=compute_100"
    assert build.arch_flags(["80", "90a"])[-1] == "-gencode=arch=compute_80,code=compute_80"
    assert build.arch_flags(["90a"])[-1] == "-gencode=arch=compute_90a,code=compute_90a"
    monkeypatch.setenv("DPO_FAST_CUDA_ARCHS", "8.0+PTX")
    with pytest.raises(build.CompileError, match=r"DPO_FAST_CUDA_ARCHS: '80\+PTX' is no compute capability; give e.g."):
        build.cuda_archs("no-nvcc")


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_extension_says_why_it_is_without_cuda(build, tmp_path, monkeypatch):
    """With what a shell or a string would take for its own."""
    monkeypatch.undo()  # the PATH
    reason = 'no nvcc in "C:\\new" or $HOME/*; it\'s not there'
    main = tmp_path / "main.cpp"
    main.write_text(
        '#include <cstdio>\n#include "ops.h"\nint main() { std::puts(dpo_fast::cuda::fault(0).c_str()); }\n'
    )
    define = build.literal("DPO_FAST_LEFT_OUT", reason)
    command = ["c++", "-std=c++17", define, f"-I{ROOT / 'csrc'}", main, ROOT / build.NO_CUDA, "-o", tmp_path / "main"]
    subprocess.run(command, check=True)
    assert subprocess.check_output([tmp_path / "main"], text=True) == f"built without CUDA: {reason}\n"


def test_every_kernel_is_loaded_before_a_graph_can_be_captured():
    """cuda::fault, which native.py calls before the first launch on a device, loads the kernels of every file."""
    texts = {path.stem: path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu")}
    fault = texts["pair_errors"].partition("std::string fault(int device)")[2]
    kernels = {}
    for name, text in texts.items():
        loaded = re.search(rf"void preload_{name}\(\) {{ preload\(([\w, ]+)\); }}", text)
        assert loaded and f"preload_{name}();" in fault, name
        kernels[name] = set(re.findall(r"__global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(", text))
        assert set(loaded[1].split(", ")) == kernels[name], name
    assert set().union(*kernels.values()) == set(KERNELS)


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
    fake(sources / "tools" / "nvcc", "echo broken >&2; exit 1")
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
