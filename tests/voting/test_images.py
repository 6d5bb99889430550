"""The images as the browser gets them: one size, one length, no metadata, kept with digests, broken ones named."""

import io

import numpy as np
import pytest
from PIL import Image

from dpo_fast.voting import images
from dpo_fast.voting.images import Size, padded, prepare, ruined_copy
from tests.helpers.vote_sessions import image_folder, png


def files_of(folder):
    return sorted(folder.iterdir())


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def jpeg(size=(40, 30)) -> bytes:
    data = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(data, "JPEG", quality=95)
    return data.getvalue()


@pytest.mark.parametrize("more", [4, 5, 7, 8, 100, 65536, 65537, 65538, 65540, 65541, 131074, 131078, 200_003])
def test_padding_to_the_byte(more):
    data = jpeg()
    whole = padded(data, len(data) + more)
    assert len(whole) == len(data) + more
    assert opened(whole).tobytes() == opened(data).tobytes()
    assert padded(data, len(data) + more) != whole or more < 20  # the padding is random


def test_every_response_has_one_size_and_one_length(tmp_path):
    one = image_folder(tmp_path / "one", ["a", "b"], seed=1, size=(600, 300))
    two = image_folder(tmp_path / "two", ["c", "d"], seed=2, size=(200, 400), sharp=False)
    gallery = prepare([*files_of(one), *files_of(two)], tmp_path / "kept", ruined=files_of(two), show=False)
    assert gallery.size == Size(600, 600) and len(gallery.images) == 6 and not gallery.broken
    for file, ruined in gallery.images:
        data = gallery.response(file, ruined)
        image = opened(data)
        assert len(data) == gallery.length and image.size == (600, 600)
        assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "comment"}
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # colour in full resolution
    wide = np.asarray(opened(gallery.response(files_of(one)[0], False)))
    assert (np.abs(wide[:140].astype(int) - 128) < 4).all() and (
        np.abs(wide[160:440].astype(int) - 128) > 20
    ).mean() > 0.3


@pytest.mark.parametrize(
    ("shapes", "side", "expected"),
    [
        ([(64, 64)], None, (256, 256)),
        ([(512, 512), (1024, 1024)], None, (1024, 1024)),
        ([(2048, 1024)], None, (1024, 512)),
        ([(832, 1216), (416, 608)], None, (701, 1024)),
        ([(300, 300)], 128, (128, 128)),
        ([(400, 200), (200, 400)], 100, (100, 100)),
    ],
)
def test_the_box(shapes, side, expected):
    assert images._box(shapes, side) == expected


def test_metadata_and_profiles_do_not_pass(tmp_path):
    file = png(tmp_path / "a.png", {"prompt": "SECRET", "parameters": "SECRET"})
    with Image.open(file) as image:
        exif = image.getexif()
        exif[270] = "SECRET"
        image.save(tmp_path / "b.jpg", exif=exif, comment=b"SECRET")
    gallery = prepare([file, tmp_path / "b.jpg"], tmp_path / "kept", show=False)
    for one in gallery.images:
        assert b"SECRET" not in gallery.response(*one)
        assert b"SECRET" not in gallery.images[one].file.read_bytes()


def test_broken_images_are_named_and_left_out(tmp_path):
    folder = image_folder(tmp_path / "one", ["a", "b", "c"], seed=1)
    (folder / "a.png").write_bytes(b"nothing")
    data = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    files = [*files_of(folder), tmp_path / "gone.png"]
    gallery = prepare(files, tmp_path / "kept", ruined=files[:2], show=False)
    assert [file.name for file, _ in gallery.images] == ["c.png"]
    assert {file.name for file in gallery.broken} == {"a.png", "b.png", "gone.png"}
    assert "cannot identify" in gallery.broken[files[0]] and "No such file" in gallery.broken[files[3]]


def test_what_was_prepared_is_kept_and_checked(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "one", ["a", "b"], seed=1)
    first = prepare(files_of(folder), tmp_path / "kept", show=False)
    made = []
    real = images._encoded
    monkeypatch.setattr(images, "_encoded", lambda *given: made.append(given[0].name) or real(*given))
    assert prepare(files_of(folder), tmp_path / "kept", show=False) == first and made == []
    kept = first.images[folder / "a.png", False].file
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        first.response(folder / "a.png", False)
    assert prepare(files_of(folder), tmp_path / "kept", show=False) == first and made == ["a.png"]
    (tmp_path / "kept" / "images.json").write_text("{")
    assert prepare(files_of(folder), tmp_path / "kept", show=False) == first and sorted(made[1:]) == ["a.png", "b.png"]
    made.clear()
    image_folder(tmp_path / "other", ["a"], seed=5)
    (tmp_path / "other" / "a.png").replace(folder / "a.png")
    assert prepare(files_of(folder), tmp_path / "kept", show=False) != first and made == ["a.png"]
    made.clear()
    assert prepare(files_of(folder), tmp_path / "kept", side=100, show=False).size == (100, 100) and len(made) == 2


def test_a_ruined_copy_is_ruined_and_no_longer_than_its_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((500, 400), Image.Resampling.BICUBIC)
    ruined = ruined_copy(image, "x")
    assert ruined.size == image.size and ruined == ruined_copy(image, "x") != ruined_copy(image, "y")
    before, after = (np.asarray(one, np.float64) for one in (image, ruined))
    assert np.abs(before - after).mean() > 20
    assert np.abs(np.diff(after, axis=0)).mean() < 0.5 * np.abs(np.diff(before, axis=0)).mean()  # blurred
    lengths = []
    for one in (image, ruined):
        data = io.BytesIO()
        one.save(data, "JPEG", quality=95, subsampling=0)
        lengths.append(data.tell())
    assert lengths[1] < lengths[0]
    assert ruined_copy(Image.new("RGB", (3, 2)), "x").size == (3, 2)
