"""Turn an encoded image into pixels: decode what people really store, refuse with a reason what cannot be used."""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable
from typing import IO, NamedTuple, NewType, TypeVar

import numpy as np
import torch
from PIL import Image

from dpo_fast.data import colour
from dpo_fast.data.budget import IN_FLIGHT, Budget
from dpo_fast.data.header import Header, Refused
from dpo_fast.data.headers import PNG, orientation_of_exif, orientation_of_xmp, read_header
from dpo_fast.store import KEY_BYTES

T = TypeVar("T")

# Only formats that hold no code: PIL would hand EPS to Ghostscript, and decoders of exotic formats are fragile.
# Not every PIL build has all of these, and Image.open fails on a format that it does not know.
Image.init()
FORMATS = [f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000") if f in Image.OPEN]

SAME = "is the same image as the other one"


# How an encoded image becomes the VAE's input, in words: part of the cache key of latents. Any change to `decode`,
# `resize` or `crop_corner` that changes pixels must change this text.
RULE = (
    "upright, in sRGB, over white; shorter side to the resolution, bilinear with antialiasing; a JPEG from its half,"
    " quarter or eighth as long as that is four times as large; the first frame; mirrored before a centre crop"
)
DRAFT = 4  # a JPEG's shorter side is decoded to at least this many times the resolution

BAND = 1 << 20  # pixels converted at a time
CONVERTING = 24  # bytes per pixel of a band

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL warns above its pixel limit and refuses above twice that; `decode` refuses at the limit before PIL looks.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An image that cannot be used, with the reason and, if the caller knows it, the column."""

    def __init__(self, reason: str, column: str = ""):
        super().__init__(f"{column} {reason}" if column else reason)
        self.reason = reason
        self.column = column


_budget = Budget.of_threads()


def share(budget: Budget) -> None:
    """Make all threads of this process decode within `budget` from now on."""
    global _budget
    _budget = budget


# What the parent's threads hold at a fork is held by no thread of the child.
os.register_at_fork(after_in_child=lambda: share(Budget.of_threads()))


class TooThin(BadImage):
    """An image that decodes, but whose shorter side cannot be enlarged to the resolution."""


ImageKey = NewType("ImageKey", bytes)  # KEY_BYTES long

# A row's two images in the order of its columns, as encoded bytes or as keys; a BadImage says why one is missing.
Encoded = tuple[bytes | BadImage, bytes | BadImage]
Keys = tuple[ImageKey | BadImage, ImageKey | BadImage]


def image_key(data: bytes) -> ImageKey:
    """Return the key of an image, the same in every data set: a hash of its encoded bytes."""
    return ImageKey(hashlib.blake2b(data, digest_size=KEY_BYTES).digest())


def decode(data: bytes) -> Image.Image:
    """Decode bytes to an upright sRGB image with 8 bits per channel: what its author saw.

    EXIF rotation and an embedded colour profile (see `colour`) are applied, and transparency is blended over white (in
    sRGB values, as in browsers). Palettes, grey and CMYK become RGB; 16 bits are rounded to 8. Of an animation the
    first frame is decoded, of a TIFF the first page.

    All threads together decode within a `Budget`, waiting for it as needed. Raises BadImage for data that is not an
    image, is truncated, has more pixels than PIL's limit, needs more memory than the budget, or would cost far
    more than its size suggests.
    """
    return _within_budget(data, None, lambda upright: upright.image)


def decoded_bytes(data: bytes) -> int:
    """Return the bytes of the uint8 RGB pixels of `decode`, by the file's header; 0 if `decode` refuses the header."""
    try:
        header = read_header(data)
        _check_size(header.width, header.height)
    except (Refused, BadImage, ValueError):
        return 0
    return 3 * header.width * header.height


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Scale so that the shorter side is `resolution` (bilinear with antialiasing; the longer side rounds down).

    Raises TooThin if the result would have more pixels than PIL's limit.
    """
    return _resize(_Upright(image, image.size, None), resolution)


def scaled(data: bytes, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode bytes to an upright image whose shorter side is `resolution`; return it and its true (height, width).

    Like `decode` and `resize`, but a JPEG that is much larger is not decoded at full size (`DRAFT`).
    """
    return _within_budget(data, resolution, lambda upright: (_resize(upright, resolution), upright.true[::-1]))


class _Upright(NamedTuple):
    """An upright RGB image, perhaps decoded at a reduced size."""

    image: Image.Image
    true: tuple[int, int]  # width, height at full size
    box: tuple[float, float, float, float] | None  # the part of `image` that holds the picture; None: all of it


def _within_budget(data: bytes, resolution: int | None, use: Callable[[_Upright], T]) -> T:
    """Return `use` of the decoded image, which may have a reduced size if `resolution` is given.

    Everything that `use` does not return is freed before another thread continues.
    """
    try:
        header = read_header(data)
        _check_size(header.width, header.height)
    except (Refused, ValueError) as error:
        raise _bad(error) from error
    part = _part(header, resolution)
    size = header.coefficients + -(-(header.bytes - header.coefficients) // part**2)
    size += CONVERTING * min(BAND, header.width * header.height)
    if size > IN_FLIGHT:
        raise BadImage(
            f"is too large (decoding {header.width} x {header.height} pixels of {header.format} takes"
            f" {size >> 20} MiB; the limit is {IN_FLIGHT >> 20} MiB)"
        )
    with _budget.held(size):
        try:
            image = _open(header, part)
        except Exception as error:  # decoders fed a broken file raise nearly anything; one file must not end a run
            raise _bad(error) from error
        used = use(_upright(image, header, part))
        del image
    return used


def _upright(image: Image.Image, header: Header, part: int) -> _Upright:
    if part == 1:
        return _Upright(image, image.size, None)
    # A side that `part` does not divide is rounded up; the excess follows the last pixels in stored order.
    true = (header.width, header.height) if header.orientation < 5 else (header.height, header.width)
    width, height = (side / part for side in true)
    left = image.width - width if header.orientation in (2, 3, 6, 7) else 0
    top = image.height - height if header.orientation in (3, 4, 7, 8) else 0
    return _Upright(image, true, (left, top, left + width, top + height))


def _bad(error: Exception) -> BadImage:
    if isinstance(error, BadImage):
        return error
    if isinstance(error, Refused):
        return BadImage(str(error))
    return BadImage(f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _part(header: Header, resolution: int | None) -> int:
    """Return the factor (1, 2, 4 or 8) by which a JPEG is reduced when it is decoded."""
    if resolution is None or header.format != "JPEG":
        return 1
    short = min(header.width, header.height)
    return next(part for part in (8, 4, 2, 1) if part == 1 or short >= part * DRAFT * resolution)


def _open(header: Header, part: int) -> Image.Image:
    if header.format not in FORMATS:
        raise BadImage(f"cannot be decoded: this Pillow reads no {header.format}")
    image = Image.open(io.BytesIO(header.data), formats=[header.format])
    if image.width * image.height > header.width * header.height:
        raise Refused("has two headers that disagree on its size")
    profile = image.info.get("icc_profile")
    if profile and len(profile) > colour.LARGEST:
        raise Refused(f"has a colour profile of {len(profile)} bytes; the limit is {colour.LARGEST}")
    orientation = header.orientation
    if header.format == "AVIF":
        exif, xmp = (image.info.get(name) or b"" for name in ("exif", "xmp"))
        orientation = orientation_of_exif(exif) or orientation_of_xmp(xmp) or 1
    if part > 1:
        image.draft(None, (header.width // part, header.height // part))
    image.load()
    image = _to_rgb(image, profile)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def texts_of(file: IO[bytes]) -> dict[str, str]:
    """Return the texts before a PNG's pixels, none for any other file. Raises what PIL raises for a broken one."""
    if file.read(len(PNG)) != PNG:
        return {}
    file.seek(0)
    with Image.open(file, formats=["PNG"]) as image:
        return {name: text for name, text in image.info.items() if isinstance(text, str)}


def mirror(image: Image.Image) -> Image.Image:
    """Flip left to right. Done before the crop, so that `left` is the crop's position in what the model sees."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def crop_corner(size: tuple[int, int], resolution: int, where: tuple[float, float] | None) -> tuple[int, int]:
    """Return (top, left) of a square of side `resolution` in an image of `size` (width, height).

    `where` holds two uniforms in (0, 1] for top and left, the same for both images of a pair, so that every position is
    equally likely; None gives the center.
    """
    spare = (size[1] - resolution, size[0] - resolution)
    if where is None:
        return round(spare[0] / 2), round(spare[1] / 2)
    return math.ceil(where[0] * (spare[0] + 1)) - 1, math.ceil(where[1] * (spare[1] + 1)) - 1


def to_pixels(image: Image.Image, top: int, left: int, resolution: int) -> torch.Tensor:
    """The square at (top, left) of an RGB image as uint8 [3, resolution, resolution]."""
    square = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _resize(upright: _Upright, resolution: int) -> Image.Image:
    short = min(upright.true)
    size = tuple(resolution if side == short else resolution * side // short for side in upright.true)
    try:
        _check_size(*size)  # a strip of 1 x 60000 pixels is small until its shorter side becomes 1024
    except BadImage as error:
        raise TooThin(error.reason) from error
    return upright.image.resize(size, Image.Resampling.BILINEAR, box=upright.box)


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise BadImage(f"is too large ({width} x {height} pixels; the limit is {limit} pixels)")


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image to RGB in bands of rows, since a conversion makes several copies of its input."""
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is unknown")
    if image.mode == "RGB" and not profile and not image.has_transparency_data:
        return image
    rows = max(1, BAND // image.width)
    if rows >= image.height:
        return _band_to_rgb(image, profile)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_band_to_rgb(band, profile), (0, top))
    return whole


def _band_to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        colours = image.convert("L" if grey else "RGB") if profile else image  # all channels are equal where grey
        if profile and (converted := colour.to_srgb(colours, profile)) is not colours:
            converted.putalpha(image.getchannel("A"))
            image = converted
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if profile:
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode not in ("L", "CMYK"):
            image = image.convert("RGB")
        image = colour.to_srgb(image, profile)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (PIL's modes I;16 and, where it widens PNGs, I) to 8 bits; PIL would clip it to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"has integer pixels outside 16 bits ({values.min()} to {values.max()})")
    if (transparent := image.info.get("transparency")) is not None:
        values[values == transparent] = 65535
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
