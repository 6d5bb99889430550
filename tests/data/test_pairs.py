"""Which rows train and which validate, and what one pair becomes."""

import json
import unicodedata
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_fast import draws
from dpo_fast.data import BadRow, PairDataset, PairTransform, build_index, collate
from dpo_fast.data.images import decode
from dpo_fast.errors import BadInput
from tests.helpers.pairs import as_file, open_pairs, pickapic, write_jsonl, write_pickapic, write_table

ALL = torch.arange(1000)


def index_of(columns, path, **options):
    options = {"seed": 0, "progress": False, **options}
    source = open_pairs(write_table(path / "pairs.parquet", columns))
    return source, build_index(source, **options)


def transform(**options):
    return PairTransform(**{"resolution": 32, "seed": 0, "timesteps": ALL, **options})


def batch_of(columns, path, draw=0, **options):
    source, sets = index_of(columns, path, max_bad_fraction=1, check_pairs=0)
    dataset = PairDataset(source, sets.train, transform(**options))
    return collate(dataset.__getitems__([(position, draw) for position in range(len(dataset))]))


# ---- the index -----------------------------------------------------------------------------------------------------


def test_the_real_sample(sample):
    sets = build_index(open_pairs(sample), seed=0, progress=False)
    assert (sets.rows, sets.ties_dropped, sets.bad_rows, len(sets.validation)) == (7, 1, 0, 0)
    assert sets.train.pair_id.tolist() == [0, 1, 2, 3, 4, 5] and sets.train.pair_id.dtype == torch.int64
    assert sets.train.chosen.tolist() == [0, 1, 0, 1, 0, 1] and sets.train.chosen.dtype == torch.int64
    assert sets.train.label.tolist() == [1.0] * 6 and sets.train.label.dtype == torch.float32


def test_the_real_tie_as_a_soft_label(sample):
    sets = build_index(open_pairs(sample), seed=0, soft_labels=True, progress=False)
    assert sets.ties_dropped == 0 and sets.train.label.tolist() == [1.0] * 6  # the tie is of one image with itself


def test_ids_are_rows_before_filtering(tmp_path):
    columns = pickapic(n=6, labels=[0.5, 1, 0, 0.5, 1, None], captions=["a", "b", " ", "d", "e", "f"])
    _, sets = index_of(columns, tmp_path, max_bad_fraction=0.5, report_path=tmp_path / "report.jsonl")
    assert sets.train.pair_id.tolist() == [1, 4] and sets.train.captions == ["b", "e"]
    assert (sets.rows, sets.ties_dropped, sets.bad_rows) == (6, 2, 2)
    assert sets.bad == [BadRow(2, "caption", "is empty"), BadRow(5, "label_0", "has no label")]
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert lines == [row._asdict() for row in sets.bad]


