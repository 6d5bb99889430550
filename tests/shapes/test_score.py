"""The scorers: exact on renderings, lower for every wrong word, falling with noise."""

import pytest
import torch

from dpo_fast.errors import BadInput
from dpo_fast.shapes.render import COLOURS, HEIGHTS, PLACES, SCENE_OF, SCENES, SHAPES, SIZES, Scene, render
from dpo_fast.shapes.score import appeal, faithfulness, is_right, quality

CAPTIONS = [scene.caption for scene in SCENES]


def _all(height: int) -> torch.Tensor:
    return render(list(SCENES), torch.full((len(SCENES),), height))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("height", range(len(HEIGHTS)))
def test_a_rendering_is_wholly_faithful(height):
    assert faithfulness(_all(height), CAPTIONS).tolist() == [1.0] * len(SCENES)
    assert is_right(_all(height), CAPTIONS).all()


@pytest.mark.drawn(1)
@pytest.mark.parametrize("height", range(len(HEIGHTS)))
def test_one_wrong_word_costs(height):
    for scene, image in zip(SCENES, _all(height), strict=True):
        words = {"shape": SHAPES, "colour": COLOURS, "background": COLOURS, "size": SIZES, "place": PLACES}
        wrong = [scene._replace(**{kind: word}).caption for kind, every in words.items() for word in every]
        wrong = [caption for caption in wrong if caption in SCENE_OF and caption != scene.caption]
        images = image.expand(len(wrong), -1, -1, -1)
        assert (faithfulness(images, wrong) < 0.97).all(), scene
        assert not is_right(images, wrong).any()


def test_faithfulness_is_the_distance_to_the_nearest_rendering():
    image = torch.rand(1, 3, 16, 16)
    scene = Scene("triangle", "yellow", "green", "large", "right")
    renderings = render([scene] * len(HEIGHTS), torch.arange(len(HEIGHTS))).double()
    distances = (image.double() - renderings).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(faithfulness(image, [scene.caption]), 1 - distances.min()[None])


def test_quality_is_half_for_content_and_half_for_looks():
    images, noise = _all(0)[:6], 0.1 * torch.rand(6, 3, 16, 16)
    wrong = [SCENES[-1].caption] * 6
    torch.testing.assert_close(quality(images, CAPTIONS[:6]), (1 + appeal(images)) / 2)
    torch.testing.assert_close(quality(images, wrong), ((1 + faithfulness(images, wrong)) / 2 + appeal(images)) / 2)
    every = torch.stack([faithfulness(images + noise, [caption] * 6) for caption in CAPTIONS])
    content = (faithfulness(images + noise, wrong) + every.amax(0)) / 2
    torch.testing.assert_close(quality(images + noise, wrong), (content + appeal(images + noise)) / 2)
    assert (quality(images + noise, wrong) < quality(images, wrong)).all()  # of two wrong images the cleaner is better


def test_both_fall_with_noise():
    images = _all(1)
    noise = torch.randn(images.shape)
    noisy = [(images + deviation * noise).clamp(0, 1) for deviation in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)]
    faithful = torch.stack([faithfulness(image, CAPTIONS) for image in noisy])
    appealing = torch.stack([appeal(image).mean() for image in noisy])
    assert (faithful.diff(dim=0) < 0).all()
    assert (appealing.diff() < 0).all()


def test_appeal_prefers_vivid_and_clean():
    grey, vivid = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 3, 16, 16)
    vivid[:, 0] = 1
    speckled = vivid.clone()
    speckled[:, :, 8, 8] = torch.tensor([0.0, 0.0, 1.0])
    assert appeal(grey).item() == 0
    assert appeal(vivid).item() == 1
    assert 0.9 < appeal(speckled).item() < 1


def test_what_is_not_of_this_world_is_refused():
    with pytest.raises(BadInput, match="a dog"):
        faithfulness(torch.zeros(1, 3, 16, 16), ["a dog"])
    with pytest.raises(BadInput, match=r"\(1, 3, 8, 8\)"):
        faithfulness(torch.zeros(1, 3, 8, 8), CAPTIONS[:1])
