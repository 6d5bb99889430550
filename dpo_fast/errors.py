"""What the user can mend: one exception, and a disk's errors. Doors turn them into one line and exit status 2."""

import errno

# What a disk answers that is full or may not be written: for the user to mend, no fault of ours.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class BadInput(ValueError):
    """Input that cannot be used. The message carries the value and the remedy."""


class Unresponsive(RuntimeError):
    """What a command waited for is dead or never answers: a worker process, another rank, a disk.

    Commands turn it into one line and exit status 1.
    """


def missing_extra(package: str, extra: str, needed_for: str) -> BadInput:
    """The error for an optional package that is not installed, naming the extra that brings it."""
    return BadInput(
        f"{needed_for} needs the package {package!r}, which is not installed: pip install 'dpo_fast[{extra}]'"
    )
