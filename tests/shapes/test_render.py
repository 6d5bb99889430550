"""The scenes: what is drawn, and that every caption draws something of its own."""

import torch

from dpo_fast.shapes.render import COLOURS, HEIGHTS, SCENE_OF, SCENES, Scene, masks, render


def test_a_scene_says_what_it_draws():
    scene = Scene("circle", "red", "blue", "small", "left")
    assert scene.caption == "a red circle on a blue background, small, at the left"
    image = render([scene], torch.tensor([1]))[0]
    assert image.shape == (3, 16, 16)
    assert image[:, 8, 4].tolist() == torch.tensor(COLOURS["red"]).tolist()
    assert image[:, 0, 0].tolist() == image[:, 8, 12].tolist() == torch.tensor(COLOURS["blue"]).tolist()


def test_captions_and_scenes_are_one_to_one():
    assert len(SCENE_OF) == len(SCENES) == 360
    assert all(scene.colour != scene.background for scene in SCENES)


def test_size_and_place_are_where_the_caption_says():
    mask = masks().float()  # [shapes, sizes, places, heights, 16, 16]
    columns = (mask * torch.arange(16.0)).sum((-1, -2)) / mask.sum((-1, -2))
    assert (columns.diff(dim=2) > 2).all()  # left, centre, right
    assert (mask[:, 1].sum((-1, -2)) > 2 * mask[:, 0].sum((-1, -2))).all()  # small, large
    assert (mask[..., [0, -1], :].sum() == 0) and (mask[:, :, 1, :, :, [0, -1]].sum() == 0)


def test_every_shape_is_whole_wherever_it_lies():
    mask = masks().flatten(0, 1)  # [shapes x sizes, places, heights, 16, 16]
    for drawn in mask:
        assert len({(int(one.sum()), *sorted(one.sum(0).tolist())) for one in drawn.flatten(0, 1)}) == 1


def test_every_rendering_differs():
    rows = [(scene, height) for scene in SCENES for height in range(len(HEIGHTS))]
    images = render([scene for scene, _ in rows], torch.tensor([height for _, height in rows]))
    assert len(images.flatten(1).unique(dim=0)) == len(rows)
