"""What all doors share: what went wrong as one line and an exit status, and what is said on stderr.

Exit status: 0 done, 2 input that cannot be used (one line on stderr), 130 interrupted, 1 a fault of ours (with a
traceback).
"""

import logging
import os
import sys
from collections.abc import Callable

from dpo_fast.errors import BadInput, disk_error, remedy


def guarded(work: Callable[[], int], *, kept: str, go_on: str) -> int:
    """The exit status of `work`, or of what it raised, said in one line.

    kept: what an interruption leaves. go_on: what to do once the disk can be written again.
    """
    try:
        return work()
    except BadInput as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        say(f"interrupted at once; {kept}")
        return 130
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        where = f" ({' -> '.join(str(name) for name in (found.filename, found.filename2) if name)})"
        reason = found.strerror + where * bool(found.filename)
        return refuse(f"{reason}: nothing half-written is left; {remedy(found)}, then {go_on}")


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
