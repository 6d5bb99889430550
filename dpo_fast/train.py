"""`python -m dpo_fast.train`: align a model with preference pairs. `--help` lists every flag.

Exit status: 0 done, 2 input that cannot be used (one line on stderr), 130 interrupted with the state saved, 1 a fault
of ours (with a traceback).
"""

import errno
import logging
import os
import sys
from typing import TYPE_CHECKING

from dpo_fast.config import TrainConfig, parse
from dpo_fast.errors import BadInput

if TYPE_CHECKING:
    from dpo_fast.evaluation.compare import Evaluation
    from dpo_fast.parallel import Ranks


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, notes = parse(argv)
        for note in notes:
            _say(note)
        return _run(config, argv)
    except BadInput as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _refuse(
            f"{error.strerror}{where}: nothing half-written is left; make room or name another --output_dir, then go on"
            " with --resume_from_checkpoint latest"
        )
    except KeyboardInterrupt:
        _say("interrupted at once; checkpoints saved before are whole")
        return 130


def _run(config: TrainConfig, argv: list[str]) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    if config.dry_run:
        from dpo_fast.plan import plan

        print(plan(config))
        return 0

    import torch

    from dpo_fast import parallel
    from dpo_fast.opening import open_run
    from dpo_fast.trainer import Interrupted, Trainer

    _show_log()
    evaluation = None
    if config.eval_scorers:
        from dpo_fast.evaluation.compare import Evaluation

        evaluation = Evaluation(config)  # scorers and prompts are checked before the training
    ranks = parallel.start(config.report_to)
    try:
        run = open_run(config, ranks)
        Trainer(run, argv).run()
        if evaluation is not None:
            config = run.config
            del run  # its memory is wanted
            _evaluate(evaluation, config, ranks)
    except Interrupted as stop:
        _say(str(stop))
        return 130
    except torch.OutOfMemoryError as error:
        return _refuse(
            f"out of GPU memory ({str(error).split('.')[0]}); lower --train_batch_size (with --pairs_per_step the"
            " result stays the same), or add --gradient_checkpointing, or --mixed_precision bf16, or --tuning lora",
            any_rank=True,
        )
    finally:
        ranks.close()
    return 0


def _evaluate(evaluation: "Evaluation", config: TrainConfig, ranks: "Ranks") -> None:
    """Compare the result with its base and print what came of the run."""
    from dpo_fast.evaluation.compare import add_to_summary

    comparison = evaluation.compare(config, ranks)
    if comparison is None:  # not the main rank
        return
    summary = add_to_summary(config.output_dir, comparison)
    print(
        f"\n{comparison.images} images of {comparison.prompts} prompts, the same seeds for base and policy:\n"
        f"{comparison}\n"
        f"loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, implicit accuracy {_or_none(summary)},"
        f" training {summary['seconds']:.0f} s, evaluation {comparison.seconds:.0f} s\n"
        f"before over after: {config.output_dir / 'samples.png'}",
        flush=True,
    )


def _or_none(summary: dict) -> str:
    value = summary["implicit_accuracy"]
    return "none" if value is None else f"{value:.3f}"


def _show_log() -> None:
    """Let what the package logs (which kernels run, for one) be seen on the main rank."""
    logger = logging.getLogger("dpo_fast")
    if os.environ.get("RANK", "0") == "0" and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("dpo_fast: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _refuse(message: str, any_rank: bool = False) -> int:
    _say("error: " + " ".join(message.split()), any_rank)
    return 2


def _say(message: str, any_rank: bool = False) -> None:
    """Print a line; of what all ranks come to know, the main rank's is enough."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or any_rank:
        where = "dpo_fast" if rank == "0" else f"dpo_fast, rank {rank}"
        print(f"{where}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
