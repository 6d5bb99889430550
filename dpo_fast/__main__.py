"""`python -m dpo_fast` and the script `dpo-fast`: list the commands, and run one.

`dpo-fast train FLAGS` is `python -m dpo_fast.train FLAGS`. Exit status: that of the command; 2 for an unknown one.
"""

import difflib
import sys
from importlib import import_module
from typing import NoReturn

from dpo_fast.cli import guarded, leave
from dpo_fast.errors import BadInput

# Name -> what it does, in one line. The module dpo_fast.NAME has `main(argv)`, which returns the exit status.
COMMANDS = {
    "train": "align a model with preference pairs, from a preset or your own flags",
    "cache": "encode images and captions ahead of training, and look after what is kept",
    "generate": "images of the same prompts and noise from a policy and its base",
    "evaluate": "compare a policy with its base: scores, win rates, a page to look at",
    "pick": "the checkpoint of a run, and the strength of what it trained, that score best",
    "compare": "runs, sweeps and evaluations in one table, with intervals, image by image",
    "relabel": "preference pairs labelled by scorers instead of people",
    "vote": "people compare images blindly on a page; win rates with intervals from their votes",
    "sweep": "a training run for every combination of values of some flags",
    "env": "versions, devices and what can run on this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return import_module(f"dpo_fast.{argv[0]}").main(argv[1:])
    return guarded(lambda: _list(argv), argv=argv, kept="nothing was begun", go_on="start the same command again")


def _list(argv: list[str]) -> int:
    """List the commands. Raises BadInput for anything but a request for that."""
    unknown = next((word for word in argv if word not in ("-h", "--help", "help")), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else "the commands are " + ", ".join(COMMANDS)
        raise BadInput(f"there is no command {unknown!r:.80}: {meant}")
    width = max(map(len, COMMANDS))
    print("usage: dpo-fast COMMAND [--FLAG VALUE ...], or python -m dpo_fast.COMMAND [--FLAG VALUE ...]\n")
    for name, what in COMMANDS.items():
        print(f"  {name.ljust(width)}  {what}")
    print("\n`dpo-fast COMMAND --help` lists the flags of a command. From Python: import dpo_fast (docs/python.md).")
    return 0


def script() -> NoReturn:
    """Run the process's command line and end the process: the script `dpo-fast`."""
    leave(main())


if __name__ == "__main__":
    script()
