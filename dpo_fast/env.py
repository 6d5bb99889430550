"""`python -m dpo_fast.env`: versions, devices and what can run here. Paste it into a bug report."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "dpo_fast torch triton diffusers transformers accelerate peft datasets pyarrow safetensors numpy pillow"
    " tyro xformers bitsandbytes ftfy tensorboard wandb"
).split()


def report() -> str:
    """The report as lines of `name: value`."""
    import torch

    from dpo_fast.kernels.dispatch import usable_backends
    from dpo_fast.models.attention import usable_attention

    lines = [
        f"python: {platform.python_version()} ({platform.platform()})",
        *(f"{name}: {version_of(name)}" for name in PACKAGES),
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        f"cuda: {torch.version.cuda or 'not in this torch build'}",
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(
            f"gpu {index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB,"
            f" {gpu.multi_processor_count} SMs"
        )
    if not torch.cuda.is_available():
        lines.append("gpu: none usable")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += _native_build()
    for title, found in ((f"{device} kernels", usable_backends(device)), ("attention", usable_attention())):
        lines += [f"{title} {name}: {'usable' if not why else 'not usable: ' + why}" for name, why in found.items()]
    return "\n".join(lines)


def _native_build() -> list[str]:
    """What the extension holds, and what each GPU runs of it."""
    import torch

    try:
        from dpo_fast.kernels import native
    except ImportError as error:
        return [f"native build: none ({error})"]
    lines = [f"native build: {native.build()}"]
    for index in range(torch.cuda.device_count()):
        if code := native.code_on(torch.cuda.get_device_capability(index)):
            lines.append(f"gpu {index} native: {code}")
    return lines


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
    sys.exit(0)
