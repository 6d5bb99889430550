"""What the libraries raise for files they cannot use, in one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError

from dpo_fast.errors import BadInput

_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
    SingleFileComponentError,
)
_LONGEST = 300  # characters of a library's message


@contextmanager
def bad_input(what: str, advice: str) -> Iterator[None]:
    """Within the block, a library's error becomes BadInput: `what`, its message in one line, `advice`.

    Not an exhausted GPU: the file is not to blame.
    """
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except _FAULTS as error:
        message = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise BadInput(f"{what}: {message.rstrip('.')}; {advice}") from error
