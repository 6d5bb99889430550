"""`python -m dpo_fast.train`: align a model with preference pairs. `--help` lists every flag.

Exit status: 0 done, 2 input that cannot be used (one line on stderr), 130 interrupted with the state saved, 1 an
internal error (with a traceback), or something that never answers (one line).
"""

import sys

from dpo_fast.cli import guarded, leave, say, show, show_log
from dpo_fast.command_line import parse
from dpo_fast.config import TrainConfig


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int:
        config, notes = parse(argv)
        for note in notes:
            say(note)
        return _run(config)

    return guarded(
        work,
        argv=argv,
        kept="checkpoints saved before are whole; the same command with the run's --output_dir and"
        " --resume_from_checkpoint auto goes on",
        go_on="go on with the run's --output_dir and --resume_from_checkpoint auto",
    )


def _run(config: TrainConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    from dpo_fast.api.training import dry_run, train_resolved
    from dpo_fast.training.trainer import Interrupted

    show_log()
    try:
        if config.dry_run:
            dry_run(config)
            return 0
        result = train_resolved(config)
    except Interrupted as stop:
        say(str(stop))
        return 130
    if result.findings is not None:
        show(f"\n{result}")
    return 0


if __name__ == "__main__":
    leave(main())
