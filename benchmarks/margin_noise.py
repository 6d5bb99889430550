"""Margin noise by precision: how far rounding moves the margins of a model, in logits.

    python benchmarks/margin_noise.py [--changes 0 1e-4 1e-3] [--pairs 192] [--json FILE] [FLAGS of dpo_fast.train]

The policy is the base with every weight multiplied by 1 + CHANGE x normal noise. Each pair's margin in a precision, by
the trainer's own encoding, noising and kernels, is compared with the float64 margin of the same fp32 weights on the
same draws: `noise` is the standard deviation of the difference, `largest` its maximum, `margin rms` the size of the
true margins. At change 0 policy and reference are one model and the noise is exactly 0.
"""

import argparse
import copy
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_fast import parallel
from dpo_fast.command_line import parse
from dpo_fast.data import Batch
from dpo_fast.kernels import reference
from dpo_fast.training.run import open_run
from dpo_fast.training.trainer import Trainer

PRECISIONS = ("no", "fp16", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=float, nargs="+", default=[0.0, 1e-4, 1e-3], help="relative, of weights")
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments, flags = parser.parse_known_args()
    rows = []
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            more = ["--tuning", "full", "--mixed_precision", precision, "--output_dir", folder, "--seed", "0"]
            config, _ = parse([*flags, *more, "--dataloader_num_workers", "0"])
            trainer = Trainer(open_run(config, parallel.start("none")), [])
            rows += measure(trainer, arguments.changes, arguments.pairs, precision)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, python {platform.python_version()}; beta {config.beta_dpo:g}")
    print(f"{'change':>8}  {'precision':10}{'margin rms':>11}{'noise':>11}{'largest':>11}")
    for row in sorted(rows, key=lambda row: row["change"]):
        name = "fp32" if row["precision"] == "no" else row["precision"]
        print(f"{row['change']:8g}  {name:10}{row['margin_rms']:11.2e}{row['noise']:11.2e}{row['largest']:11.2e}")
    if arguments.json:
        result = {"device": where, "torch": torch.__version__, "command": sys.argv, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def measure(trainer: Trainer, changes: list[float], pairs: int, precision: str) -> list[dict]:
    """Measure one precision; return a row for each change of the weights."""
    batches = list(first(trainer, pairs))
    base = copy.deepcopy(trainer.unet).float()  # use the masters' values, which are not rounded
    for weight, master in zip(base.parameters(), trainer.masters.masters, strict=True):
        weight.copy_(master)
    rows = []
    for change in changes:
        policy = changed(base, change)
        for weight, new in zip(trainer.unet.parameters(), policy.parameters(), strict=True):
            weight.copy_(new)  # rounded to the compute dtype, as the optimizer does
        policy.double()
        truth_reference = copy.deepcopy(base).double()
        margins, truths = [], []
        for batch in batches:
            latents, conditioning = trainer.encode(batch)
            predictions = trainer.predict(batch, latents, conditioning)
            margins.append(trainer.loss(predictions, batch).margin)
            truths.append(exact(trainer, policy, truth_reference, latents, conditioning, batch))
        margin, truth = torch.cat(margins).double()[:pairs], torch.cat(truths)[:pairs]
        difference = margin - truth
        rows.append(
            {
                "change": change,
                "precision": precision,
                "margin_rms": truth.square().mean().sqrt().item(),
                "noise": difference.std().item(),
                "largest": difference.abs().max().item(),
            }
        )
    return rows


def first(trainer: Trainer, pairs: int) -> Iterator[Batch]:
    seen = 0
    while seen < pairs:
        batch = next(trainer.run.batches).to(trainer.ranks.device)
        seen += len(batch.pair_id)
        yield batch


def changed(base: nn.Module, change: float) -> nn.Module:
    """Return a copy of the module with every weight multiplied by 1 + change x normal noise."""
    generator = torch.Generator().manual_seed(1)
    policy = copy.deepcopy(base)
    for weight in policy.parameters():
        weight.mul_(1 + change * torch.randn(weight.shape, generator=generator).to(weight.device))
    return policy


def exact(trainer: Trainer, policy: nn.Module, ref: nn.Module, latents: Tensor, conditioning, batch: Batch) -> Tensor:
    """Return the margins, float64 [B], on the same draws."""
    schedule = trainer.family.schedule
    noisy, target = reference.noise_pair(
        latents.double(),
        schedule.sqrt_alpha_bar[batch.timesteps],
        schedule.sqrt_one_minus_alpha_bar[batch.timesteps],
        trainer.config.seed,
        batch.pair_id,
        batch.draw,
        schedule.prediction_type,
        torch.float64,
    )
    errors = []
    for unet in (policy, ref):
        prediction = trainer.family.denoise(unet, noisy, batch.timesteps, conditioning)
        wanted = target.double().repeat(len(prediction) // len(target), 1, 1, 1)
        errors.append((prediction - wanted).square().mean((1, 2, 3)).view(2, -1))
    delta = errors[0] - errors[1]
    return -trainer.config.beta_dpo / 2 * (delta[0] - delta[1])


if __name__ == "__main__":
    main()
