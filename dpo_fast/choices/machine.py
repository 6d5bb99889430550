"""This machine: its device and memory, and what else the outcome of a trial depends on besides the workload."""

import functools
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dpo_fast
from dpo_fast.version import version_of

LIBRARIES = ("torch", "triton", "diffusers", "peft", "xformers")
OUR_ROOMS = ("choices", "kernels", "models")  # and forward.py and the extension


def site(device: torch.device) -> str:
    """Name the host and the kind of device: one prover is enough for all ranks of one site."""
    return f"{platform.node()}, {device_name(device)}"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Memory(NamedTuple):
    """The memory of a device, in bytes."""

    free: int  # what a process may still take
    total: int


def memory_of(device: torch.device) -> Memory | None:
    """Return the memory of a GPU, or that of this host as far as the process may use it; None if it is not known."""
    if device.type == "cuda":
        return Memory(*torch.cuda.mem_get_info(device))
    host = _host_memory()
    if host is None:
        return None
    limits = [host, *_limits_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return Memory(*map(min, zip(*limits, strict=True)))


def _host_memory() -> Memory | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return Memory(*(1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal")))
    except (OSError, ValueError, LookupError):
        return None


# Files of a control group: the limit, what is used, and the field of memory.stat with what the kernel would give back.
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def _limits_of_groups(groups: Path, root: Path) -> Iterator[Memory]:
    """Yield the memory of the control groups that limit this process, as containers and schedulers do.

    groups: /proc/self/cgroup. root: where the groups' folders are.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for controller, *names in _GROUPS:
        for path in (path for _, controllers, path in lines if controller in controllers.split(",")):
            folder = root / controller / path.lstrip("/")
            places = (folder, *folder.parents)
            for place in places[: places.index(root) + 1]:
                if (memory := _limit_of(place, *names)) is not None:
                    yield memory


def _limit_of(group: Path, limit: str, used: str, returned: str) -> Memory | None:
    try:
        most = int((group / limit).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return Memory(max(0, most - int((group / used).read_text()) + int(stat.get(returned, 0))), most)
    except (OSError, ValueError):  # no limit ("max"), or a container that does not show the group
        return None


def facts(device: torch.device) -> dict[str, Any]:
    """Return what a remembered outcome is valid for, as JSON values."""
    of: dict[str, Any] = {"device": device_name(device), "code": code_digest()}
    of |= {name: version_of(name) for name in LIBRARIES}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        of |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        of |= {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    return of


@functools.cache
def code_digest() -> str:
    """Return a digest of the code that is proven: the kernels, the models, the plans and the compiled extension."""
    root, whole = Path(dpo_fast.__file__).parent, hashlib.blake2b(digest_size=16)
    files = [file for room in OUR_ROOMS for file in (root / room).rglob("*.py")]
    for file in sorted([*files, root / "forward.py", *root.glob("_native.*")]):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion())
