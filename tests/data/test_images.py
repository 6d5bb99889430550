"""Every kind of image file that people really have, and the crop's arithmetic."""

import runpy

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast.data import images
from dpo_fast.data.images import BadImage, crop_corner, decode, resize, to_pixels
from tests.helpers.pairs import as_file, encoded

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(left=RED, right=BLUE, size=(8, 4), mode="RGB") -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG2000", "MPO"])
def test_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode(as_file(halves(size=(64, 32)), kind, **options))
    assert image.mode == "RGB" and image.size == (64, 32)
    assert np.abs(np.subtract(image.getpixel((4, 8)), RED)).max() <= 2
    assert np.abs(np.subtract(image.getpixel((60, 8)), BLUE)).max() <= 2


def test_a_pil_without_a_codec_reads_the_others(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    fresh = runpy.run_path(images.__file__)
    assert fresh["decode"](as_file(halves(), "BMP")).size == (8, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = halves(size=(64, 32))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(np.array(decode(as_file(stored, "PNG", exif=exif))), np.array(upright))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = decode(as_file(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind))
    assert image.mode == "RGB" and np.abs(np.subtract(image.getpixel((8, 8)), RED)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(kind):
    values = np.array([[0, 257 * 100, 65535, 257 * 255 // 2]], dtype=np.uint16)
    pixels = np.array(decode(as_file(Image.fromarray(values), kind)))[0]
    assert pixels.tolist() == [[0] * 3, [100] * 3, [255] * 3, [127] * 3]


def test_16_bit_grey_transparency_is_white():
    values = np.array([[0, 1000, 65535]], dtype=np.uint16)
    data = as_file(Image.fromarray(values), "PNG", transparency=0)
    assert np.array(decode(data))[0, :, 0].tolist() == [255, 4, 255]


def test_wider_integers_and_floats_are_refused_by_name():
    with pytest.raises(BadImage, match="outside 16 bits"):
        decode(as_file(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))
    with pytest.raises(BadImage, match="floating-point"):
        decode(as_file(Image.fromarray(np.array([[0.5]], dtype=np.float32)), "TIFF"))


def test_palette():
    assert decode(as_file(halves().quantize(4), "PNG")).getpixel((0, 0)) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L", "1"])
def test_transparency_is_laid_over_white(mode):
    """The left half is transparent, the right half black."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (4, 0, 8, 4))
    if mode in ("RGBA", "LA"):
        image = Image.new(mode[:-1], (8, 4), 0)
        image.putalpha(alpha)
        data = as_file(image, "PNG")
    elif mode == "PA":
        image = Image.new("RGB", (8, 4), 0)
        image.putalpha(alpha)
        data = as_file(image.quantize(4), "PNG")  # a palette with alpha values
    elif mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(0, (4, 0, 8, 4))
        data = as_file(image, "GIF", transparency=1)
    elif mode == "RGB":
        data = as_file(halves(RED, (0, 0, 0)), "PNG", transparency=RED)
    elif mode == "L":
        data = as_file(halves(9, 0, mode="L"), "PNG", transparency=9)
    else:
        data = as_file(halves(1, 0, mode="1"), "PNG", transparency=1)
    image = decode(data)
    assert image.getpixel((1, 1)) == WHITE and image.getpixel((6, 1)) == (0, 0, 0)


def test_half_transparency_blends():
    assert decode(as_file(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused_by_name(kind):
    data = as_file(halves(), kind, save_all=True, append_images=[halves(BLUE, RED)])
    with pytest.raises(BadImage, match=rf"animated.*{kind}, 2 frames"):
        decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_by_name(monkeypatch):
    data = as_file(Image.new("L", (100, 50)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert decode(data).size == (100, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    with pytest.raises(BadImage, match=r"too large \(100 x 50 pixels"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL itself raises above twice the limit
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(data)


def test_a_thin_strip_does_not_become_a_giant():
    image = Image.new("RGB", (60000, 1))
    with pytest.raises(BadImage, match="too large"):
        resize(image, 64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"P6 1 1 255 \x00\x00\x00",  # PIL would read it; only the listed formats are wanted
        encoded(np.random.default_rng(0), 64)[:700],
        encoded(np.random.default_rng(0), 64, "PNG")[:300],
        encoded(np.random.default_rng(0), 64, "WEBP")[:100],
    ],
    ids=["empty", "text", "svg", "ppm", "cut JPEG", "cut PNG", "cut WebP"],
)
def test_broken_files_are_bad_images(data):
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode(data)


@pytest.mark.filterwarnings("ignore")  # PIL remarks on broken TIFF tags
def test_a_fuzzed_file_is_an_image_or_a_bad_image(seed):
    random = np.random.default_rng(seed)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(random, 16, kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[random.integers(0, len(broken), 6)] = random.integers(0, 256, 6)
            try:
                assert decode(broken.tobytes()).mode == "RGB"
            except BadImage:
                pass


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (333, 777), (64, 67), (31, 17), (1, 1)])
@pytest.mark.parametrize("resolution", [8, 64])
def test_resize_and_center_crop_as_the_public_scripts(size, resolution, seed):
    """torchvision's Resize(int) and CenterCrop on PIL images, written out from their documentation."""
    image = decode(encoded(np.random.default_rng(seed), size, "PNG"))
    short, long = sorted(size)
    scaled = (resolution, int(resolution * long / short))
    scaled = scaled if size[0] <= size[1] else scaled[::-1]
    expected = image.resize(scaled, Image.Resampling.BILINEAR)
    top, left = (round((side - resolution) / 2.0) for side in reversed(scaled))
    expected = np.array(expected)[top : top + resolution, left : left + resolution]

    ours = resize(image, resolution)
    pixels = to_pixels(ours, *crop_corner(ours.size, resolution, None), resolution)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, resolution, resolution) and pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_random_corners_cover_the_free_range_evenly():
    uniforms = (np.arange(1 << 12) + 1) / (1 << 12)  # (0, 1]
    lefts = np.array([crop_corner((67, 64), 64, (1.0, u))[1] for u in uniforms])
    assert np.bincount(lefts).tolist() == [1024] * 4
    assert crop_corner((67, 64), 64, (2.0**-24, 2.0**-24)) == (0, 0)
    assert crop_corner((64, 70), 64, (1.0, 1.0)) == (6, 0)


def test_pixels_are_a_copy_of_their_own():
    pixels = to_pixels(decode(as_file(halves(), "PNG")), 0, 0, 4)
    pixels += 1  # numpy hands out read-only views of PIL memory; a batch must be writable
    assert pixels[0, 0, 0] == 0


def test_reason_knows_its_column():
    assert str(BadImage("is missing", "jpg_0")) == "jpg_0 is missing" and str(BadImage("is missing")) == "is missing"