def test_soft_labels_turn_to_the_likelier_side(tmp_path):
    columns = pickapic(n=6, labels=[0.0, 0.2, 0.5, 0.7, 1.0, 0.5])
    _, sets = index_of(columns, tmp_path, soft_labels=True)
    assert sets.train.chosen.tolist() == [1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(sets.train.label, torch.tensor([1.0, 0.8, 0.5, 0.7, 1.0, 0.5]))
    assert sets.ties_dropped == 0


@pytest.mark.parametrize("labels", [[True, False, True], [1, 0, 1]])
def test_labels_of_other_number_types(labels, tmp_path):
    _, sets = index_of(pickapic(n=3, labels=labels), tmp_path)
    assert sets.train.chosen.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "soft", "said"),
    [
        ([1.0, 0.0, 0.7], False, "row 2: label_0 is 0.7.*--soft_labels"),
        ([1.0, -1.0, 0.0], False, "row 1: label_0 is -1.0"),
        ([1.0, 0.0, 3.0], True, "row 2: label_0 is 3.0"),
        (["good", "bad", "bad"], False, "row 0: label_0 is 'good', not a number.*--label_column"),
        ([0.5, 0.5, 0.5], False, "nothing to train on.*3 ties.*--soft_labels"),
        ([float("nan"), 1.0, 1.0], False, "1 of 3 rows.*label_0 has no label.*--max_bad_fraction"),
    ],
)
def test_labels_that_are_faults_of_the_whole_set(labels, soft, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        index_of(pickapic(n=3, labels=labels), tmp_path, soft_labels=soft)


def test_an_empty_set(tmp_path):
    columns = {name: values[:1] for name, values in pickapic(n=1).items()}
    source = open_pairs(write_table(tmp_path / "a.parquet", columns))
    source._table = source._table.select([])
    with pytest.raises(BadInput, match="nothing to train on, it has no rows"):
        build_index(source, seed=0, progress=False)


@pytest.mark.parametrize("name", ["max_bad_fraction", "validation_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_fractions_out_of_range(name, value, tmp_path):
    with pytest.raises(BadInput, match=name):
        index_of(pickapic(n=2), tmp_path, **{name: value})


def test_captions_that_are_no_text(tmp_path):
    folder = write_jsonl(tmp_path / "set", pickapic(n=3))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line, prompt in zip(lines, ([{"role": "user"}], "half \ud83d", None), strict=True):
        line["prompt"] = prompt
    lines.append({**lines[0], "prompt": "\U0001f600 fine"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = build_index(
        open_pairs(folder), seed=0, max_bad_fraction=0.9, progress=False, report_path=tmp_path / "report"
    )
    assert [bad.reason.split(" (")[0] for bad in sets.bad] == ["is not text", "is not text", "is empty"]
    assert sets.train.captions == ["\U0001f600 fine"] and len((tmp_path / "report").read_text().splitlines()) == 3


def test_missing_files_are_found_at_the_start(tmp_path):
    folder = write_jsonl(tmp_path / "set", pickapic(n=10))
    (folder / "images" / "3-rejected.jpg").unlink()
    source = open_pairs(folder)
    sets = build_index(source, seed=0, max_bad_fraction=0.1, check_pairs=0, progress=False)
    assert sets.train.pair_id.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert sets.bad == [BadRow(3, "rejected", "is not an existing file ('images/3-rejected.jpg')")]
    with pytest.raises(
        BadInput, match=r"1 of 10 rows .*--max_bad_fraction 0.09: row 3: rejected is not an existing file"
    ):
        build_index(source, seed=0, max_bad_fraction=0.09, progress=False)


def test_a_tie_with_a_missing_file_is_one_tie(tmp_path):
    folder = write_jsonl(tmp_path / "set", pickapic(n=3))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line, label in zip(lines, (0.5, 1, 1), strict=True):
        line["label"] = label
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "images" / "0-chosen.jpg").unlink()
    sets = build_index(open_pairs(folder, label_column="label"), seed=0, progress=False)
    assert (sets.rows, sets.ties_dropped, sets.bad_rows, len(sets.train)) == (3, 1, 0, 2)


def broken(columns, *rows, name="jpg_1"):
    images = list(columns[name])
    for row in rows:
        images[row] = images[row][:200]
    return {**columns, name: images}


def test_the_start_check_drops_and_reports_what_does_not_decode(tmp_path):
    report = tmp_path / "report.jsonl"
    _, sets = index_of(broken(pickapic(n=10), 4), tmp_path, max_bad_fraction=0.1, report_path=report)
    assert sets.train.pair_id.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9] and sets.bad_rows == 1
    line = json.loads(report.read_text())
    assert line["row"] == 4 and line["column"] == "jpg_1" and "cannot be decoded" in line["reason"]


def test_too_many_broken_images_end_the_run_before_it_starts(tmp_path):
    report = tmp_path / "report.jsonl"
    with pytest.raises(BadInput) as caught:
        index_of(broken(pickapic(n=10), 4, 5), tmp_path, max_bad_fraction=0.1, report_path=report)
    message = str(caught.value)
    for part in ("2 of 10 rows", "--max_bad_fraction 0.1", "row 4: jpg_1 cannot be decoded", "row 5:", str(report)):
        assert part in message
    assert "\n" not in message and len(report.read_text().splitlines()) == 2


def test_the_start_check_is_evenly_spaced(tmp_path):
    columns = broken(pickapic(n=9), 0, 4, 8)
    _, sets = index_of(columns, tmp_path, check_pairs=3, max_bad_fraction=1)
    assert [bad.row for bad in sets.bad] == [0, 4, 8]
    _, sets = index_of(columns, tmp_path, check_pairs=2, max_bad_fraction=1)
    assert [bad.row for bad in sets.bad] == [0, 8]


def test_every_image_broken(tmp_path):
    with pytest.raises(BadInput, match="no training pair is left"):
        index_of(broken(pickapic(n=3), 0, 1, 2), tmp_path, max_bad_fraction=1)


# ---- validation ----------------------------------------------------------------------------------------------------


def test_validation_goes_by_caption(tmp_path):
    captions = [f"prompt {i % 100}" if i < 150 else f"  PROMPT {i % 100}" for i in range(300)]
    columns = pickapic(n=300, size=8, captions=captions)
    source, sets = index_of(columns, tmp_path, validation_fraction=0.2)
    train, held = ({" ".join(c.lower().split()) for c in index.captions} for index in (sets.train, sets.validation))
    assert train.isdisjoint(held) and train | held == {f"prompt {i}" for i in range(100)}
    assert 10 <= len(held) <= 32  # binomial(100, 0.2), three sigma
    assert len(sets.train) + len(sets.validation) == 300 and sets.shared_with_validation == 0
    again = build_index(source, seed=0, validation_fraction=0.2, progress=False)
    other = build_index(source, seed=1, validation_fraction=0.2, progress=False)
    assert again.validation.pair_id.equal(sets.validation.pair_id)
    assert other.validation.captions != sets.validation.captions
    more = build_index(source, seed=0, validation_fraction=0.4, progress=False)
    assert set(sets.validation.captions) < set(more.validation.captions)  # raising the share keeps what was held out


def test_composed_and_decomposed_captions_are_one_prompt(tmp_path):
    words = [f"caf\u00e9 {k}" for k in range(20)]
    captions = [*words, *(unicodedata.normalize("NFD", word).upper() for word in words)]
    _, sets = index_of(pickapic(n=40, captions=captions, size=8), tmp_path, validation_fraction=0.5)
    held = set(sets.validation.pair_id.tolist())
    assert {(k + 20) % 40 for k in held} == held and 0 < len(held) < 40


def test_no_image_of_validation_is_trained_on(tmp_path):
    columns = pickapic(n=40, size=8)
    columns["jpg_1"] = columns["jpg_0"][1:] + columns["jpg_0"][:1]  # row i shares an image with i - 1 and i + 1
    _, sets = index_of(columns, tmp_path, validation_fraction=0.1)
    held = set(sets.validation.pair_id.tolist())
    train = set(sets.train.pair_id.tolist())
    neighbours = {(row + step) % 40 for row in held for step in (-1, 1)} - held
    assert held and train == set(range(40)) - held - neighbours
    assert sets.shared_with_validation == len(neighbours) > 0
    assert sets.rows == len(train) + len(held) + sets.ties_dropped + sets.bad_rows + sets.shared_with_validation


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(fraction, tmp_path):
    _, sets = index_of(pickapic(n=5, size=8), tmp_path, validation_fraction=fraction)
    sizes = (len(sets.train), len(sets.validation))
    assert sizes == ((4, 1) if fraction < 0.5 else (1, 4))


def test_validation_that_cannot_be(tmp_path, sample):
    with pytest.raises(BadInput, match="two different captions"):
        build_index(open_pairs(sample), seed=0, validation_fraction=0.1, progress=False)
    columns = pickapic(n=3, size=8)
    columns["jpg_1"] = [columns["jpg_0"][0]] * 3
    with pytest.raises(BadInput, match="share an image with validation"):
        index_of(columns, tmp_path, validation_fraction=0.3)


# ---- one pair ------------------------------------------------------------------------------------------------------


def test_the_batch(tmp_path):
    columns = pickapic(n=3, labels=[1.0, 0.0, 0.0])
    batch = batch_of(columns, tmp_path, draw=2)
    assert batch.pixels.shape == (6, 3, 32, 32) and batch.pixels.dtype == torch.uint8
    expected = [columns[f"jpg_{side}"][row] for row, side in ((0, 0), (1, 1), (2, 1), (0, 1), (1, 0), (2, 0))]
    for pixels, data in zip(batch.pixels, expected, strict=True):
        image = decode(data).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(image))
    assert batch.captions == columns["caption"]
    assert batch.pair_id.tolist() == [0, 1, 2] and batch.draw.tolist() == [2, 2, 2]
    assert batch.timesteps.equal(draws.timesteps(0, batch.pair_id, batch.draw, ALL, grid=False))
    assert batch.label.tolist() == batch.weight.tolist() == [1.0] * 3 and batch.bad == []
    assert batch.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    dtypes = {"dropped": torch.bool, "pair_id": torch.int64, "draw": torch.int64, "timesteps": torch.int64}
    dtypes |= {"label": torch.float32, "weight": torch.float32, "time_ids": torch.float32}
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes


def test_the_batch_moves(tmp_path):
    batch = batch_of(pickapic(n=2), tmp_path)
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta" and after.shape == before.shape and after.dtype == before.dtype
        else:
            assert after is before


def test_timesteps_on_a_grid(tmp_path):
    grid = torch.tensor([249, 499, 749])
    seen = [batch_of(pickapic(n=4, size=8), tmp_path, draw, timesteps=grid, grid=True).timesteps for draw in range(3)]
    assert torch.stack(seen).sort(dim=0).values.equal(grid[:, None].expand(3, 4))


def test_flips_are_drawn_per_pair(tmp_path):
    columns = pickapic(n=64, size=32)
    plain, flipped = (batch_of(columns, tmp_path, hflip=hflip).pixels for hflip in (False, True))
    mirrored = [torch.equal(flipped[i], plain[i].flip(-1)) for i in range(128)]
    assert mirrored[:64] == mirrored[64:]  # both images of a pair or neither
    assert mirrored[:64] == draws.flip(0, torch.arange(64), torch.zeros(64, dtype=torch.int64)).tolist()
    assert 16 < sum(mirrored[:64]) < 48


def gradient(width, height):
    """Red tells the column, green the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_random_crops_are_the_same_place_in_both_images(tmp_path):
    n = 24
    columns = pickapic(n=n, size=8)
    columns["jpg_0"], columns["jpg_1"] = ([as_file(gradient(64, 32), kind)] * n for kind in ("PNG", "BMP"))
    pixels = batch_of(columns, tmp_path, random_crop=True).pixels
    assert pixels[:n].equal(pixels[n:])
    corners = pixels[:n, 0, 0, 0]
    assert len(corners.unique()) > 8 and corners.max() <= 32 and (pixels[:, 1, 0, 0] == 0).all()
    later = batch_of(columns, tmp_path, draw=1, random_crop=True).pixels
    assert not later.equal(pixels)
    centered = batch_of(columns, tmp_path).pixels
    assert (centered[:, 0, 0, 0] == 16).all()


def test_random_crops_of_different_shapes_are_at_the_same_relative_place(tmp_path):
    columns = pickapic(n=16, size=8, labels=[1.0] * 16)
    columns["jpg_0"], columns["jpg_1"] = [as_file(gradient(96, 32))] * 16, [as_file(gradient(64, 32))] * 16
    left = batch_of(columns, tmp_path, random_crop=True).pixels[:, 0, 0, 0].long()
    assert ((left[:16] / 64 - left[16:] / 32).abs() <= 1 / 32).all()


@pytest.mark.parametrize("hflip", [False, True])
def test_real_time_ids_are_the_smaller_image_s(hflip, tmp_path):
    n = 16
    columns = pickapic(n=n, size=8, labels=[1.0] * n)
    columns["jpg_0"] = [as_file(gradient(200, 100))] * n  # scaled to 64 x 32
    columns["jpg_1"] = [as_file(gradient(32, 80))] * n  # smaller; scaled to 32 x 80, cropped by its height
    batch = batch_of(columns, tmp_path, random_crop=True, hflip=hflip, time_ids="real")
    top = batch.pixels[n:, 1, 0, 0].float()
    expected = torch.tensor([80.0, 32, 0, 0, 32, 32]).repeat(n, 1)
    expected[:, 2] = top
    assert batch.time_ids.equal(expected) and len(top.unique()) > 3


def test_real_time_ids_describe_the_mirrored_image(tmp_path):
    n = 16
    columns = pickapic(n=n, size=8, labels=[1.0] * n)
    columns["jpg_0"], columns["jpg_1"] = ([as_file(gradient(64, 32), kind)] * n for kind in ("PNG", "BMP"))
    batch = batch_of(columns, tmp_path, random_crop=True, hflip=True, time_ids="real")
    first = batch.pixels[:n, 0, 0, 0].float()
    mirrored = draws.flip(0, batch.pair_id, batch.draw)
    assert batch.time_ids[:, 3].equal(torch.where(mirrored, 63 - first, first)) and mirrored.any()


def test_equal_sizes_give_the_chosen_image_s_time_ids(tmp_path):
    columns = pickapic(n=1, size=8, labels=[0.0])
    columns["jpg_0"], columns["jpg_1"] = [as_file(gradient(64, 32))], [as_file(gradient(32, 64))]
    assert batch_of(columns, tmp_path, time_ids="real").time_ids.tolist() == [[64, 32, 16, 0, 32, 32]]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_caption_dropout(probability, tmp_path):
    columns = pickapic(n=200, size=8)
    batch = batch_of(columns, tmp_path, resolution=8, caption_dropout=probability)
    assert batch.captions == columns["caption"]
    assert abs(batch.dropped.float().mean().item() - probability) <= (0.1 if probability == 0.3 else 0)


def test_a_pair_is_the_same_in_any_company(tmp_path):
    source, sets = index_of(pickapic(n=6), tmp_path)
    dataset = PairDataset(source, sets.train, transform(hflip=True, random_crop=True, caption_dropout=0.5))
    together = collate(dataset.__getitems__([(p, p % 3) for p in range(6)]))
    for p in range(6):
        alone = collate([dataset[p, p % 3]])
        assert alone.pixels.equal(together.pixels[[p, 6 + p]]) and alone.timesteps[0] == together.timesteps[p]
        assert alone.dropped[0] == together.dropped[p]
    reseeded = PairDataset(source, sets.train, replace(dataset.transform, seed=1))
    assert not collate(reseeded.__getitems__([(p, p % 3) for p in range(6)])).timesteps.equal(together.timesteps)


def test_an_image_that_goes_bad_later_has_no_weight(tmp_path):
    columns = broken(pickapic(n=4, labels=[1.0, 1.0, 0.0, 1.0]), 1, 2)
    columns["jpg_0"][3] = None
    batch = batch_of(columns, tmp_path, hflip=True, time_ids="real")
    assert batch.weight.tolist() == [1, 0, 0, 0] and batch.pair_id.tolist() == [0, 1, 2, 3]
    assert [row for row, _ in batch.bad] == [1, 2, 3]
    assert [reason.split(" (")[0] for _, reason in batch.bad] == [
        "rejected image cannot be decoded",
        "chosen image cannot be decoded",
        "jpg_0 is missing",
    ]
    assert batch.pixels[[1, 5]].eq(0).all() and batch.pixels[[0, 4]].ne(0).any()
    assert batch.time_ids[1].tolist() == [32, 32, 0, 0, 32, 32]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 0}, "resolution"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"caption_dropout": float("nan")}, "caption_dropout"),
        ({"time_ids": "true"}, "time_ids"),
    ],
)
def test_settings_out_of_range(options, said):
    with pytest.raises(BadInput, match=said):
        transform(**options)


def test_the_real_sample_as_pixels(sample):
    source = open_pairs(sample)
    sets = build_index(source, seed=0, progress=False)
    batch = collate(PairDataset(source, sets.train, transform(resolution=64)).__getitems__([(p, 0) for p in range(6)]))
    assert batch.pixels[0].equal(batch.pixels[1])  # rows 0 and 1 were both won by image 1
    assert batch.pixels.flatten(1).unique(dim=0).shape[0] == 4 and not batch.bad


def test_write_pickapic_is_what_the_other_tests_train_on(tmp_path):
    sets = build_index(open_pairs(write_pickapic(tmp_path / "a.parquet", n=4)), seed=0, progress=False)
    assert len(sets.train) == 4 and sets.train.chosen.tolist() == [0, 1, 0, 1]
