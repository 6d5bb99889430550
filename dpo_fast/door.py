"""What all doors share: what went wrong as one line and an exit status, and what is said on stderr.

Exit status: 0 done, 2 input that cannot be used (one line on stderr), 130 interrupted, 1 a fault of ours (with a
traceback).
"""

import logging
import os
import sys
from collections.abc import Callable

from dpo_fast.errors import DISK_ERRORS, BadInput


def guarded(work: Callable[[], int], *, kept: str, go_on: str) -> int:
    """The exit status of `work`, or of what it raised, said in one line.

    kept: what an interruption leaves. go_on: what to do about a disk that is full or cannot be written.
    """
    try:
        return work()
    except BadInput as error:
        return refuse(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return refuse(f"{error.strerror}{where}: nothing half-written is left; {go_on}")
    except KeyboardInterrupt:
        say(f"interrupted at once; {kept}")
        return 130


def refuse(message: str, any_rank: bool = False) -> int:
    """Say in one line what cannot be used; the exit status for it."""
    say("error: " + " ".join(message.split()), any_rank)
    return 2


def say(message: str, any_rank: bool = False) -> None:
    """Print a line; of what all ranks come to know, the main rank's is enough."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or any_rank:
        where = "dpo_fast" if rank == "0" else f"dpo_fast, rank {rank}"
        print(f"{where}: {message}", file=sys.stderr, flush=True)


def show_log() -> None:
    """Let what the package logs (which kernels run, for one) be seen on the main rank."""
    logger = logging.getLogger("dpo_fast")
    if os.environ.get("RANK", "0") == "0" and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("dpo_fast: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
