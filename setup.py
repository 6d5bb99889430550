"""Builds the extension dpo_fast._native; everything else about the package is in pyproject.toml.

C++ always, CUDA too where nvcc is found (CUDA_HOME, else the PATH). Needs neither PyTorch nor its headers.

    DPO_FAST_BUILD       auto (default): what fails to compile is left out, and said; cpu; cuda: both; none
    DPO_FAST_CUDA_ARCHS  compute capabilities, as 80,90; default: the visible GPU's, else of ARCHS what nvcc knows
    DPO_FAST_DEBUG       1: no optimisation, symbols, line numbers in GPU code

Objects stay under build/ and are compiled again when a source, a header or the command has changed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
HEADERS = sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cuh"))
CPP_SOURCES = [CSRC / "bindings.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
CUDA_SOURCES = sorted(CSRC.glob("cuda/*.cu"))
NO_CUDA = CSRC / "cuda" / "absent.cpp"
ARCHS = ("80", "86", "89", "90", "100", "120")

MODE = os.environ.get("DPO_FAST_BUILD") or "auto"
OBJECTS = Path("build") / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"  # pip's own is temporary
DEBUG = os.environ.get("DPO_FAST_DEBUG") == "1"
# no contraction of a * b + c: the same bits on every CPU and GPU (csrc/arithmetic.h)
CPP_FLAGS = [
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *(("-O0", "-g") if DEBUG else ("-O3",)),
]
CUDA_FLAGS = [
    *("-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
    *(("-O0", "-g", "-lineinfo") if DEBUG else ("-O3",)),
]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def words_of(*command: str) -> list[str]:
    """The words that a command prints; none where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def cuda_archs(nvcc: str) -> list[str]:
    if asked := os.environ.get("DPO_FAST_CUDA_ARCHS"):
        return asked.replace(".", "").replace(",", " ").split()
    known = {word.removeprefix("compute_") for word in words_of(nvcc, "--list-gpu-arch")}
    visible = words_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    usable = known.intersection(word.replace(".", "") for word in visible)
    archs = sorted(usable, key=int) or [arch for arch in ARCHS if arch in known]
    if not archs:
        raise CompileError(f"{nvcc} knows none of the architectures {', '.join(ARCHS)}; set DPO_FAST_CUDA_ARCHS")
    return archs


def arch_flags(archs: list[str]) -> list[str]:
    """Code for each architecture, and PTX of the last for those to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot run: {error}") from error
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


class BuildNative(build_ext):
    """Compiles and links by commands of its own: setuptools knows neither nvcc nor parallel or incremental builds."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            for stale in Path("dpo_fast").glob("_native*.so"):  # or an older build would be imported if this one fails
                stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if MODE == "cuda" and nvcc is None:
            raise CompileError("DPO_FAST_BUILD=cuda needs nvcc: set CUDA_HOME or put it on the PATH")
        if nvcc is not None and MODE in ("auto", "cuda"):
            try:
                return self.build(ext, nvcc)
            except CompileError as error:
                if MODE == "cuda":
                    raise
                print(f"dpo_fast: building without CUDA kernels, which do not compile here: {error}", file=sys.stderr)
        self.build(ext, None)

    def build(self, ext: Extension, nvcc: str | None) -> None:
        import pybind11

        version = f"-DPYBIND11_USED={pybind11.__version__}"  # its folder is another in each isolated build
        compiler = os.environ.get("CXX") or "c++"
        includes = [version, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        commands = {source: [compiler, *CPP_FLAGS, *includes] for source in CPP_SOURCES}
        if nvcc is None:
            commands[NO_CUDA] = [compiler, *CPP_FLAGS]
            link = [compiler, "-shared", "-fopenmp"]
        else:
            host = ["-ccbin", compiler]
            flags = arch_flags(cuda_archs(nvcc))
            commands |= {source: [nvcc, *host, *CUDA_FLAGS, *flags] for source in CUDA_SOURCES}
            link = [nvcc, *host, "-shared", "-cudart=static", "-Xcompiler=-fopenmp"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # CUDA first: it takes longest
            objects = list(pool.map(self.compile, *zip(*reversed(commands.items()), strict=True)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*link, *map(str, objects), "-o", str(target)])

    def compile(self, source: Path, command: list[str]) -> Path:
        """The object of a source, compiled unless it is newer than everything it comes from."""
        made = OBJECTS / source.with_suffix(source.suffix + ".o")
        command = [*command, "-c", str(source), "-o", str(made)]
        identity = shlex.join(word for word in command if not word.startswith("-I"))
        made.parent.mkdir(parents=True, exist_ok=True)
        record = made.with_suffix(".command")
        newest = max(path.stat().st_mtime for path in (source, *HEADERS))
        fresh = made.is_file() and made.stat().st_mtime > newest
        if not (fresh and record.is_file() and record.read_text() == identity):
            record.unlink(missing_ok=True)
            run(command)
            record.write_text(identity)
        return made


if __name__ == "__main__":
    if MODE not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"DPO_FAST_BUILD {MODE!r} is unknown; choose auto, cpu, cuda or none")
    native = Extension(
        "dpo_fast._native",
        sources=[str(path) for path in (*CPP_SOURCES, NO_CUDA)],
        depends=[str(path) for path in (*HEADERS, *CUDA_SOURCES)],
        language="c++",
        optional=MODE == "auto",  # setuptools then says why it failed, and goes on
    )
    setup(ext_modules=[] if MODE == "none" else [native], cmdclass={"build_ext": BuildNative})
