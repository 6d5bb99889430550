"""What the published models are given, against the libraries of their recipes."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dpo_fast.scorers.preprocessing import crop_to_square, floored, pad_to_square, rounded

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
SHAPES = [(224, 224), (512, 512), (301, 477), (477, 301), (224, 231), (227, 224), (97, 61), (61, 200), (1024, 333)]
SIZE = 224


@pytest.fixture(params=SHAPES, ids=lambda shape: "{}x{}".format(*shape))
def image(request) -> torch.Tensor:
    """uint8 [1,3,H,W]: blocks of colour under noise, from black to white."""
    height, width = request.param
    blocks = torch.rand(3, -(-height // 9), -(-width // 9)).repeat_interleave(9, 1).repeat_interleave(9, 2)
    return ((blocks[:, :height, :width] + 0.3 * torch.randn(3, height, width)).clamp(0, 1) * 255).round().byte()[None]


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image[0].permute(1, 2, 0).numpy())


def normalised(pixels: np.ndarray) -> torch.Tensor:  # [H,W,3] in [0, 1]
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)[None]


def assert_same(ours: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    assert ours.dtype == torch.float32 and ours.shape == (1, 3, SIZE, SIZE)
    assert (ours.double() - expected.double()).abs().max().item() < atol


def test_crop_as_transformers(image):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    assert_same(
        crop_to_square(image, SIZE, floored), processor(picture(image), return_tensors="pt").pixel_values, atol=1e-5
    )


def test_crop_as_torchvision_does_by_pil(image):
    height, width = image.shape[-2:]
    if height <= width:
        resized = picture(image).resize((int(SIZE * width / height), SIZE), Image.Resampling.BICUBIC)
    else:
        resized = picture(image).resize((SIZE, int(SIZE * height / width)), Image.Resampling.BICUBIC)
    top, left = (round((side - SIZE) / 2.0) for side in (resized.height, resized.width))
    expected = np.asarray(resized)[top : top + SIZE, left : left + SIZE] / 255
    assert_same(crop_to_square(image, SIZE, rounded), normalised(expected), atol=1e-5)


def test_pad_as_an_antialiased_resize_of_floats(image):
    """PIL's resampling of float images: the filter that PyTorch has for antialiased bicubic, by other code."""
    height, width = image.shape[-2:]
    scale = SIZE / max(height, width)
    height, width = round(height * scale), round(width * scale)
    channels = [Image.fromarray(channel.numpy().astype(np.float32) / 255) for channel in image[0]]
    if scale != 1:
        channels = [channel.resize((width, height), Image.Resampling.BICUBIC) for channel in channels]
    expected = np.zeros((SIZE, SIZE, 3))
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    expected[top : top + height, left : left + width] = np.stack([np.asarray(c) for c in channels], -1)
    assert_same(pad_to_square(image, SIZE), normalised(expected), atol=5e-4)  # PyTorch's weights are fp32


def test_as_torchvision(image):
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    end = [transforms.ToTensor(), transforms.Normalize(tuple(MEAN), tuple(STD))]
    recipe = transforms.Compose([transforms.Resize(SIZE, interpolation=bicubic), transforms.CenterCrop(SIZE), *end])
    assert_same(crop_to_square(image, SIZE, rounded), recipe(picture(image))[None], atol=1e-5)

    pixels = transforms.ToTensor()(picture(image))  # HPSv2: a tensor is resized
    scale = SIZE / float(max(pixels.shape[1:]))
    new = tuple(round(side * scale) for side in pixels.shape[1:])
    pixels = transforms.functional.resize(pixels, new, bicubic)
    high, wide = SIZE - new[0], SIZE - new[1]
    pixels = transforms.functional.pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    assert_same(pad_to_square(image, SIZE), end[1](pixels)[None], atol=1e-5)


@pytest.mark.parametrize(
    "prepare", [lambda images: crop_to_square(images, 32, floored), lambda i: pad_to_square(i, 32)]
)
def test_images_do_not_mix(prepare):
    images = torch.randint(256, (3, 3, 50, 41), dtype=torch.uint8)
    together = prepare(images)
    assert all(torch.equal(together[k], prepare(images[k : k + 1])[0]) for k in range(3))
