"""Turn what the libraries raise for files that they cannot use into one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError

from dpo_fast.errors import BadInput, one_line

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


@contextmanager
def bad_input(what: str, advice: str) -> Iterator[None]:
    """Turn a library's error within the block into BadInput: `what`, its message in one line, `advice`.

    torch.OutOfMemoryError passes through unchanged, since the file is not to blame.
    """
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except _FAULTS as error:
        raise BadInput(f"{what}: {one_line(error).rstrip('.')}; {advice}") from error
