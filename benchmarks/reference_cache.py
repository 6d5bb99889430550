"""What cached reference errors save: the same training step with the reference run online and from the cache.

    python benchmarks/reference_cache.py [--resolution 256] [--rounds 20] [--json FILE] [-- FLAGS]

Small pipelines of the real architectures with random weights. Both trainers live in one process and take their steps in
turn, so that what else the machine does falls on both. That it is the same work show the losses of the first step, and
the FLOPs, counted operator by operator. `scoring` is one draw of one pair without gradients, in the batches that the
cache is filled with. `margin rms` is what the first margins of a run from the cache are (online they are 0), `floor`
what rounding explains of it: see docs/reference_cache.md. What follows `--` goes to both runs.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # the small pipelines live with the tests

from dpo_fast import opening, parallel
from dpo_fast.config import parse
from dpo_fast.files import write_json
from dpo_fast.trainer import Trainer
from tests.helpers import pipelines
from tests.helpers.pairs import write_pickapic

PAIRS, BATCH = 64, 4
CASES = [(family, tuning) for family in ("sd15", "sdxl") for tuning in ("lora", "full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="pixels; latents are an eighth")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps each")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    where = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, torch {torch.__version__}"
    print(f"{where}; {BATCH} pairs a step at {arguments.resolution} px, median of {arguments.rounds} steps each\n")
    titles = ("online ms", "cached ms", "faster", "FLOPs", "scoring ms", "margin rms", "floor")
    print(f"{'case':12}" + "".join(f"{title:>11}" for title in titles) + "   first losses")
    rows = []
    for family, tuning in CASES:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(family, tuning, Path(folder), arguments.resolution, arguments.rounds, more)
        rows.append(row)
        cells = [f"{row['online_ms']:.1f}", f"{row['cached_ms']:.1f}", f"{row['speedup']:.2f}x"]
        cells += [f"{row['flops_ratio']:.2f}x", f"{row['scoring_ms']:.1f}"]
        cells += [f"{row['initial_margin_rms']:.2g}", f"{row['noise_floor']:.2g}"]
        losses = " ".join(f"{loss:.5f}" for loss in row["losses"])
        print(f"{row['case']:12}" + "".join(f"{cell:>11}" for cell in cells) + f"   {losses}", flush=True)
    if arguments.json:
        command = "python benchmarks/reference_cache.py " + " ".join(sys.argv[1:])
        machine = {"cpu": platform.processor() or platform.machine(), "where": where}
        write_json(arguments.json, {"command": command, "machine": machine, "rows": rows})


def measured(family: str, tuning: str, folder: Path, resolution: int, rounds: int, more: list[str]) -> dict:
    """One case: both trainers stepped in turn."""
    model = getattr(pipelines, f"make_{family}")(folder / "model")
    pairs = write_pickapic(folder / "pairs.parquet", n=PAIRS, size=resolution)
    trainers, scoring = {}, 0.0
    for name, flags in (("online", []), ("cached", ["--cached_reference", "1"])):
        words = {
            "pretrained_model_name_or_path": model,
            "dataset_name": pairs,
            "output_dir": folder / name,
            "latent_cache_dir": folder / "cache",
            "resolution": resolution,
            "train_batch_size": BATCH,
            "max_train_steps": PAIRS // BATCH,
            "tuning": tuning,
            "seed": 0,
        }
        argv = [word for key, value in words.items() for word in (f"--{key}", str(value))] + flags + more
        config = parse([*argv, "--max_train_steps", str(rounds + 3)])[0]
        with contextlib.redirect_stderr(io.StringIO()):
            run = opening.open_run(config, parallel.start("none"))
        if run.scored is not None:
            scoring = 1e3 * run.scored.seconds / run.scored.scored_now
        trainers[name] = Trainer(run, argv)
    losses, flops, times = [], [], {name: [] for name in trainers}
    for trainer in trainers.values():
        with FlopCounterMode(display=False) as counter:
            trainer.train_step()
        flops.append(counter.get_total_flops())
        losses.append(trainer.sums.read(lambda tensors: None)["loss"])
        trainer.train_step()  # warm
    for _ in range(rounds):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            trainer.train_step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    online, cached = (statistics.median(times[name]) for name in ("online", "cached"))
    return {
        "case": f"{family} {tuning}",
        "online_ms": online,
        "cached_ms": cached,
        "speedup": online / cached,
        "flops_ratio": flops[0] / flops[1],
        "scoring_ms": scoring,
        "losses": losses,
        "initial_margin_rms": trainers["cached"].run_.start.initial_margin_rms,
        "noise_floor": trainers["cached"].run_.start.noise_floor,
    }


if __name__ == "__main__":
    main()
