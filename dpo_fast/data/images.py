"""One encoded image to pixels: decode whatever people really store, refuse by name what cannot be a training image."""

import hashlib
import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

from dpo_fast.data.colour import to_srgb

# Only codecs that are data: PIL would hand EPS to Ghostscript, and the exotic ones are where decoders break.
# Not every PIL is built with every one, and Image.open fails on a name that it does not know.
Image.init()
FORMATS = [f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000") if f in Image.OPEN]

SAME = "is the same image as the other one"

KEY_BYTES = 16  # of the name of an image, or of whatever else is named by a hash of its contents

# How an encoded image becomes what the VAE sees, in words: part of what identifies a cached latent. A change of
# `decode`, `resize` or `crop_corner` that changes pixels must change this line.
RULE = (
    "upright, in sRGB, over white; shorter side to the resolution, bilinear with antialiasing;"
    " mirrored before a centre crop"
)

# PIL warns above its pixel limit and refuses above twice that; `decode` refuses at the limit, so the warning is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """One image that cannot be used: the reason, and the column where the caller knew it."""

    def __init__(self, reason: str, column: str = ""):
        super().__init__(f"{column} {reason}" if column else reason)
        self.reason = reason
        self.column = column


def image_key(data: bytes) -> bytes:
    """The name of an image, whatever data set holds it: KEY_BYTES, a hash of its encoded bytes."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def decode(data: bytes) -> Image.Image:
    """Encoded bytes to an upright sRGB image, 8 bits a channel: what its author saw.

    EXIF rotation is applied, then an embedded colour profile (see `colour`), then transparency is laid over white (its
    values mix as they are, as in browsers). Palettes, grey and CMYK become RGB; of 16 bits the upper 8 stay, rounded.

    Raises BadImage for what is not an image, is truncated, is animated, or has more pixels than PIL's limit.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height)
        # A camera's MPO is a JPEG with further views behind the photograph, which is the first frame.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise BadImage(f"is animated or has several pages ({image.format}, {image.n_frames} frames)")
        profile = image.info.get("icc_profile")
        return _to_rgb(ImageOps.exif_transpose(image), profile)
    except BadImage:
        raise
    except Exception as error:  # decoders fed a broken file raise nearly anything, and one file must not end a run
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Scale so that the shorter side is `resolution` (bilinear with antialiasing; the longer side rounds down)."""
    short = min(image.size)
    size = tuple(resolution if side == short else resolution * side // short for side in image.size)
    _check_size(*size)  # a strip of 1 x 60000 pixels is small until its shorter side becomes 1024
    return image.resize(size, Image.Resampling.BILINEAR)


def scaled(data: bytes, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """Encoded bytes to an upright image whose shorter side is `resolution`, and its true (height, width)."""
    image = decode(data)
    return resize(image, resolution), (image.height, image.width)


def mirror(image: Image.Image) -> Image.Image:
    """Left and right exchanged. Before the crop, so that `left` is where the crop lies in what the model sees."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def crop_corner(size: tuple[int, int], resolution: int, where: tuple[float, float] | None) -> tuple[int, int]:
    """(top, left) of a square of side `resolution` in an image of `size` (width, height).

    `where` holds two uniforms in (0, 1] for top and left, the same for both images of a pair, and every position is
    equally likely; None is the center.
    """
    spare = (size[1] - resolution, size[0] - resolution)
    if where is None:
        return round(spare[0] / 2), round(spare[1] / 2)
    return math.ceil(where[0] * (spare[0] + 1)) - 1, math.ceil(where[1] * (spare[1] + 1)) - 1


def to_pixels(image: Image.Image, top: int, left: int, resolution: int) -> torch.Tensor:
    """The square at (top, left) of an RGB image as uint8 [3, resolution, resolution]."""
    square = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise BadImage(f"is too large ({width} x {height} pixels; the limit is {limit} pixels)")


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        colours = image.convert("L" if grey else "RGB") if profile else image  # all channels are equal where grey
        if profile and (converted := to_srgb(colours, profile)) is not colours:
            converted.putalpha(image.getchannel("A"))
            image = converted
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if profile:
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode not in ("L", "CMYK"):
            image = image.convert("RGB")
        image = to_srgb(image, profile)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (PIL's modes I;16 and, where it widens PNGs, I): PIL's own convert would clip it to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"has integer pixels outside 16 bits ({values.min()} to {values.max()})")
    if (transparent := image.info.get("transparency")) is not None:
        values[values == transparent] = 65535
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
