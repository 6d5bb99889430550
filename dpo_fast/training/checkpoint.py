"""Checkpoints: everything a run needs to resume bit for bit, as safetensors and JSON, written atomically.

    checkpoint-N/weights.safetensors     fp32 masters of the trained parameters
                 optimizer.safetensors   optimizer state
                 counters.safetensors    loss scale, skipped updates, kto's mean reward of the previous step (kl)
                 metrics.safetensors     sums over the pairs since the last line of metrics.jsonl
                 ema.safetensors         with --use_ema
                 state.json              step, pairs seen, configuration, fingerprints, the files above by name with
                                         their checksums (XXH3, 128 bits), and its own digest

Tensors are never sharded and nothing is pickled, so a checkpoint cannot run code.
"""

import logging
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_fast.checksums import file_digest, parse_signed, write_signed_json
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput, disk_error
from dpo_fast.files import atomic_folder, is_inside, read_bytes, regular_file, remove_folder, rename_away
from dpo_fast.store import changes

PREFIX = "checkpoint-"

logger = logging.getLogger(__name__)

# Settings that may differ between a checkpoint and the run that resumes it: they change where the run ends, what it
# reports, or at most how sums are rounded (batch split, kernels, attention, compilation; on a GPU also whether images
# are encoded for the cache or at each visit). Any other difference is refused. `run._check_draws` decides about
# cached_reference.
MAY_CHANGE = frozenset(
    "preset dataset_name max_train_steps num_train_epochs log_every report_to logging_dir tracker_name output_dir"
    " overwrite resume_from_checkpoint checkpointing_steps checkpointing_minutes checkpoints_total_limit"
    " validation_steps push_to_hub"
    " hub_model_id cache_dir dataloader_num_workers vae_encode_batch_size max_skipped_updates train_batch_size"
    " gradient_accumulation_steps backend attention memory_order compile prove choices gradient_checkpointing"
    " cache latent_cache_dir cached_reference"
    " eval_scorers eval_prompts eval_images eval_batch_size scorer_models"
    " eval_every eval_every_images stop_when_worse"
    " export export_dtype".split()
)


DEFAULTS = {one.name: one.default for one in fields(TrainConfig)}


def save(output_dir: Path, step: int, files: dict[str, dict[str, torch.Tensor]], state: dict[str, object]) -> Path:
    """Write checkpoint-`step` under a temporary name and rename it. Returns its path. Raises OSError."""
    target = folder_of(output_dir, step)
    with atomic_folder(target) as folder:
        digests = {}
        for name, tensors in files.items():
            # copies, because safetensors refuses tensors that share memory, as the code books of 8-bit states do
            copies = {
                k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()
            }
            save_file(copies, folder / f"{name}.safetensors")
            digests[name] = file_digest(folder / f"{name}.safetensors")
        write_signed_json(folder / "state.json", {**state, "files": digests})
    return target


def load(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]:
    """Read a checkpoint and verify every byte; one of an earlier version, without checksums, is logged as unchecked.

    Raises OSError for a disk error, and BadInput, naming the file and the reason, for a folder that is damaged or not a
    checkpoint.
    """
    try:
        data = read_bytes(folder / "state.json")
        try:
            digests = parse_signed(data, required=False)["files"]
            # only checkpoints of earlier versions, whose `files` is a list, have no digest
            state = parse_signed(data, required=isinstance(digests, dict))
            del state["files"]
            if not all(is_inside(name) and "/" not in name for name in digests):
                raise ValueError("it names files that are not in its folder")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"state.json is damaged: {error}") from error
        if not isinstance(digests, dict):
            logger.warning("%s is of an earlier version, without checksums: it is not checked for damage", folder)
            digests = dict.fromkeys(digests)
        files = {name: _load(folder / f"{name}.safetensors", expected) for name, expected in digests.items()}
        _split_counters(files)
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        if (found := disk_error(error)) is not None:
            raise found from (None if found is error else error)  # the checkpoint may be intact
        raise BadInput(
            f"{folder} is not a whole checkpoint ({error}): put it back from a copy, or delete it, and"
            " --resume_from_checkpoint latest goes on from the one before"
        ) from error
    return files, state


def folder_of(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return output_dir / f"{PREFIX}{step}"


def _load(path: Path, expected: str | None) -> dict[str, torch.Tensor]:
    """Load a file's tensors, verified if a checksum is expected. Raises ValueError, OSError and SafetensorError."""
    if expected is not None and file_digest(regular_file(path)) != expected:
        raise ValueError(f"{path.name} is damaged: its checksum is not the one in state.json")
    return load_file(path)


def _split_counters(files: dict[str, dict[str, torch.Tensor]]) -> None:
    """Move the counters out of the optimizer's tensors, where earlier versions named them "|..."."""
    if "counters" not in files:
        optimizer = files.get("optimizer", {})
        names = [name for name in optimizer if name.startswith("|")]
        files["counters"] = {name[1:]: optimizer.pop(name) for name in names}


def step_of(folder: Path) -> int:
    """The N of checkpoint-N."""
    return int(folder.name.removeprefix(PREFIX))


def is_named_so(folder: Path) -> bool:
    """Whether a folder's name is checkpoint-N."""
    return folder.name.startswith(PREFIX) and folder.name.removeprefix(PREFIX).isdecimal()


def all_of(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, oldest first."""
    found = [path for path in output_dir.glob(PREFIX + "*") if path.is_dir() and is_named_so(path)]
    return sorted(found, key=step_of)


def find(output_dir: Path, wanted: str) -> Path | None:
    """Return the folder `--resume_from_checkpoint` refers to: `latest`, a path, or the name of one inside `output_dir`.

    `auto` is `latest` if there is a checkpoint, else None. Raises BadInput for a checkpoint that does not exist.
    """
    if wanted in ("latest", "auto"):
        if checkpoints := all_of(output_dir):
            return checkpoints[-1]
        if wanted == "auto":
            return None
        raise BadInput(
            f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint-N folder to go on from; auto starts"
            " such a run from the beginning"
        )
    for path in (Path(wanted), output_dir / wanted):
        if path.is_dir():
            return path
    raise BadInput(f"--resume_from_checkpoint {wanted}: no such folder, neither as given nor inside {output_dir}")


def prune(output_dir: Path, keep: int | None, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of the step `best`; None keeps all. Raises OSError."""
    if keep is not None:
        for old in all_of(output_dir)[:-keep]:
            if step_of(old) != best:
                remove_folder(rename_away(old))


def differences(saved: dict[str, object], now: dict[str, object]) -> list[str]:
    """List the differing settings that would change the result, as `name: saved -> now`."""
    before = {**DEFAULTS, **saved}  # a checkpoint of an earlier version lacks newer flags
    names = [name for name in {**saved, **now} if name not in MAY_CHANGE]
    return changes({name: before.get(name) for name in names}, {name: now.get(name) for name in names})
