"""`python -m dpo_fast.env`: versions, devices and what can run here. Paste it into a bug report.

With --prove the candidates of every choice that a run makes (backend of the pair ops, attention, memory order; with
--compiled also compilation) are proven and timed on every GPU, or on the CPU where there is none, at the shapes of
SD1.5 and SDXL. Exit status: 0 done, 1 a candidate that can be used here is wrong or failed, 2 bad input.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.cli import guarded, leave, say
from dpo_fast.errors import BadInput
from dpo_fast.files import read_json, write_json
from dpo_fast.version import version_of

if TYPE_CHECKING:
    from dpo_fast.choices.decision import Outcome

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


def proofs(compiled: bool = False) -> "Iterator[Outcome]":
    """Prove and time the candidates of every choice on every GPU, or on the CPU where there is none.

    compiled: also ways to compile the UNet, which takes minutes.
    """
    import torch

    from dpo_fast.choices.choose import Choices, compile_question, eager_question, pair_ops_question
    from dpo_fast.choices.decision import decide
    from dpo_fast.choices.unet import Variant
    from dpo_fast.choices.workload import SD15, SDXL, Workload

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in gpus or ["cpu"]:
        built_in = "the built-in model, fp32, 24 pairs"
        workloads = {
            "SD1.5, 512 px, fp16, 8 pairs": Workload(device, "float16", 8, 64, SD15, 77),
            "SDXL, 1024 px, bf16, 4 pairs": Workload(device, "bfloat16", 4, 128, SDXL, 77),
        }
        if not gpus:
            workloads[built_in] = Workload(device, "float32", 24, **_built_in(), tuning="full")
        for what, workload in workloads.items():
            questions = [pair_ops_question(workload, "channels_last")]
            if gpus or what == built_in:  # a CPU would take minutes over a UNet of full width
                questions.append(eager_question(workload, Choices(), Variant()))
                questions += [compile_question(workload, Variant())] if compiled else []
            for question in filter(None, questions):
                say(f"proving {question.what}: {what}")
                evidence = question.judge(lambda doing: say(f"  {doing}"))
                yield decide(f"{question.what}: {what}", question.baseline, evidence)


def _built_in() -> dict[str, Any]:
    """The part of a workload that the built-in model decides."""
    from dpo_fast.presets import PRESETS

    folder = Path(PRESETS["shapes"]["pretrained_model_name_or_path"])
    unet, text = (read_json(folder / part / "config.json") for part in ("unet", "text_encoder"))
    return {"latent": unet["sample_size"], "unet": unet, "tokens": text["max_position_embeddings"]}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(argv), argv=argv, kept="nothing was written", go_on="start the same command again")


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m dpo_fast.env", description="Print versions, devices and what runs here."
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="also prove and time the candidates of every choice on every GPU, or else the CPU, in other processes",
    )
    parser.add_argument("--compiled", action="store_true", help="with --prove: also ways to compile the UNet; minutes")
    parser.add_argument("--json", type=Path, help="with --prove: also write the tables to this file")
    arguments = parser.parse_args(argv)

    if arguments.compiled and not arguments.prove:
        raise BadInput("--compiled is for --prove: add it, or leave --compiled out")
    if arguments.json is not None and not arguments.prove:
        raise BadInput(f"--json {arguments.json} is for the tables of --prove: add it, or leave --json out")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise BadInput(f"--json {arguments.json}: its folder does not exist; make it, or name another file")
    print(report(), flush=True)
    outcomes = []
    for outcome in proofs(arguments.compiled) if arguments.prove else ():
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
    wrong = [row for outcome in outcomes for row in outcome.rows if row.refuted]
    return int(bool(wrong))


if __name__ == "__main__":
    leave(main())
