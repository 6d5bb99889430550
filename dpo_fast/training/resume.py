"""Resuming: which checkpoint a run continues from, and whether it belongs to this run."""

from pathlib import Path

import torch
from torch import nn

from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.models import Family
from dpo_fast.parallel import Ranks
from dpo_fast.training import checkpoint, run_folder
from dpo_fast.training.exports import bytes_of_result
from dpo_fast.training.metrics import LOGS, Extent, kept_lines
from dpo_fast.training.optim import COUNTERS, MasterOptimizer

KEPT_COUNTERS = ("kl", *COUNTERS)  # of a checkpoint: tensors without dimensions


class AlreadyDone(Exception):
    """`--resume_from_checkpoint auto` found a run that has written everything it was asked for."""


def saved_state(config: TrainConfig, ranks: Ranks) -> tuple[dict, dict]:
    """Return the files and the state of the checkpoint to resume from; both are empty for a fresh run."""
    if config.resume_from_checkpoint is None:
        return {}, {}
    # on a network disk the other ranks may not yet see what the main rank sees
    folder = ranks.from_main(lambda: checkpoint.find(config.output_dir, config.resume_from_checkpoint))
    return ranks.on_all(lambda: _load_checkpoint(folder)) if folder else ({}, {})


def _load_checkpoint(folder: Path) -> tuple[dict, dict]:
    """Load a checkpoint's files and state. Raises BadInput for one that is intact but not of a run."""
    files, saved = checkpoint.load(folder)
    kinds = {"step": int, "config": dict, "fingerprints": dict, "notes": dict, "bad_rows": list}
    lacking = [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]
    lacking += ["optimizer_values"] * ("optimizer_values" not in saved)
    if not lacking:
        config = saved["config"]
        lacking = [f"config.{name}" for name in ("seed", "resolution", "max_train_steps") if name not in config]
    lacking += [f"{name}.safetensors" for name in ("weights", "optimizer") if name not in files]
    lacking += [f"the counter {name}" for name in KEPT_COUNTERS if not _is_counter(files, name)]
    known = saved.get("fingerprints")
    if isinstance(known, dict) and not ("pairs" in known and ("base weights" in known or "base model" in known)):
        lacking.append("fingerprints of model and pairs")
    if lacking:
        raise BadInput(
            f"{folder} is no checkpoint of a run (it lacks {', '.join(lacking)}): put it back from a copy, or delete"
            " it, and --resume_from_checkpoint latest goes on from the one before"
        )
    return files, saved


def _is_counter(files: dict, name: str) -> bool:
    counter = files.get("counters", {}).get(name)
    return isinstance(counter, torch.Tensor) and counter.shape == ()


def refuse_changes(changed: list[str]) -> None:
    """Raise BadInput if there are changes; one line per change."""
    if changed:
        raise BadInput(
            f"--resume_from_checkpoint: the checkpoint was written with other settings ({'; '.join(changed)});"
            " give the same, or start a new run in another --output_dir"
        )


def older_fingerprint(unet: nn.Module) -> dict[str, str]:
    """The fingerprint that checkpoints of earlier versions store for a UNet; take it before adapters are added."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for index, (_, tensor) in enumerate(sorted(unet.state_dict().items())):
        bits = tensor.detach().contiguous().view(integers[tensor.element_size()])
        total = (total * 1_000_003 + (index + 1) * int(bits.sum(dtype=torch.int64).item())) % 2**64
    return {"base model": f"{total:016x}"}


def check_saved(config: TrainConfig, fingerprints: dict[str, str], saved: dict) -> int:
    """Return a checkpoint's step.

    Raises BadInput if its model or pairs differ, if it is past the last step, or if later checkpoints exist.
    """
    before = saved["fingerprints"]
    known = {name: now for name, now in fingerprints.items() if name in before}
    refuse_changes([f"{name}: {before[name]} -> {now}" for name, now in known.items() if before[name] != now])
    if saved["step"] > config.max_train_steps:
        raise BadInput(
            f"--resume_from_checkpoint: the checkpoint is of step {saved['step']}, after the last of --max_train_steps"
            f" {config.max_train_steps}; give at least {saved['step']}, or resume from an earlier checkpoint"
        )
    there = checkpoint.all_of(config.output_dir)
    later = [folder.name for folder in there if checkpoint.step_of(folder) > saved["step"]]
    if later:
        raise BadInput(
            f"--resume_from_checkpoint: {config.output_dir} holds later checkpoints than step {saved['step']}"
            f" ({', '.join(later)}); move them away, or go on from it in a new --output_dir"
        )
    return saved["step"]


def check_whether_done(config: TrainConfig, ranks: Ranks, step: int, last_step: int) -> None:
    """Raise AlreadyDone if `auto` has nothing left to do. Every rank calls this."""
    if config.resume_from_checkpoint != "auto" or step < last_step:
        return
    parts = dict(evaluated=bool(config.eval_scorers), uploaded=config.push_to_hub)
    if ranks.share(run_folder.is_finished(config.output_dir, step, **parts)):
        raise AlreadyDone(f"{config.output_dir} is done already, all {step} steps; --overwrite trains anew")


def logs_of(saved: dict) -> dict[str, Extent]:
    """Return what a checkpoint says each log held: file name -> extent."""
    return {name: Extent(*extent) for name, extent in saved.get("logs", {}).items()}


def check_logs(folder: Path, saved: dict) -> None:
    """Raise Damaged if a log that will be continued is not what the checkpoint's run had written."""
    extents = logs_of(saved)
    for name in LOGS:
        if (folder / name).is_file():
            kept_lines(folder / name, saved["step"], extents.get(name))


def check_space(config: TrainConfig, family: Family, masters: MasterOptimizer) -> None:
    """Raise BadInput if one checkpoint and the result do not fit on the disk."""
    state = sum(t.nbytes for tensors in masters.state()[0].values() for t in tensors.values())
    trained = sum(master.numel() for master in masters.masters)
    unmade = config.optimizer == "adamw" and not masters.optimizer.state  # the first step creates the moments
    moments = 8 * trained if unmade else 0
    modules = (part for part in family.pipeline.components.values() if isinstance(part, torch.nn.Module))
    parameters = {part: sum(p.numel() for p in part.parameters()) for part in modules}
    unet = parameters.pop(family.unet)
    result = bytes_of_result(config, trained, unet, sum(parameters.values()))
    run_folder.check_space(config.output_dir, state + moments + result)
