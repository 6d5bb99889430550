"""What is known of an encoded image before it is decoded."""

from typing import NamedTuple

# Bytes a pixel of the peak of decoding to RGB, decoder and result together, as benchmarks/bombs.py measures it.
OPENED = 8  # the decoded image, and its copy that is converted or turned


class Refused(ValueError):
    """An image that is not decoded at all, and why."""


class Header(NamedTuple):
    """What a file is before it is decoded."""

    format: str  # as PIL calls it
    width: int  # pixels, as stored
    height: int
    bytes: int  # of memory at the peak of decoding
    coefficients: int  # bytes of these that draft decoding does not save: a JPEG's that comes in several scans
    orientation: int  # EXIF's, 1 to 8; 1 also where PIL itself reads it (TIFF, AVIF)
    data: bytes  # what PIL is given


def up(length: int, step: int) -> int:
    """length / step, rounded up."""
    return -(-length // step)
