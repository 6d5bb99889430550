"""Builds of dpo_fast._native whose CUDA half runs on a CPU.

python -m tests.cuda_on_cpu.build [source|ptx] prints the path of a build.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

from tests.cuda_on_cpu import ptx
from tests.helpers.setup_file import load_setup

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / "build" / "cuda_on_cpu"  # objects and extensions, named by what they are made of
KEEP = 600  # the newest
SANITIZERS = ("address", "undefined")
LAUNCH = re.compile(r"\b(\w+)<<<(.*?)>>>\(", re.S)
ARCH = "90"


class Refused(RuntimeError):
    """A compiler refused; the message has what it said."""


@dataclass(frozen=True)
class Variant:
    """What is built."""

    route: str = "source"  # or "ptx": from the instructions that nvcc makes
    sanitized: bool = False  # AddressSanitizer and UBSan in the CUDA half
    edits: tuple[tuple[str, str, str], ...] = ()  # (file below csrc, text, other text): each text stands there once
    nvcc_flags: tuple[str, ...] = ()  # beside those of setup.py


@functools.cache
def setup() -> ModuleType:
    return load_setup()


def reason_against(route: str) -> str:
    """Why a route cannot be built here, in a line; "" where it can."""
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()})"
    if sys.platform != "linux":
        return f"written for Linux, not {sys.platform}"
    return "no nvcc" if route == "ptx" and setup().find_nvcc() is None else ""


def compiler() -> str:
    return os.environ.get("CXX") or "c++"


def sources(variant: Variant) -> dict[str, str]:
    """The text of every file below csrc, with the edits."""
    texts = {
        str(path.relative_to(ROOT / "csrc")): path.read_text()
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".h", ".cuh", ".cpp", ".cu") and path.name != "absent.cpp"
    }
    for name, old, new in variant.edits:
        if texts[name].count(old) != 1:
            raise ValueError(f"{old!r} stands {texts[name].count(old)} times in csrc/{name}, not once")
        texts[name] = texts[name].replace(old, new)
    return texts


def build(variant: Variant) -> Path:
    """Compile what is not kept from an earlier build; return the extension.

    Raises:
        Refused: A compiler refused.
        ptx.Unknown: nvcc made an instruction that the translator does not know.
    """
    texts = sources(variant)
    flags = [flag for flag in setup().CPP_FLAGS if flag not in ("-O3", "-O0", "-g")]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    machine = {name: (HERE / name).read_text() for name in ("machine.h", "machine.cpp")}
    machine |= {f"include/{path.name}": path.read_text() for path in (HERE / "include").glob("*.h")}
    gpu = [*flags, "-O1", "-g1", "-Iinclude", "-ftrivial-auto-var-init=pattern"]
    if variant.sanitized:
        gpu += [f"-fsanitize={','.join(SANITIZERS)}", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"]
        gpu += ["-fno-omit-frame-pointer"]
    device = [*gpu, "-x", "c++", "-D__CUDACC__", f"-D__CUDA_ARCH__={ARCH}0"]
    if variant.route == "ptx":
        device.append("-DCUDA_ON_CPU_PTX")

    jobs = {}  # source: (the text of all files it may include, flags)
    host = {name: text for name, text in texts.items() if not name.startswith("cuda/")}
    for name in host:
        if name.endswith(".cpp"):
            jobs[name] = host, [*flags, "-O2", *(python if name == "bindings.cpp" else [])]
    rewritten = {
        name: LAUNCH.sub(r'cuda_on_cpu::launching(\1, "\1", \2)(', text) if name.endswith(".cu") else text
        for name, text in texts.items()
        if not name.endswith(".cpp")
    }
    for name in rewritten:
        if name.endswith(".cu"):
            jobs[name] = rewritten | machine, device
    jobs["machine.cpp"] = machine, gpu
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [pool.submit(compiled, name, *job) for name, job in jobs.items()]
        if variant.route == "ptx":
            runtime = machine | {"ptx_runtime.h": (HERE / "ptx_runtime.h").read_text()}
            runtime["kernels.cpp"] = ptx.to_cpp(*ptx_of(texts, variant.nvcc_flags))
            quiet = ["-Wno-unused-label", "-Wno-unused-but-set-variable"]
            plain = [flag for flag in gpu if "sanitize" not in flag]  # its memory is read and written in machine.cpp
            objects.append(pool.submit(compiled, "kernels.cpp", runtime, [*plain, *quiet]))
        made = [job.result() for job in objects]
    sanitizers = [flag for flag in gpu if flag.startswith("-fsanitize=")]
    extension = linked(made, ["-shared", "-fopenmp", *sanitizers], "_native.so")
    prune()
    return extension


def build_ptx(text: str) -> Path:
    """A library with the kernels of a text of PTX and `cuda_on_cpu_launch` (launch.cpp).

    Raises:
        ptx.Unknown: The translator does not know an instruction.
    """
    machine = {path.name: path.read_text() for path in HERE.glob("*.h")}
    machine |= {path.name: path.read_text() for path in HERE.glob("*.cpp")}
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-O1", "-w"]
    kernels = {name: machine[name] for name in ("machine.h", "ptx_runtime.h")} | {"kernels.cpp": ptx.to_cpp(text)}
    made = [compiled(name, machine, flags) for name in ("machine.cpp", "launch.cpp")]
    made.append(compiled("kernels.cpp", kernels, flags))
    return linked(made, ["-shared"], "kernels.so")


def linked(objects: list[Path], flags: list[str], name: str) -> Path:
    made = kept("\0".join([*map(str, objects), *flags]), name)
    with FileLock(f"{made}.lock"):
        if not made.is_file():
            run([compiler(), *flags, *map(str, objects), "-o", f"{made}.new"])
            os.replace(f"{made}.new", made)
    os.utime(made)
    return made


def ptx_of(texts: dict[str, str], flags: tuple[str, ...] = ()) -> list[str]:
    """What nvcc makes of each .cu file."""
    return [ptx_text(name, tuple(texts.items()), flags) for name in texts if name.endswith(".cu")]


def ptx_text(name: str, texts: tuple[tuple[str, str], ...], flags: tuple[str, ...]) -> str:
    nvcc = setup().find_nvcc()
    headers, _ = setup().toolkit_flags(nvcc)
    command = [nvcc, "-ccbin", compiler(), *headers, *setup().CUDA_FLAGS, *flags, "-ptx", f"-arch=compute_{ARCH}"]
    made = kept("\0".join([name, str(texts), *command]), "kernels.ptx")
    with FileLock(f"{made}.lock"):
        if not made.is_file():
            folder = written(made, dict(texts))
            run([*command, name, "-o", str(made.with_suffix(".new"))], folder)
            os.replace(made.with_suffix(".new"), made)
            shutil.rmtree(folder)
    return made.read_text()


def compiled(name: str, texts: dict[str, str], flags: list[str]) -> Path:
    """The object of one source, compiled unless it is kept."""
    command = [compiler(), *flags, "-c", name]
    identity = [word for word in command if not word.startswith(f"-I{os.sep}")]
    made = kept("\0".join([str(sorted(texts.items())), *identity, pybind11.__version__]), f"{Path(name).name}.o")
    with FileLock(f"{made}.lock"):
        if not made.is_file():
            folder = written(made, texts)
            run([*command, "-o", f"{made}.new"], folder)
            os.replace(f"{made}.new", made)
            shutil.rmtree(folder)
    os.utime(made)
    return made


def kept(identity: str, name: str) -> Path:
    """Where what is made of this is kept."""
    KEPT.mkdir(parents=True, exist_ok=True)
    return KEPT / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}-{name}"


def written(made: Path, texts: dict[str, str]) -> Path:
    """A folder of the texts, to compile in."""
    folder = made.with_suffix(".sources")
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(command: list[str], folder: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's, of ours
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Refused(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-6000:]}")


def prune() -> None:
    """Delete all but the newest of what is kept."""
    files = sorted((path for path in KEPT.iterdir() if path.suffix in (".o", ".so", ".ptx")), key=_used)
    for path in files[:-KEEP]:
        path.unlink(missing_ok=True)
        Path(f"{path}.lock").unlink(missing_ok=True)


def _used(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


if __name__ == "__main__":
    print(build(Variant(*sys.argv[1:2])))
