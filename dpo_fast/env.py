"""`python -m dpo_fast.env`: versions, devices and what can run here. Paste it into a bug report.

With --prove every backend of the pair ops is proven and timed on every GPU, or on the CPU where there is none, at the
shapes of SD1.5 and SDXL. Exit status: 0 done, 1 a backend that can be used here is wrong or failed, 2 bad input.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.cli import guarded, leave, say
from dpo_fast.errors import BadInput
from dpo_fast.files import write_json

if TYPE_CHECKING:
    from dpo_fast.choices import Outcome

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


def proofs() -> "Iterator[Outcome]":
    """Prove and time the backends of the pair ops on every GPU, or on the CPU where there is none."""
    import torch

    from dpo_fast.choices import Limits, decide, prove, times
    from dpo_fast.choices.pair_ops import BACKENDS, BASELINE, Shape

    plan = "dpo_fast.choices.pair_ops"
    shapes = {
        "SD1.5, 512 px, fp16, 8 pairs": Shape(8, (4, 64, 64), torch.float16),
        "SDXL, 1024 px, bf16, 4 pairs, channels_last": Shape(4, (4, 128, 128), torch.bfloat16, channels_last=True),
    }
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    for device in devices:
        for what, shape in shapes.items():
            say(f"proving the pair ops on {device}: {what}")
            arguments = shape.as_arguments(device)
            reasons = prove(plan, BACKENDS, arguments, Limits())
            proven = [name for name, reason in reasons.items() if not reason]
            seconds = times(plan, [BASELINE, *proven], arguments, Limits())
            yield decide(f"pair ops on {device}, forward and backward: {what}", BASELINE, reasons, seconds)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    parser = argparse.ArgumentParser(
        "python -m dpo_fast.env", description="Print versions, devices and what runs here."
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="also prove and time the backends of the pair ops on every GPU, or else the CPU, in other processes",
    )
    parser.add_argument("--json", type=Path, help="with --prove: also write the tables to this file")
    arguments = parser.parse_args(argv)

    def work() -> int:
        if arguments.json is not None and not arguments.prove:
            raise BadInput(f"--json {arguments.json} is for the tables of --prove: add it, or leave --json out")
        if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
            raise BadInput(f"--json {arguments.json}: its folder does not exist; make it, or name another file")
        print(report(), flush=True)
        outcomes = []
        for outcome in proofs() if arguments.prove else ():
            print(f"\n{outcome}", flush=True)
            outcomes.append(outcome)
        if arguments.json is not None:
            write_json(
                arguments.json,
                {
                    "versions": {name: version_of(name) for name in PACKAGES},
                    "choices": [outcome.as_json() for outcome in outcomes],
                },
            )
        wrong = [row for outcome in outcomes for row in outcome.rows if row.reason and not row.unusable]
        return int(bool(wrong))

    return guarded(work, kept="nothing was written", go_on="start the same command again")


if __name__ == "__main__":
    leave(main())
