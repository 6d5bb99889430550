"""Every kind of image file that people really have, and the crop's arithmetic."""

import io
import runpy

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from dpo_fast.data import images
from dpo_fast.data.images import BadImage, crop_corner, decode, resize, scaled, to_pixels
from tests.data.test_colour import WIDE
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


PLACES = ["JPEG", "TIFF", "WEBP", "AVIF", "JPEG with XMP", "PNG with XMP", "PNG of ImageMagick"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", PLACES)
def test_orientation_is_read_wherever_a_format_keeps_it(kind, orientation):
    kind, _, how = kind.partition(" ")
    if kind not in images.FORMATS:
        pytest.skip(f"this Pillow reads no {kind}")
    exif, options, texts = Image.Exif(), {"lossless": True} if kind == "WEBP" else {}, PngInfo()
    exif[274] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    if how == "with XMP" and kind == "JPEG":
        options["xmp"] = xmp.encode()
    elif how == "with XMP":
        texts.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    elif how:
        block = exif.tobytes()
        texts.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    else:
        options["exif"] = exif
    stored = Image.new("RGB", (48, 32), BLUE)
    stored.paste(RED, (0, 0, 24, 16))
    data = as_file(stored, kind, **options, **({"pnginfo": texts} if kind == "PNG" else {}))
    plain = Image.open(io.BytesIO(as_file(stored, kind, **{k: v for k, v in options.items() if k == "lossless"})))
    expected = plain.convert("RGB")
    if orientation > 1:
        expected = expected.transpose(images._UPRIGHT[orientation])
    assert decode(data).size == expected.size
    assert np.abs(np.asarray(decode(data)).astype(int) - np.asarray(expected)).max() <= 2
    assert scaled(data, 16)[1] == expected.size[::-1]


@pytest.mark.parametrize(
    ("size", "orientation"), [((1024, 768), 1), ((450, 2051), 1), *(((1021, 771), k) for k in range(1, 9))]
)
def test_draft_decoding_is_near_full_decoding(size, orientation, seed):
    """Of 255: a fifth on average for a kind of photograph. Sides and place are those of full decoding."""
    exif = Image.Exif()
    exif[274] = orientation
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (12, 18, 3), dtype=np.uint8))
    smooth = small.resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + random.normal(0, 4, (size[1], size[0], 3))
    data = as_file(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=92, exif=exif)
    resolution = min(size) // 9
    assert images._part(images.read_header(data), resolution) == 2
    full = decode(data)
    small, true = scaled(data, resolution)
    assert true == (full.height, full.width)
    difference = np.asarray(small).astype(int) - np.asarray(resize(full, resolution))
    assert np.abs(difference).mean() < 0.3 and np.abs(difference).max() <= 4


def test_draft_decoding_begins_where_four_times_the_resolution_is_left():
    header = images.read_header(as_file(Image.new("RGB", (1600, 800)), "JPEG"))
    assert [images._part(header, r) for r in (800, 101, 100, 51, 50, 26, 25, 1)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert images._part(images.read_header(as_file(Image.new("RGB", (800, 800)), "PNG")), 8) == 1
    assert "four times" in images.RULE and images.DRAFT == 4


@pytest.mark.parametrize("mode", ["LA", "P", "I;16", "CMYK", "RGB with a profile"])
def test_bands_change_no_pixel(mode, monkeypatch, seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (37, 41, 4), dtype=np.uint8)
    image = Image.fromarray(values).convert("RGB").quantize(17)
    options = {"transparency": 3}
    if mode == "I;16":
        image, options = Image.fromarray(values.view(np.uint16)[..., 0].copy()), {}
    elif mode == "LA":
        image, options = Image.fromarray(values[..., :2].copy()), {}
    elif mode != "P":
        image, options = Image.fromarray(values).convert("CMYK" if mode == "CMYK" else "RGB"), {}
    if " " in mode:
        options["icc_profile"] = WIDE
    data = as_file(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    at_once = np.asarray(decode(data))
    monkeypatch.setattr(images, "BAND", 100)
    assert np.array_equal(decode(data), at_once)


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
def test_an_animation_is_its_first_frame(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = as_file(halves(), kind, save_all=True, append_images=[halves(BLUE, RED)], **options)
    assert np.array_equal(decode(data), decode(as_file(halves(), kind, **options)))


def test_frames_are_never_counted(monkeypatch):
    """PIL finds their number by visiting each, in a time that grows with its square."""
    classes = (GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile)
    for kind in classes:
        monkeypatch.setattr(kind, "n_frames", property(lambda image: pytest.fail("counted")))
    for kind in ("GIF", "TIFF"):
        assert decode(as_file(halves(), kind, save_all=True, append_images=[halves(BLUE, RED)])).size == (8, 4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_by_name(monkeypatch):
    data = as_file(Image.new("L", (100, 50)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert decode(data).size == (100, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    with pytest.raises(BadImage, match=r"too large \(100 x 50 pixels"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL itself raises above twice the limit
    with pytest.raises(BadImage, match=r"too large \(100 x 50 pixels; the limit is 2000 pixels\)"):
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
