"""Whole training runs on tiny pipelines, in this process or in one of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from dpo_fast import parallel
from dpo_fast.command_line import parse
from dpo_fast.train import main
from dpo_fast.training.run import Run, open_run

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "preference_sample.parquet"
STEPS = 4


def flags_for(model: Path, pairs: Path, out: Path, *flags: object) -> list[str]:
    fixed = {
        "pretrained_model_name_or_path": model,
        "dataset_name": pairs,
        "output_dir": out,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "dataloader_num_workers": 0,
        "seed": 0,
        "log_every": 1,
    }
    return [str(word) for name, value in fixed.items() for word in (f"--{name}", value)] + [str(f) for f in flags]


def train(*arguments: object) -> Path:
    """Run to the end and return the output folder."""
    flags = flags_for(*arguments)
    assert main(flags) == 0
    return arguments[2]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "weights.safetensors")


def assert_same_state(one: Path, other: Path, step: int = STEPS) -> None:
    for file in sorted((one / f"checkpoint-{step}").glob("*.safetensors")):
        a, b = load_file(file), load_file(other / f"checkpoint-{step}" / file.name)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (file.name, name)


def opened(flags: list[str]) -> Run:
    """The run these flags describe, before its first step."""
    return open_run(parse(flags)[0], parallel.start("none"))


def command(*flags: object, launcher: tuple[str, ...] = (), program: str = "train") -> list[str]:
    """The command line of a run in a process of its own."""
    return [sys.executable, *launcher, "-m", f"dpo_fast.{program}", *map(str, flags)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def start(*flags: object, launcher: tuple[str, ...] = (), program: str = "train") -> subprocess.Popen:
    """Start a run in a process of its own."""
    return subprocess.Popen(
        command(*flags, launcher=launcher, program=program),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
