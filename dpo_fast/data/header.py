"""What is known about an encoded image before it is decoded."""

from typing import NamedTuple

# Peak bytes per pixel of decoding to RGB, decoder and result together, as measured by benchmarks/bombs.py.
OPENED = 8  # the decoded image and its converted or rotated copy


class Refused(ValueError):
    """An image that must not be decoded; the message gives the reason."""


class Header(NamedTuple):
    """The properties of an image file that are known before it is decoded."""

    format: str  # as PIL calls it
    width: int  # pixels, as stored
    height: int
    bytes: int  # peak memory of decoding
    coefficients: int  # the part of `bytes` that draft decoding does not save, in a JPEG with several scans
    orientation: int  # EXIF's, 1 to 8; 1 also where PIL itself reads it (TIFF, AVIF)
    data: bytes  # the bytes to give to PIL


def up(length: int, step: int) -> int:
    """length / step, rounded up."""
    return -(-length // step)
