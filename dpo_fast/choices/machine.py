"""What the outcome of a trial depends on besides the workload: the device, its driver, the libraries, our own code."""

import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

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
