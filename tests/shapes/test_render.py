"""The scenes: what is drawn, and that every caption draws something of its own."""

import torch

from dpo_fast.shapes.render import CENTRES, COLOURS, SCENE_OF, SCENES, Scene, masks, render


def test_a_scene_says_what_it_draws():
    scene = Scene("circle", "red", "blue")
    assert scene.caption == "a red circle on a blue background"
    image = render([scene], torch.tensor([4]))[0]
    assert image.shape == (3, 16, 16)
    assert image[:, 8, 8].tolist() == torch.tensor(COLOURS["red"]).tolist()
    assert image[:, 0, 0].tolist() == torch.tensor(COLOURS["blue"]).tolist()


def test_captions_and_scenes_are_one_to_one():
    assert len(SCENE_OF) == len(SCENES) == 60
    assert all(scene.colour != scene.background for scene in SCENES)


def test_every_shape_at_every_centre_is_whole_and_its_own():
    mask = masks()
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert not (mask & border).any()
    assert len(mask.flatten(2).flatten(0, 1).unique(dim=0)) == mask.shape[0] * len(CENTRES)


def test_every_rendering_differs():
    rows = [(scene, centre) for scene in SCENES for centre in range(len(CENTRES))]
    images = render([scene for scene, _ in rows], torch.tensor([centre for _, centre in rows]))
    assert len(images.flatten(1).unique(dim=0)) == len(rows)
