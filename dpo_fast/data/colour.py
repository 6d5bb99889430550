"""Convert pixels with an embedded colour profile to sRGB, which models are trained on and displays expect.

A profile is applied by LittleCMS, relative colorimetric with black point compensation, if it is for the image's own
colour space: RGB (palettes too), grey or CMYK. As in browsers, a profile that cannot be read or is for another colour
space is ignored, and an image without one is assumed to be sRGB. A profile that is sRGB up to rounding changes no
pixel. PNG's gAMA and cHRM chunks are not applied.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

LARGEST = 4 << 20  # bytes of a profile; those of printing presses reach about three million
TOLERANCE = 2  # of 255: the tables of common sRGB profiles differ by up to this much

# The colour space of a profile -> the PIL mode of the images that it applies to.
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of mode RGB, L or CMYK to sRGB: to mode RGB if its ICC `profile` applies, else unchanged."""
    transform = _transform(profile, image.mode) if profile else None
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from `profile` to sRGB, or None to leave the pixels unchanged. It keeps no state between calls, so
    any thread may use it."""
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", renderingIntent=intent, flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    samples = _samples(mode)
    as_it_is = np.asarray(samples.convert("RGB")).astype(int)
    return None if np.abs(np.asarray(transform.apply(samples)) - as_it_is).max() <= TOLERANCE else transform


def _samples(mode: str) -> Image.Image:
    """An image of every grey level, and for RGB also of a lattice of 16^3 colours."""
    grey = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(grey[None])
    lattice = np.stack(np.meshgrid(*[grey[::17]] * 3, indexing="ij"), -1).reshape(-1, 3)
    return Image.fromarray(np.concatenate([np.repeat(grey[:, None], 3, 1), lattice])[None])
