"""The commands that faults are provoked in, as small as they can be, and what must be the same after one.

Every run has a folder of its own as its current folder and names its outputs relative to it, so that two runs write the
same files. Inputs (model, pairs, a trained policy) are shared.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from dpo_fast import shapes
from tests.faults.server import Fault, Outcome, Server, Signal
from tests.helpers import pipelines
from tests.helpers.pairs import write_pickapic, write_table

SHAPES = Path(shapes.__file__).parent

# Of two runs that do the same, these differ: how long it took, and how much memory there was.
MEASURED = frozenset(
    "seconds evaluation_seconds training_seconds pairs_per_second step_time data_wait peak_memory_gib"
    " digest logs revisions stamps".split()  # checksums of measurements and times; what is unreadable has no revision
)


@dataclass(frozen=True)
class Inputs:
    """What runs read."""

    folder: Path

    @property
    def world(self) -> Path:
        """The built-in pipeline."""
        return SHAPES / "pipeline"

    @property
    def pairs(self) -> Path:
        """Pairs of the built-in world, one of which does not decode."""
        return self.folder / "pairs.parquet"

    @property
    def photos(self) -> Path:
        """Other pairs."""
        return self.folder / "photos.parquet"

    @property
    def prompts(self) -> Path:
        """Two captions of the built-in world, a line each."""
        return self.folder / "prompts.txt"

    @property
    def model(self) -> Path:
        """A tiny pipeline of Stable Diffusion 1.5's classes."""
        return self.folder / "sd15"

    @property
    def policy(self) -> Path:
        """The output folder of a training."""
        return self.folder / "policy"


_RUN = (
    " --latent_cache_dir cache --output_dir out --seed 0 --train_batch_size 2 --max_train_steps 3 --log_every 1"
    " --dataloader_num_workers 0 --learning_rate 1e-3"
)
_WORLD = (
    " --pretrained_model_name_or_path {world} --dataset_name {pairs} --resolution 16 --max_bad_fraction 0.5"
) + _RUN  # fmt: skip
_IMAGES = " --policy {policy} --prompts {prompts} --seeds 2 --sampling_steps 2 --batch_size 2 --output_dir out"

# The words after `python -m dpo_fast.`; in braces, inputs.
COMMANDS = {
    # the whole of a training: cache, reference's errors, validation, pruned checkpoints, result, evaluation, page
    "train": "train --checkpointing_steps 1 --checkpoints_total_limit 2 --cached_reference 1 --run_validation"
    " --validation_steps 2 --validation_fraction 0.3 --sampling_steps 2 --eval_scorers appeal --eval_prompts {prompts}"
    " --eval_images 4 --resume_from_checkpoint auto" + _WORLD,
    # the whole UNet: a pipeline of many files as the result
    "train full": "train --pretrained_model_name_or_path {model} --dataset_name {photos} --resolution 64 --tuning full"
    " --use_ema --checkpointing_steps 1 --resume_from_checkpoint auto" + _RUN,
    "cache build": "cache build --hflip" + _WORLD,
    "cache reference": "cache reference --draws 2" + _WORLD,
    "relabel": "relabel --dataset_name {pairs} --max_bad_fraction 0.5 --scorer appeal:1 --scorer faithfulness:0.5"
    " --temperature 0.5 --batch_size 2 --output labelled.parquet",
    "generate": "generate --baseline base" + _IMAGES,
    "evaluate": "evaluate --scorers appeal faithfulness --dataset_name {photos} --label_column label_0 --draws 2"
    " --dataloader_num_workers 0" + _IMAGES,
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
    inputs.prompts.write_text("\n".join(SHAPES.joinpath("held_out.txt").read_text().splitlines()[:2]) + "\n")
    pipelines.make_sd15(inputs.model)
    work = inputs.folder / "training"
    work.mkdir()
    line = "--pretrained_model_name_or_path {world} --dataset_name {photos} --resolution 16 --sampling_steps 2" + _RUN
    done = server.run("train", words(line, inputs), work)
    if done.status:
        raise RuntimeError(f"the policy could not be trained: {done.err}")
    (work / "out").rename(inputs.policy)
    shutil.rmtree(work)
    return inputs


def words(line: str, inputs: Inputs) -> list[str]:
    """A command line's words, with the inputs."""
    paths = {name: getattr(inputs, name) for name in ("world", "pairs", "photos", "prompts", "model", "policy")}
    return [word.format(**paths) for word in line.split()]


class Case:
    """A command in a folder of its own, run as often as one likes."""

    def __init__(self, server: Server, inputs: Inputs, name: str, folder: Path) -> None:
        self.server, self.folder = server, folder.resolve()
        self.module, *self.argv = words(COMMANDS[name], inputs)
        self.folder.mkdir(parents=True)

    def run(self, fault: Fault | None = None, signal: Signal | None = None, root: Path | None = None) -> Outcome:
        """Run the command line, always the same."""
        return self.server.run(self.module, self.argv, self.folder, fault=fault, signal=signal, root=root)

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
    try:
        if path.suffix == ".json":
            return json.dumps(_unmeasured(json.loads(data)), sort_keys=True)
        if path.suffix == ".jsonl":
            return "\n".join(json.dumps(_unmeasured(json.loads(line))) for line in data.splitlines())
        if path.suffix == ".yaml":
            return json.dumps(_unmeasured(yaml.safe_load(data)))
    except (ValueError, yaml.YAMLError):  # half of one
        return data
    return data.replace(os.fsencode(folder), b"")


def _unmeasured(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value
