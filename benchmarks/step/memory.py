"""Predict which cases a GPU has the memory for, as `--dry-run` does.

A case needs the larger of two programs: ours, and the fp32 truth, which takes one pair per forward pass with
checkpointing but holds every weight in fp32 and always has a separate UNet as its reference.
"""

from benchmarks.step.cases import CASES, RANK, Case
from dpo_fast.command_line import parse
from dpo_fast.training.costs import memory_by_part, unet_size

DEFAULT = ("sdxl-1024-lora", "turbo-512-lora", "sdxl-1024-full", "turbo-512-full")  # on a GPU, in this order


def needed_bytes(case: Case, dtype: str, batch_size: int) -> float:
    """Predict the bytes of device memory for a step of `case`; dtype fp32, fp16 or bf16, batch_size in pairs."""
    ours, _ = _held(case, dtype, batch_size, "none")
    truth, weights = _held(case, "fp32", 1, "full")
    return max(ours, truth + weights * (case.tuning == "lora"))


def _held(case: Case, dtype: str, batch_size: int, checkpointing: str) -> tuple[float, float]:
    """Predict the bytes in total, and those of the UNet's weights."""
    flags = {
        "pretrained_model_name_or_path": "none is read",
        "dataset_name": "none is read",
        "tuning": case.tuning,
        "rank": RANK,
        "mixed_precision": "no" if dtype == "fp32" else dtype,
        "train_batch_size": batch_size,
        "pairs_per_step": case.pairs,
        "gradient_checkpointing": checkpointing,
    }
    config, _ = parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    size = unet_size({"in_channels": 4, **case.model.unet}, config, case.latent_side)
    memory = memory_by_part(size, config)
    return sum(memory.values()), memory["UNet weights"]


def fitting(free: float, dtype: str) -> tuple[list[str], dict[str, str]]:
    """Return the default cases that fit into `free` bytes, and why each of the others is left out."""
    chosen, left_out = [], {}
    for name in DEFAULT:
        needed = needed_bytes(CASES[name], dtype, CASES[name].batch_size)
        if needed <= free:
            chosen.append(name)
        else:
            left_out[name] = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return chosen, left_out
