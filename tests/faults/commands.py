"""The commands that faults are provoked in, as small as they can be, and what must be the same after one.

Every run has a folder of its own as its current folder and names its outputs relative to it, so that two runs write the
same files. Inputs (model, pairs, a trained policy) are shared.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from dpo_fast import shapes
from tests.faults.server import Fault, Outcome, Server, Signal
from tests.helpers import pipelines
from tests.helpers.pairs import write_pickapic, write_table

SHAPES = Path(shapes.__file__).parent
TEXTS = SHAPES.joinpath("held_out.txt").read_text().splitlines()[:2]

# Of two runs that do the same, these differ: how long it took, and how much memory there was.
MEASURED = frozenset(
    "seconds evaluation_seconds training_seconds pairs_per_second step_time data_wait peak_memory_gib".split()
)


@dataclass(frozen=True)
class Inputs:
    """What runs read."""

    folder: Path

    @property
    def pairs(self) -> Path:
        return self.folder / "shapes.parquet"

    @property
    def photos(self) -> Path:
        return self.folder / "photos.parquet"

    @property
    def model(self) -> Path:
        return self.folder / "sd15"

    @property
    def policy(self) -> Path:
        return self.folder / "policy"


@dataclass(frozen=True)
class Command:
    """`python -m dpo_fast.<module> argv`."""

    module: str
    argv: Callable[[Inputs], list[object]]


def _training(model: Path, pairs: Path, *more: object) -> list[object]:
    return [
        *("--pretrained_model_name_or_path", model, "--dataset_name", pairs, "--latent_cache_dir", "cache"),
        *("--output_dir", "out", "--seed", 0, "--train_batch_size", 2, "--max_train_steps", 3, "--log_every", 1),
        *("--dataloader_num_workers", 0, "--learning_rate", 1e-3, *more),
    ]


def _shapes(inputs: Inputs, *more: object) -> list[object]:
    return _training(SHAPES / "pipeline", inputs.pairs, "--resolution", 16, "--max_bad_fraction", 0.5, *more)


_GENERATION = ("--prompts", *TEXTS, "--sampling_steps", 2, "--batch_size", 2, "--output_dir", "out", "--seeds", 2)

COMMANDS = {
    # the whole of a training: cache, reference's errors, validation, pruned checkpoints, result, evaluation, page
    "train": Command(
        "train",
        lambda inputs: _shapes(
            inputs,
            *("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--cached_reference", 1),
            *("--run_validation", "--validation_steps", 2, "--validation_fraction", 0.3, "--sampling_steps", 2),
            *("--eval_scorers", "appeal", "--eval_prompts", inputs.folder / "prompts.txt", "--eval_images", 4),
            *("--resume_from_checkpoint", "auto"),
        ),
    ),
    # the whole UNet: a pipeline of many files as the result
    "train full": Command(
        "train",
        lambda inputs: _training(
            inputs.model,
            inputs.photos,
            "--resolution",
            64,
            "--tuning",
            "full",
            "--use_ema",
            "--checkpointing_steps",
            1,
            *("--resume_from_checkpoint", "auto"),
        ),  # fmt: skip
    ),
    "cache build": Command("cache", lambda inputs: ["build", *_shapes(inputs, "--hflip")]),
    "cache reference": Command("cache", lambda inputs: ["reference", "--draws", 2, *_shapes(inputs)]),
    "relabel": Command(
        "relabel",
        lambda inputs: [
            *(
                "--dataset_name",
                inputs.pairs,
                "--output",
                "labelled.parquet",
                "--batch_size",
                2,
                "--scorer",
                "appeal:1",
            ),
            *("--scorer", "faithfulness:0.5", "--temperature", 0.5, "--max_bad_fraction", 0.5),
        ],
    ),
    "generate": Command("generate", lambda inputs: ["--policy", inputs.policy, "--baseline", "base", *_GENERATION]),
    "evaluate": Command(
        "evaluate",
        lambda inputs: [
            *("--policy", inputs.policy, "--scorers", "appeal", "faithfulness", *_GENERATION),
            *(
                "--dataset_name",
                inputs.photos,
                "--label_column",
                "label_0",
                "--dataloader_num_workers",
                0,
                "--draws",
                2,
            ),
        ],
    ),
}


def write_inputs(server: Server, folder: Path) -> Inputs:
    """Write what the commands read into `folder`."""
    inputs = Inputs(folder.resolve())
    inputs.folder.mkdir(exist_ok=True)
    table = pq.read_table(SHAPES / "pairs.parquet")
    rows = table.take(list(range(0, 7 * 240, 240))).to_pydict()
    rows["label_0"] = [float(label) for label in rows.pop("label_faithfulness")]
    del rows["label_appeal"]
    rows["jpg_1"][3] = rows["jpg_1"][3][:60]  # does not decode
    write_table(inputs.pairs, rows)
    write_pickapic(inputs.photos, n=6, size=16)
    inputs.folder.joinpath("prompts.txt").write_text("\n".join(TEXTS) + "\n")
    pipelines.make_sd15(inputs.model)
    argv = _training(SHAPES / "pipeline", inputs.photos, "--resolution", 16, "--sampling_steps", 2)
    work = inputs.folder / "training"
    work.mkdir()
    done = server.run("train", argv, work)
    if done.status:
        raise RuntimeError(f"the policy could not be trained: {done.err}")
    (work / "out").rename(inputs.policy)
    shutil.rmtree(work)
    return inputs


RESUME_AUTO = False  # whether --resume_from_checkpoint auto is there


def _without_auto(argv: list[object], out: Path) -> list[object]:
    """What a person would type in its place."""
    if RESUME_AUTO or "auto" not in argv:
        return argv
    saved = any(path.is_dir() for path in out.glob("checkpoint-*"))
    flags = argv[:-2] if argv[-1] == "auto" else argv
    if saved:
        return [*flags, "--resume_from_checkpoint", "latest"]
    return [*flags, "--overwrite"] if (out / "config.yaml").is_file() else flags


class Case:
    """A command in a folder of its own, run as often as one likes."""

    def __init__(self, server: Server, inputs: Inputs, name: str, folder: Path) -> None:
        self.server, self.inputs, self.command, self.folder = server, inputs, COMMANDS[name], folder.resolve()
        self.folder.mkdir(parents=True)

    def run(self, fault: Fault | None = None, signal: Signal | None = None, root: Path | None = None) -> Outcome:
        """Run the command line, always the same."""
        argv = _without_auto(self.command.argv(self.inputs), self.folder / "out")
        return self.server.run(self.command.module, argv, self.folder, fault=fault, signal=signal, root=root)

    def remove(self) -> None:
        """Delete what it wrote."""
        shutil.rmtree(self.folder)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below `folder` by name, without what was measured; empty folders end with a slash. Locks do not count:
    their files stay, and say who held them last."""
    found: dict[str, bytes | str] = {}
    for path, folders, files in os.walk(folder):
        for file in files:
            full = Path(path, file)
            if not file.startswith(".lock"):
                found[str(full.relative_to(folder))] = _settled(full, folder)
        if not folders and not files:
            found[f"{Path(path).relative_to(folder)}/"] = ""
    return found


def differences(whole: dict[str, bytes | str], other: dict[str, bytes | str]) -> list[str]:
    """How the files of another run differ from those of a whole one, a line each."""
    missing = [f"missing: {name}" for name in whole if name not in other]
    more = [f"left behind: {name}" for name in other if name not in whole]
    differ = [f"differs: {name}" for name in whole if name in other and whole[name] != other[name]]
    return missing + more + differ


def _settled(path: Path, folder: Path) -> bytes | str:
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_unmeasured(json.loads(data)))
    if path.suffix == ".jsonl":
        return "\n".join(json.dumps(_unmeasured(json.loads(line))) for line in data.splitlines())
    if path.suffix == ".yaml":
        return json.dumps(_unmeasured(yaml.safe_load(data)))
    return data.replace(os.fsencode(folder), b"")


def _unmeasured(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value
