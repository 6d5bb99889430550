"""`python -m dpo_fast.train`: align a model with preference pairs. `--help` lists every flag.

Exit status: 0 done, 2 input that cannot be used (one line on stderr), 130 interrupted with the state saved, 1 an
internal error (with a traceback), or something that never answers (one line).
"""

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dpo_fast.cli import guarded, leave, refuse, say, show_log
from dpo_fast.command_line import parse
from dpo_fast.config import TrainConfig

if TYPE_CHECKING:
    from dpo_fast.evaluation.prompts import Prompt
    from dpo_fast.parallel import Ranks


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int:
        config, notes = parse(argv)
        for note in notes:
            say(note)
        return _run(config, argv)

    return guarded(
        work,
        kept="checkpoints saved before are whole; the same command with the run's --output_dir and"
        " --resume_from_checkpoint auto goes on",
        go_on="go on with the run's --output_dir and --resume_from_checkpoint auto",
    )


def _run(config: TrainConfig, argv: list[str]) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import output_folder, parallel
    from dpo_fast.training.resume import AlreadyDone
    from dpo_fast.training.run import open_run, settle
    from dpo_fast.training.trainer import Interrupted, Trainer

    show_log()
    remedy = (
        "lower --train_batch_size (with --pairs_per_step the result stays the same), or add --gradient_checkpointing,"
        " or --mixed_precision bf16, or --tuning lora"
    )
    ranks, held = parallel.start(config.report_to), ExitStack()
    try:
        config, hold, prompts = settle(config, ranks), None, []
        if not config.dry_run:  # also while evaluating
            hold = ranks.on_main(lambda: held.enter_context(output_folder.hold(config.output_dir)))
        if config.eval_scorers:
            from dpo_fast.evaluation.run_evaluation import check_request

            prompts = check_request(config, ranks)
        if config.dry_run:
            from dpo_fast.training.plan import dry_run

            dry_run(config, ranks, images=config.eval_images or len(prompts))
            return 0
        run = open_run(config, ranks)
        Trainer(run, argv, hold).train()
        if config.eval_scorers:
            config = run.config
            del run  # free its memory before the evaluation loads models
            remedy = "the training is done: the same command with --resume_from_checkpoint auto --eval_batch_size 1"
            _evaluate(config, prompts, ranks)
    except AlreadyDone as done:
        say(str(done))
    except Interrupted as stop:
        say(str(stop))
        return 130
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); {remedy}", any_rank=True)
    finally:
        held.close()
        ranks.close()
    return 0


def _evaluate(config: TrainConfig, prompts: "list[Prompt]", ranks: "Ranks") -> None:
    """Compare the result with its base and print what came of the run."""
    from dpo_fast.evaluation.run_evaluation import add_to_summary, evaluate_run

    started = time.perf_counter()
    findings = evaluate_run(config, prompts, ranks)
    if findings is None:  # not the main rank
        return
    summary = add_to_summary(config.output_dir, findings, time.perf_counter() - started)
    print(
        f"\n{findings}\n\n"
        f"loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, implicit accuracy {_or_none(summary)},"
        f" training {summary['seconds']:.0f} s, evaluation {summary['evaluation_seconds']:.0f} s\n"
        f"before over after: {config.output_dir / 'samples.png'}\nreport: {config.output_dir / 'report.html'}",
        flush=True,
    )


def _or_none(summary: dict) -> str:
    value = summary["implicit_accuracy"]
    return "none" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    leave(main())
