"""Errors that the user can fix: one exception, and disk errors. Commands turn them into one line and exit status 2.

Also how untrusted text is shown (`printable`).
"""

import errno
import os
import re

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_OPEN_FILES = (errno.EMFILE, errno.ENFILE)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP)
_FAILING = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETXTBSY, errno.ENODEV, errno.ENXIO)

# Errors of a disk that is full, failing or not writable: for the user to fix, not internal errors.
DISK_ERRORS = (*_FULL, *FORBIDDEN, *_OPEN_FILES, *_IN_THE_WAY, *_FAILING)

# "[Errno 5] Input/output error: 'path'" of Python and pyarrow, "(os error 5)" of safetensors and tokenizers
_NUMBER = re.compile(r"(?:\berrno|\bos error) (\d+)", re.IGNORECASE)
_NAME = re.compile(r"\[Errno \d+\][^\n]*?: '([^'\n]+)'")

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")  # sets colours and weight only; libraries write it to terminals
# Characters that control a terminal, or reorder or hide text: C0 and C1 controls, direction marks and overrides, line
# separators, invisible characters, and lone surrogates. Joiners, which emoji and some scripts need, are allowed.
_UNSHOWN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


class BadInput(ValueError):
    """Input that cannot be used. The message names the value and the remedy."""


def mark_of_this_rank(error: Exception) -> None:
    """Mark an error that only this rank met, so that the command prints it here too, not only on the main rank."""
    error.of_this_rank = True


def out_of_memory(error: Exception, remedy: str) -> BadInput:
    """Return the error for a GPU whose memory does not suffice; only this rank may have met it."""
    refusal = BadInput(f"out of GPU memory ({str(error).split('.')[0]}); {remedy}")
    mark_of_this_rank(refusal)
    return refusal


class Unresponsive(RuntimeError):
    """What a command waited for is dead or never answers: a worker process, another rank, a disk.

    Commands turn it into one line and exit status 1.
    """


def printable(text: str, keep: str = "") -> str:
    """Make untrusted text safe for a terminal, a log or a picture, by escaping control characters as Python does.

    Colours are dropped. keep: control characters to leave unescaped, such as "\\n" where lines are meant.
    """
    if text.isascii() and text.isprintable():
        return text

    def escaped(character: re.Match[str]) -> str:
        return character[0] if character[0] in keep else character[0].encode("unicode_escape").decode()

    return _UNSHOWN.sub(escaped, _COLOUR.sub("", text))


def one_line(error: BaseException, longest: int = 300) -> str:
    """Return an error's message on one line of at most `longest` characters, or its type if it has no message."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def missing_extra(package: str, extra: str, needed_for: str) -> BadInput:
    """The error for an optional package that is not installed, naming the extra that installs it."""
    return BadInput(
        f"{needed_for} needs the package {package!r}, which is not installed: pip install 'dpo_fast[{extra}]'"
    )


def may_be_of_disk(error: BaseException) -> bool:
    """Whether libraries report disk errors in exceptions of this type: tokenizers use a plain Exception."""
    return isinstance(error, OSError) or type(error) is Exception or type(error).__name__ == "SafetensorError"


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the disk error that `error` is, wraps or was raised from, as an OSError with errno (and path), or None.

    Libraries report disk errors in their own ways: safetensors as SafetensorError, tokenizers as a plain Exception,
    PyTorch's loader workers and pyarrow as an OSError without errno, `datasets` as an error raised from an OSError.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        if may_be_of_disk(error) and getattr(error, "errno", None) is None:
            number, name = _NUMBER.search(str(error)), _NAME.search(str(error))
            if number is not None and int(number[1]) in DISK_ERRORS:
                return OSError(int(number[1]), os.strerror(int(number[1])), name and name[1])
        error = error.__cause__
    return None


def remedy(error: OSError) -> str:
    """Return what to do about a disk error, as an imperative clause."""
    if error.errno in _FULL:
        return "make room"
    if error.errno in FORBIDDEN:
        return "make the place writable, or name another"
    if error.errno in _OPEN_FILES:
        return "raise the limit of open files (ulimit -n) or lower --dataloader_num_workers"
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if error.errno in _IN_THE_WAY:
        return "move away what is in its place, or name another"
    return "check the disk or the network folder, or name another"
