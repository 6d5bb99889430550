"""What is remembered of a source's rows: the same answers as the source gives, and no image read for them twice."""

import numpy as np
import pytest

from dpo_fast.caching.manifest import Manifest, RememberedSource, keys_of
from dpo_fast.data import BadImage, BadRow, build_index
from dpo_fast.errors import BadInput
from tests.data.conftest import no_bars, own_cache  # noqa: F401  the user's data set cache stays as it is
from tests.helpers.pairs import open_pairs, pickapic, write_table


def faulty(tmp_path, n: int = 12):
    """A source in which row 2 has no second image, row 5 one that does not decode, row 7 no caption, row 9 one image
    twice."""
    columns = pickapic(n=n, size=40, seed=np.random.randint(1000))
    columns["jpg_1"][2] = None
    columns["jpg_0"][5] = columns["jpg_0"][5][:200]
    columns["caption"][7] = ""
    columns["jpg_1"][9] = columns["jpg_0"][9]
    return open_pairs(write_table(tmp_path / "pairs.parquet", columns))


def answer(function, row: int):
    try:
        return function(row)
    except BadImage as error:
        return error.column, error.reason


def test_the_second_time_no_image_is_read(tmp_path, monkeypatch):
    source = faulty(tmp_path)
    wanted = {
        name: [answer(getattr(source, name), row) for row in range(12)] for name in ("check_images", "image_keys")
    }
    remembered = RememberedSource(source, Manifest(tmp_path / "pairs"))
    for name, answers in wanted.items():
        assert [answer(getattr(remembered, name), row) for row in range(12)] == answers
    remembered.manifest.begin(source)
    remembered.manifest.save(ended=False)

    monkeypatch.setattr(source, "image_bytes", None)  # nobody may call it
    again = RememberedSource(source, Manifest(tmp_path / "pairs"))
    for name, answers in wanted.items():
        assert [answer(getattr(again, name), row) for row in range(12)] == answers
    assert not again.manifest.changed


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_an_index_built_from_memory_is_the_same(tmp_path, fraction):
    source = faulty(tmp_path)
    flags = dict(seed=1, max_bad_fraction=0.5, validation_fraction=fraction, progress=False)
    plain = build_index(source, **flags)
    manifest = Manifest(tmp_path / "pairs")
    for _ in range(2):
        remembered = build_index(RememberedSource(source, manifest), **flags)
        assert remembered.bad == plain.bad and {bad.row for bad in plain.bad} == {2, 5, 7, 9}
        for one, other in ((plain.train, remembered.train), (plain.validation, remembered.validation)):
            assert one.pair_id.equal(other.pair_id) and one.captions == other.captions
        manifest.begin(source)
        manifest.save(ended=False)
        manifest = Manifest(tmp_path / "pairs")


def test_a_stream_is_told_again(tmp_path):
    path = write_table(
        tmp_path / "pairs.parquet",
        pickapic(n=5, captions=["a", "", "ü", None, "\ud800".encode("utf-16", "surrogatepass").hex()]),
    )
    source = open_pairs(path, streaming=True)
    manifest = Manifest(tmp_path / "pairs")
    manifest.begin(source)
    for row in source.rows():
        manifest.note(row.row, keys_of(row.images), (row.caption, row.label))
        if row.row % 2:
            manifest.save_part()
    parts = Manifest(tmp_path / "pairs")
    assert len(parts) == 4  # the last row was in no part yet
    with pytest.raises(RuntimeError, match="first 4 rows only"):
        list(parts.stream().rows())
    manifest.save(ended=True)
    again = Manifest(tmp_path / "pairs").stream()
    assert again.identity.rows == source.identity.rows and again.columns == source.columns
    rows = [row._replace(images=keys_of(row.images)) for row in source.rows()]
    assert list(again.rows()) == rows
    assert not list((tmp_path / "pairs").glob("part-*"))


def test_later_facts_complete_earlier_ones(tmp_path):
    source = faulty(tmp_path)
    manifest = Manifest(tmp_path / "pairs")
    manifest.begin(source)
    keys = (bytes(16), bytes([1]) * 16)
    manifest.note(3, keys)
    manifest.save_part()
    manifest.note_decoded(3, BadRow(3, "jpg_1", "cannot be decoded"))
    manifest.save_part()
    again = Manifest(tmp_path / "pairs")
    assert again.images(3) == keys and again.decodes(3) == BadRow(3, "jpg_1", "cannot be decoded")
    with pytest.raises(KeyError):
        again.decodes(4)
    assert 3 in again and 4 not in again


def test_every_flipped_bit_is_noticed(tmp_path):
    source = faulty(tmp_path)
    manifest = Manifest(tmp_path / "pairs")
    manifest.begin(source)
    for row in range(40):
        manifest.note(row, (np.random.bytes(16), np.random.bytes(16)), (f"caption {row}", 1.0))
    manifest.save(ended=True)
    files = sorted((tmp_path / "pairs").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["manifest.json", "rows"]
    for file in files:
        good = file.read_bytes()
        for place in np.random.choice(len(good), 100):
            data = bytearray(good)
            data[place] ^= 1 << np.random.randint(8)
            file.write_bytes(data)
            with pytest.raises(BadInput, match="delete the folder"):
                Manifest(tmp_path / "pairs")
        file.write_bytes(good)
    assert len(Manifest(tmp_path / "pairs")) == 40


@pytest.mark.parametrize("all_of_them", [False, True])
def test_the_columns_of_a_stream_come_back(all_of_them, tmp_path):
    more = {"label_1": [0.0] * 2, "has_label": [True] * 2, "image_0_uid": ["a"] * 2, "image_1_uid": ["b"] * 2}
    columns = {**pickapic(n=2, size=8, labels=[1.0] * 2), **(more if all_of_them else {})}
    source = open_pairs(write_table(tmp_path / "pairs.parquet", columns), streaming=True)
    manifest = Manifest(tmp_path / "pairs")
    manifest.begin(source)
    assert Manifest(tmp_path / "pairs").columns == source.columns


def test_a_row_noted_again_replaces_what_was_known(tmp_path):
    source = faulty(tmp_path)
    manifest = Manifest(tmp_path / "pairs")
    manifest.begin(source)
    old, new = [(np.random.bytes(16), np.random.bytes(16)) for _ in range(2)]
    manifest.note(0, old)
    manifest.note_decoded(0, BadRow(0, "jpg_1", "cannot be decoded"))
    manifest.save(ended=False)
    again = Manifest(tmp_path / "pairs")
    assert again.agrees(0, old) and not again.agrees(0, new) and not again.agrees(0, (old[0], BadImage("gone")))
    again.note(0, new)
    again.save_part()
    latest = Manifest(tmp_path / "pairs")
    assert latest.images(0) == new
    with pytest.raises(KeyError):
        latest.decodes(0)
