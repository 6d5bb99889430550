"""Images with a colour profile come out as sRGB; those without one, or with sRGB's own, keep their numbers."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from dpo_fast.data import colour
from dpo_fast.data.images import RULE, decode
from tests.helpers.pairs import as_file

D50 = (0.9642, 1.0, 0.8249)
# Columns: the XYZ (D50) of red, green and blue, as the published profiles have them.
P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
PURPLE = (200, 100, 150)


def _fixed(values) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def icc(space: str, tags: dict[str, bytes]) -> bytes:
    """A profile of version 2 (ICC.1:2001-04): header, table of tags, tags."""
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(79), "wtpt": _xyz(D50), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"mntr", space.ljust(4).encode(), b"XYZ "
    )
    return ((head + bytes(12) + b"acsp").ljust(68, b"\0") + _fixed(D50)).ljust(128, b"\0") + table + body


def rgb(primaries: np.ndarray, gamma: float) -> bytes:
    columns = dict(zip(("rXYZ", "gXYZ", "bXYZ"), map(_xyz, primaries.T), strict=True))
    return icc("RGB", columns | dict.fromkeys(("rTRC", "gTRC", "bTRC"), _curve(gamma)))


def grey(gamma: float) -> bytes:
    return icc("GRAY", {"kTRC": _curve(gamma)})


WIDE = rgb(P3, 2.2)


def in_srgb(values, primaries: np.ndarray, gamma: float) -> np.ndarray:
    """The numbers of IEC 61966-2-1 for a colour of an RGB space."""
    light = np.linalg.inv(SRGB) @ primaries @ (np.asarray(values) / 255) ** gamma
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pixel(image: Image.Image, kind: str = "PNG", **options) -> tuple[int, int, int]:
    return decode(as_file(image, kind, **options)).getpixel((0, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colour_", [PURPLE, (10, 200, 30), (255, 255, 255), (0, 0, 0)])
def test_a_profile_of_other_primaries_is_applied(kind, colour_):
    image, options = Image.new("RGB", (16, 16), colour_), {"lossless": True} if kind == "WEBP" else {}
    expected = in_srgb(colour_, P3, 2.2)
    assert np.abs(pixel(image, kind, icc_profile=WIDE, **options) - expected).max() <= 1.5
    assert pixel(image, kind, **options) == colour_


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_other_forms_of_rgb(mode):
    image = Image.new("RGB", (4, 4), PURPLE)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    assert np.abs(pixel(image, icc_profile=WIDE) - in_srgb(PURPLE, P3, 2.2)).max() <= 1.5


def test_transparency_is_laid_over_white_after_the_conversion():
    seen = np.array(pixel(Image.new("RGB", (4, 4), PURPLE), icc_profile=WIDE))
    half = pixel(Image.new("RGBA", (4, 4), (*PURPLE, 128)), icc_profile=WIDE)
    assert np.abs(half - (seen * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey(mode):
    """Linear light of 128/255 is 188 in sRGB."""
    image = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)) if mode == "I;16" else Image.new("L", (4, 4), 128)
    if mode == "LA":
        image.putalpha(255)
    assert np.abs(np.subtract(pixel(image, icc_profile=grey(1.0)), 188)).max() <= 1


def test_rotation_keeps_the_profile():
    exif = Image.Exif()
    exif[274] = 6
    image = decode(as_file(Image.new("RGB", (8, 4), PURPLE), "PNG", exif=exif, icc_profile=WIDE))
    assert image.size == (4, 8) and np.abs(image.getpixel((0, 0)) - in_srgb(PURPLE, P3, 2.2)).max() <= 1.5


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("RGB", b"not a profile"), ("RGB", WIDE[:200]), ("RGB", grey(1.0)), ("L", WIDE), ("1", WIDE), ("RGB", b"")],
    ids=["text", "cut", "grey for RGB", "RGB for grey", "RGB for bits", "empty"],
)
def test_a_profile_that_cannot_be_applied_is_ignored(mode, profile):
    image = Image.new(mode, (4, 4), {"RGB": PURPLE, "L": 77, "1": 1}[mode])
    assert pixel(image, icc_profile=profile) == image.convert("RGB").getpixel((0, 0))


def test_srgb_itself_changes_no_pixel():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for channels in (values, np.dstack([values, values[..., 0]])):
        image = Image.fromarray(channels)
        with_profile, without = (decode(as_file(image, "PNG", **o)) for o in ({"icc_profile": profile}, {}))
        assert np.array_equal(with_profile, without)


def test_a_plain_gamma_is_not_srgb():
    """The curves differ by up to 6 in the shadows, which is no rounding."""
    assert colour._transform(rgb(SRGB, 2.2), "RGB") is not None


def test_cmyk_without_a_profile_is_as_before():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel(image, "TIFF") == image.convert("RGB").getpixel((0, 0))
    assert pixel(image, "TIFF", icc_profile=WIDE) == image.convert("RGB").getpixel((0, 0))


def test_threads_share_a_transform():
    values = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    data = [as_file(Image.fromarray(np.roll(values, k, 0)), "PNG", icc_profile=WIDE) for k in range(16)]
    alone = [np.array(decode(one)) for one in data]
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(a, b) for a, b in zip(alone, pool.map(decode, data), strict=True))


def test_the_rule_of_the_cache_names_it():
    assert "sRGB" in RULE
