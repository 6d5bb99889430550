"""Build the extension dpo_fast._native; everything else about the package is in pyproject.toml.

C++ is always built, CUDA too where nvcc is found: in CUDA_HOME, CUDA_PATH, the PATH, /usr/local/cuda* or pip packages
(nvidia-cuda-nvcc and nvidia-cuda-cccl). Neither PyTorch nor its headers are needed. Where CUDA is left out, the build
says why in one line (shown by pip install -v), and the extension keeps that line for `python -m dpo_fast.env`.

    DPO_FAST_BUILD       auto (default): leave out and report what fails to compile; cpu; cuda: both; none
    DPO_FAST_CUDA_ARCHS  compute capabilities, such as 80,90; default: the visible GPU's, else those of ARCHS that
                         nvcc knows
    DPO_FAST_DEBUG       1: no optimisation, with symbols and line numbers in GPU code

Objects stay under build/ and are recompiled when a source, a header or the command has changed.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
HEADERS = sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cuh"))
BINDINGS = CSRC / "bindings.cpp"
CPP_SOURCES = [BINDINGS, *sorted(CSRC.glob("cpu/*.cpp"))]
CUDA_SOURCES = sorted(CSRC.glob("cuda/*.cu"))
NO_CUDA = CSRC / "cuda" / "absent.cpp"
ARCHS = ("80", "86", "89", "90", "100", "120")
SYSTEM = Path("/usr/local")  # where CUDA's own installers put toolkits
PACKAGES = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"  # pip adds their dependencies

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


def say(line: str) -> None:
    print(f"dpo_fast: {line}", file=sys.stderr)


def numbers_in(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def pip_folders() -> list[Path]:
    """Return nvidia/*/bin of all environments in reach; nvidia-cuda-nvcc of CUDA 13 is in nvidia/cu13.

    An isolated build cannot import the user's packages but can find their files: pip runs it with the prefix of the
    user's environment, uv and `build` in an environment of their own, with the user's on the PATH if it is active.
    """
    active = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    prefixes = [
        *(sys.prefix, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.base_prefix),
        *(str(prefix) for prefix in active if (prefix / "pyvenv.cfg").is_file()),
        *(site.getuserbase(), str(SYSTEM)),
    ]
    folders = []
    for prefix in dict.fromkeys(filter(None, prefixes)):
        toolkits = Path(prefix).glob("lib/python*/*-packages/nvidia/*")
        folders += [toolkit / "bin" for toolkit in sorted(toolkits, key=numbers_in, reverse=True)]
    return folders


def nvcc_places() -> dict[str, list[Path]]:
    """Return the locations searched for nvcc, in order, each with its folders."""
    named = {
        f"{name} ({home})": [Path(home) / "bin"]
        for name in ("CUDA_HOME", "CUDA_PATH")
        if (home := os.environ.get(name))
    }
    versions = sorted(SYSTEM.glob("cuda-*"), key=numbers_in, reverse=True)
    return {
        **named,
        "the PATH": [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder],
        f"{SYSTEM}/cuda*": [toolkit / "bin" for toolkit in (SYSTEM / "cuda", *versions)],
        "the packages of pip": pip_folders(),
    }


def find_nvcc() -> str | None:
    """Return the path of the first nvcc, or None. A CUDA_HOME or CUDA_PATH without one is reported and skipped."""
    for place, folders in nvcc_places().items():
        if nvcc := shutil.which("nvcc", path=os.pathsep.join(map(str, folders))):
            return nvcc
        if place.startswith("CUDA_"):
            say(f"{place} has no bin/nvcc; looking elsewhere")
    return None


def toolkit_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """Return the compile and link flags that tell nvcc the folders of a pip package; a full toolkit needs none.

    Pip packages have lib but no lib64, where the nvcc of 13.0 and 13.1 looks, and a component may be in a folder of
    its own beside the others (nvidia/cuda_runtime).
    """
    own = Path(nvcc).resolve().parents[1]
    if own.parent.name != "nvidia":
        return [], []
    roots = [own, *sorted(own.parent.iterdir())]
    headers = next((root / "include" for root in roots if (root / "include/cuda_runtime.h").is_file()), own / "include")
    libraries = (folder for root in roots for folder in root.glob("lib*") if (folder / "libcudart_static.a").is_file())
    return [f"-I{headers}"], [f"-L{folder}" for folder in islice(libraries, 1)]


def words_of(*command: str) -> list[str]:
    """Return the words that a command prints; none if it cannot run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def cuda_archs(nvcc: str) -> list[str]:
    """Return the compute capabilities to compile for, such as 80 or 90a, lowest first.

    Raises CompileError for a malformed DPO_FAST_CUDA_ARCHS, or if nvcc knows none of ARCHS.
    """
    if asked := os.environ.get("DPO_FAST_CUDA_ARCHS"):
        archs = asked.replace(".", "").replace(",", " ").split()
        for arch in archs:
            if not re.fullmatch(r"\d{2,3}[af]?", arch):
                raise CompileError(f"DPO_FAST_CUDA_ARCHS: {arch!r} is no compute capability; give e.g. 80,90")
        return sorted(set(archs), key=arch_key)
    known = {word.removeprefix("compute_") for word in words_of(nvcc, "--list-gpu-arch")}
    visible = words_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    usable = known.intersection(word.replace(".", "") for word in visible)
    archs = sorted(usable, key=arch_key) or [arch for arch in ARCHS if arch in known]
    if not archs:
        raise CompileError(f"{nvcc} knows none of the architectures {', '.join(ARCHS)}; set DPO_FAST_CUDA_ARCHS")
    return archs


def arch_key(arch: str) -> tuple[int, str]:
    return int(arch.rstrip("af")), arch


def ptx_arch(archs: list[str]) -> str:
    """Return the architecture whose PTX is included: the highest that later GPUs run too (90a runs only on 9.0)."""
    return ([arch for arch in archs if arch.isdigit()] or archs)[-1]


def arch_flags(archs: list[str]) -> list[str]:
    """Return the flags for native code for each architecture, and PTX for future ones."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = ptx_arch(archs)
    return [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def literal(name: str, text: str) -> str:
    """Return the -D flag that defines a C string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'-D{name}="{escaped}"'


def first_error(error: CompileError) -> str:
    """Return the most telling line of a failed command: the first with the word error, else the first."""
    first, *output = filter(None, map(str.strip, str(error).splitlines()))
    if not output:  # no command ran, or it printed nothing
        return first
    return next((line for line in output if "error" in line.lower()), output[0])


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot run: {error}") from error
    if done.returncode:
        output = f"{done.stdout}{done.stderr}".strip() or f"exit status {done.returncode}"
        raise CompileError(f"{shlex.join(command)}\n{output}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


class BuildNative(build_ext):
    """Compile and link by our own commands: setuptools supports neither nvcc nor parallel or incremental builds."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            for stale in Path("dpo_fast").glob("_native*.so"):  # else, if this build fails, an older one is imported
                stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if MODE == "cpu":
            return self.build(ext, None, "DPO_FAST_BUILD was cpu; install dpo_fast again without it")
        nvcc = find_nvcc()
        if nvcc is None:
            places = ", ".join(nvcc_places())
            reason = f"no nvcc in {places}; {PACKAGES}, or set CUDA_HOME, then install dpo_fast again"
            if MODE == "cuda":
                raise CompileError(f"DPO_FAST_BUILD=cuda needs nvcc: {reason}")
        else:
            try:
                return self.build(ext, nvcc)
            except CompileError as error:
                if MODE == "cuda":
                    raise
                # nv/target: a header of nvidia-cuda-cccl, which nvidia-cuda-nvcc does not require
                remedy = PACKAGES if "nv/target" in str(error) else "DPO_FAST_BUILD=cuda shows all that it says"
                reason = f"{nvcc} failed: {first_error(error)}; {remedy}"
        say(f"building without CUDA kernels: {reason}")
        self.build(ext, None, reason)

    def build(self, ext: Extension, nvcc: str | None, left_out: str = "") -> None:
        """Compile and link. nvcc: None to build without CUDA; left_out: the reason why."""
        import pybind11

        version = f"-DPYBIND11_USED={pybind11.__version__}"  # its folder differs in each isolated build
        compiler = os.environ.get("CXX") or "c++"
        includes = [version, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        commands = {source: [compiler, *CPP_FLAGS, *includes] for source in CPP_SOURCES}
        if nvcc is None:
            commands[NO_CUDA] = [compiler, *CPP_FLAGS, literal("DPO_FAST_LEFT_OUT", left_out)]
            link = [compiler, "-shared", "-fopenmp"]
        else:
            host = ["-ccbin", compiler]
            archs = cuda_archs(nvcc)
            headers, libraries = toolkit_flags(nvcc)
            commands[BINDINGS] += [
                literal("DPO_FAST_CUBINS", ",".join(archs)),
                literal("DPO_FAST_PTX", ptx_arch(archs)),
            ]
            commands |= {source: [nvcc, *host, *CUDA_FLAGS, *headers, *arch_flags(archs)] for source in CUDA_SOURCES}
            link = [nvcc, *host, "-shared", "-cudart=static", *libraries, "-Xcompiler=-fopenmp"]
            say(f"building CUDA kernels with {nvcc} for sm_{', sm_'.join(archs)}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # CUDA first: it takes longest
            objects = list(pool.map(self.compile, *zip(*reversed(commands.items()), strict=True)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*link, *map(str, objects), "-o", str(target)])

    def compile(self, source: Path, command: list[str]) -> Path:
        """Return the object of a source, compiled unless it is up to date with its inputs and the command."""
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
        optional=MODE == "auto",  # setuptools then reports a failure and goes on
    )
    setup(ext_modules=[] if MODE == "none" else [native], cmdclass={"build_ext": BuildNative})
