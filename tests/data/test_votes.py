"""Rows that say nothing: without a label, with one image twice, contradicted by as many others; and rows that recur."""

import json

import numpy as np
import pytest
import torch

from dpo_fast.data import BadRow, PairDataset, PairTransform, StreamedPairs, build_index, collate
from dpo_fast.data.images import SAME
from dpo_fast.data.votes import count_votes
from dpo_fast.errors import BadInput
from tests.helpers.pairs import open_pairs, pickapic, write_jsonl, write_table


def counts(sets) -> tuple:
    kept = len(sets.train) + len(sets.validation)
    left_out = sets.ties_dropped + sets.unlabelled + (sets.contradicted or 0) + sets.shared_with_validation
    assert sets.rows == kept + left_out + sets.bad_rows
    return sets.ties_dropped, sets.unlabelled, sets.contradicted, sets.duplicates, sets.bad_rows


def index_of(path, columns, **options):
    options = {"seed": 0, "progress": False, **options}
    return build_index(open_pairs(write_table(path / "pairs.parquet", columns)), **options)


def test_count_votes_against_counting_by_hand():
    random = np.random.default_rng(0)
    captions = [f"c{k}" for k in random.integers(0, 3, 200)]
    pairs = [(f"i{a}", f"i{b}") for a, b in random.integers(0, 4, (200, 2))]
    names = [None if k % 17 == 0 else pair for k, pair in enumerate(pairs)]
    chosen = random.integers(0, 2, 200).tolist()
    repeated, even = 0, set()
    for row in range(200):
        if names[row] is None or names[row][0] == names[row][1]:
            continue
        alike = [k for k in range(200) if captions[k] == captions[row] and names[k] in (names[row], names[row][::-1])]
        won = [names[k][chosen[k]] for k in alike]
        repeated += names[row][chosen[row]] in won[: alike.index(row)]
        if won.count(names[row][0]) == won.count(names[row][1]):
            even.add(tuple(alike))
    votes = count_votes(captions, chosen, names.__getitem__)
    assert votes.repeated == repeated > 10
    assert {tuple(rows) for rows in votes.even} == even and len(even) > 1


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_label_never_train(streaming, tmp_path):
    """Pick-a-Pic v2: has_label is False, label_0 holds a number all the same; or both images have the same label."""
    columns = pickapic(n=8, size=8, labels=[1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 1.0, -1.0])
    columns["label_1"] = [0.0, 1.0, 0.0, 1.0, 1.0, 0.5, 0.0, -1.0]
    columns["has_label"] = [True, True, True, True, False, True, None, False]
    if streaming:
        pairs = streamed(write_table(tmp_path / "pairs.parquet", columns), batch_size=3)
        (batch,) = pairs.batches(0, 1)
        assert sorted(batch.pair_id.tolist()) == [0, 1, 6]
        assert (pairs.rows, pairs.ties_dropped, pairs.unlabelled, pairs.bad_rows) == (8, 3, 2, 0)
        return
    sets = index_of(tmp_path, columns)
    assert sets.train.pair_id.tolist() == [0, 1, 6] and sets.train.chosen.tolist() == [0, 1, 0]
    assert counts(sets) == (3, 2, None, None, 0) and "2 without a label" in sets.left_out
    soft = index_of(tmp_path, columns, soft_labels=True)
    assert soft.train.pair_id.tolist() == [0, 1, 2, 3, 5, 6] and soft.train.label.tolist() == [1, 1, 0.5, 0.5, 0.5, 1]
    assert len(index_of(tmp_path, columns, soft_labels=True, for_scorers=True).train) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_two_labels_that_do_not_sum_to_one_are_a_bad_row(streaming, tmp_path):
    columns = pickapic(n=6, size=8, labels=[1.0, 0.5, 1.0, 0.3, 1.0, 0.0])
    columns["label_1"] = [0.5, 0.0, 0.0, 0.7, None, float("nan")]
    path = write_table(tmp_path / "pairs.parquet", columns)
    if streaming:
        pairs = streamed(path, batch_size=4, soft_labels=True, max_bad_fraction=0.5)
        (batch,) = pairs.batches(0, 1)
        assert sorted(batch.pair_id.tolist()) == [2, 3, 4, 5]
        bad = pairs.bad
    else:
        sets = index_of(tmp_path, columns, soft_labels=True, max_bad_fraction=0.5)
        assert sets.train.pair_id.tolist() == [2, 3, 4, 5]
        bad = sets.bad
        assert len(index_of(tmp_path, columns, soft_labels=True, for_scorers=True).train) == 6
    assert [(row.row, f"{row.column} {row.reason}") for row in bad] == [
        (0, "label_0 (1) and label_1 (0.5) do not sum to 1"),
        (1, "label_0 (0.5) and label_1 (0) do not sum to 1"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", ["False", 2, 0.5])
def test_has_label_that_is_no_boolean_is_refused(value, streaming, tmp_path):
    columns = {**pickapic(n=3, size=8), "has_label": [None, value, None]}
    with pytest.raises(BadInput, match=rf"^row 1: has_label is {value!r}; it must be [^\n]+$"):
        if streaming:
            next(streamed(write_table(tmp_path / "pairs.parquet", columns), batch_size=3).batches(0, 1))
        else:
            index_of(tmp_path, columns)


@pytest.mark.parametrize("values", [[True, False, None], [1, 0, None], [1.0, 0.0, float("nan")]])
def test_has_label_as_boolean_or_number(values, tmp_path):
    sets = index_of(tmp_path, {**pickapic(n=3, size=8), "has_label": values})
    assert sets.train.pair_id.tolist() == [0, 2] and sets.unlabelled == 1


def test_has_label_is_about_label_0_only(tmp_path):
    columns = {**pickapic(n=3, size=8), "has_label": [False] * 3, "mine": [1.0, 0.0, 1.0]}
    source = open_pairs(write_table(tmp_path / "a.parquet", columns), label_column="mine")
    assert source.labels() == [1.0, 0.0, 1.0]


def test_lines_without_a_label(tmp_path):
    folder = write_jsonl(tmp_path / "set", pickapic(n=3, size=8))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line, has in zip(lines, (True, False, None), strict=True):
        line |= {"label_0": 1, "has_label": has}
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sets = build_index(open_pairs(folder, label_column="label_0"), seed=0, progress=False)
    assert sets.train.pair_id.tolist() == [0, 2] and sets.unlabelled == 1


def votes_set(n=8):
    """Rows 0 and 1 contradict each other, 2 and 3 are one vote twice, 4 and 5 against 6; 7 has one image twice."""
    columns = pickapic(n=n, size=8, labels=[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], captions=list("aabbcccd"))
    first, second = columns["jpg_0"], columns["jpg_1"]
    first[1], second[1] = second[0], first[0]
    first[3], second[3] = second[2], first[2]
    first[5:7], second[5:7] = [first[4]] * 2, [second[4]] * 2
    second[7] = first[7]
    return columns


LEFT = [2, 3, 4, 5, 6]


def test_contradictions_and_duplicates_by_names(tmp_path):
    columns = votes_set()
    uids = {image: f"uid {k}" for k, image in enumerate(dict.fromkeys([*columns["jpg_0"], *columns["jpg_1"]]))}
    columns |= {f"image_{side}_uid": [uids[image] for image in columns[f"jpg_{side}"]] for side in (0, 1)}
    sets = index_of(tmp_path, columns)
    assert sets.train.pair_id.tolist() == LEFT and counts(sets) == (0, 0, 2, 2, 1)
    assert sets.bad[0].row == 7 and sets.bad[0].reason == SAME
    assert "2 dropped because" in sets.left_out and "2 duplicates kept" in sets.left_out
    soft = index_of(tmp_path, columns, soft_labels=True)
    assert soft.train.pair_id.tolist() == [0, 1, *LEFT] and soft.contradicted == 0


def test_wrong_names_leave_nothing_out(tmp_path):
    columns = pickapic(n=6, size=8, captions=["one"] * 6)
    columns |= {"image_0_uid": ["x"] * 6, "image_1_uid": ["y"] * 6}
    assert len(index_of(tmp_path, columns).train) == 6
    columns |= {"image_1_uid": ["x"] * 6}
    assert len(index_of(tmp_path, columns).train) == 6
    columns |= {"image_0_uid": [""] * 6, "image_1_uid": [None] * 6}
    assert counts(index_of(tmp_path, columns)) == (0, 0, 0, 0, 0)


def test_contradictions_where_validation_hashes_every_image(tmp_path):
    sets = index_of(tmp_path, votes_set(), validation_fraction=0.3)
    assert sorted([*sets.train.pair_id.tolist(), *sets.validation.pair_id.tolist()]) == LEFT
    assert counts(sets) == (0, 0, 2, 2, 1)


def test_contradictions_in_lines_by_their_paths(tmp_path):
    folder = write_jsonl(tmp_path / "set", pickapic(n=4, size=8, captions=["a"] * 4))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines[1] |= {"chosen": "./" + lines[0]["rejected"], "rejected": lines[0]["chosen"]}
    lines[3]["rejected"] = lines[3]["chosen"]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sets = build_index(open_pairs(folder), seed=0, progress=False)
    assert sets.train.pair_id.tolist() == [2] and counts(sets) == (0, 0, 2, 0, 1)


def test_only_contradictions(tmp_path):
    columns = {name: values[:2] for name, values in votes_set().items()}
    with pytest.raises(BadInput, match=r"no training pair is left.*2 dropped because as many rows say the opposite"):
        index_of(tmp_path, columns | {"image_0_uid": ["x", "y"], "image_1_uid": ["y", "x"]})


def transform():
    return PairTransform(resolution=8, seed=0, timesteps=torch.arange(1000))


def streamed(path, batch_size, **options):
    source = open_pairs(path, streaming=True)
    options = {"pairs_per_step": batch_size, "batch_size": batch_size, "progress": False, **options}
    return StreamedPairs(source, transform(), **options)


def test_one_image_twice_has_weight_0_where_it_shows_late(tmp_path):
    columns = votes_set()
    sets = index_of(tmp_path, columns)
    assert counts(sets) == (0, 0, None, None, 1) and sets.bad == [BadRow(7, "jpg_1", SAME)]  # it was looked at
    assert len(index_of(tmp_path, columns, soft_labels=True, for_scorers=True).train) == 8
    sets = index_of(tmp_path, columns, check_pairs=0)
    assert counts(sets) == (0, 0, None, None, 0)  # nothing is known of the images
    dataset = PairDataset(open_pairs(tmp_path / "pairs.parquet"), sets.train, transform())
    batch = collate(dataset.__getitems__([(k, 0) for k in range(8)]))
    assert batch.weight.tolist() == [1.0] * 7 + [0.0]
    assert batch.bad == [(7, f"rejected image {SAME}")]


def test_one_image_twice_is_left_out_of_a_stream(tmp_path):
    pairs = streamed(write_table(tmp_path / "pairs.parquet", votes_set()), batch_size=7)
    (batch,) = pairs.batches(0, 1)
    assert sorted(batch.pair_id.tolist()) == list(range(7)) and pairs.bad[0].reason == SAME
