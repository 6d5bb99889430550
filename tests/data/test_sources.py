"""Every layout gives the same pairs; what cannot be opened says why in one line."""

import json
import os

import datasets
import pyarrow as pa
import pytest

from dpo_fast.data import BadImage, BadRow, StreamedSource
from dpo_fast.data.pairs_source import _split_of
from dpo_fast.errors import BadInput, Unresponsive
from tests.helpers.pairs import (
    as_image_feature,
    open_pairs,
    pickapic,
    preference,
    write_arrow_file,
    write_jsonl,
    write_pickapic,
    write_table,
)

COLUMNS = pickapic(n=5)
DECIDED = preference(COLUMNS)


def renamed(columns, **names):
    return {names.get(name, name): values for name, values in columns.items()}


def parquet_with_features(path):
    as_image_feature(COLUMNS).to_parquet(path)
    return path


def saved(path, columns=COLUMNS):
    as_image_feature(columns).save_to_disk(path)
    return path


def saved_dict(path):
    datasets.DatasetDict({"train": as_image_feature(COLUMNS)}).save_to_disk(path)
    return path


def sharded(path):
    for shard, rows in enumerate((slice(0, 2), slice(2, 5))):
        part = {name: values[rows] for name, values in COLUMNS.items()}
        write_table(path / "data" / f"train-0000{shard}-of-00002-0abc12.parquet", part)
    write_table(path / "data" / "validation_unique-00000-of-00001.parquet", pickapic(n=2, seed=1))
    return path


# name -> (what makes it, keywords, are the two images in the order chosen, rejected)
LAYOUTS = {
    "parquet of bytes": (lambda t: write_table(t / "a.parquet", COLUMNS), {}, False),
    "parquet of Image features": (lambda t: parquet_with_features(t / "a.parquet"), {}, False),
    "arrow file": (lambda t: write_arrow_file(t / "a.arrow", COLUMNS), {}, False),
    "saved data set": (lambda t: saved(t / "saved"), {}, False),
    "saved dict of splits": (lambda t: saved_dict(t / "saved"), {}, False),
    "folder of shards": (lambda t: sharded(t / "shards"), {}, False),
    "chosen and rejected": (lambda t: write_table(t / "a.parquet", DECIDED), {}, True),
    "chosen and rejected features": (lambda t: saved(t / "saved", DECIDED), {}, True),
    "JSONL folder": (lambda t: write_jsonl(t / "folder", COLUMNS), {}, True),
    "JSONL folder, metadata.jsonl": (lambda t: write_jsonl(t / "folder", COLUMNS, "metadata.jsonl"), {}, True),
    "JSONL file": (lambda t: write_jsonl(t / "folder", COLUMNS) / "train.jsonl", {}, True),
    "other names": (
        lambda t: write_table(t / "a.parquet", renamed(COLUMNS, jpg_0="left", jpg_1="right", label_0="p", caption="q")),
        {"image_columns": ("left", "right"), "label_column": "p", "caption_column": "q"},
        False,
    ),
    "other names without a label": (
        lambda t: write_table(t / "a.parquet", renamed(DECIDED, chosen="winner", rejected="loser")),
        {"image_columns": ("winner", "loser"), "label_column": "none"},
        True,
    ),
}


def expected_rows(decided: bool):
    table = DECIDED if decided else COLUMNS
    first, second = (table[name] for name in (("chosen", "rejected") if decided else ("jpg_0", "jpg_1")))
    return COLUMNS["caption"], [1.0] * 5 if decided else COLUMNS["label_0"], list(zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    make, options, decided = LAYOUTS[layout]
    captions, labels, images = expected_rows(decided)
    source = open_pairs(make(tmp_path), **options)
    assert len(source) == 5
    assert source.captions() == captions
    assert source.labels() == labels
    assert [source.image_bytes(row) for row in range(5)] == images
    assert source.missing_images() == []
    assert "5 rows" in source.description and "rows=5" in source.identity.rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_streamed(layout, tmp_path):
    make, options, decided = LAYOUTS[layout]
    path = make(tmp_path)
    source = open_pairs(path, streaming=True, **options)
    assert isinstance(source, StreamedSource)
    for _ in range(2):  # every call reads from the first row
        rows = list(source.rows())
        assert [row.row for row in rows] == list(range(5))
        assert ([r.caption for r in rows], [r.label for r in rows], [r.images for r in rows]) == expected_rows(decided)
    assert source.identity.rows != open_pairs(path, **options).identity.rows


# a name -> a neighbour that it would match as a pattern, or be taken for
ODD_NAMES = {
    "run[1]": "run1",
    "w?t": "wat",
    "a*b": "acb",
    "[!a]": "b",
    "a::b": "a",
    "file:x": "x",
    "hf:": "hf",
    "~tmp": "tmp",
    "{x}": "x",
    "#": "h",
    "%20": " ",
    " sp ": "sp",
    "-x": "x",
    "bäume": "baume",
    "two\nlines": "two",
    "$X": "x",
    "${X}": "x",
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_names_that_file_and_no_other(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("X", "x")
    for text, folder in (("neighbour", ODD_NAMES[name]), ("right", name)):
        columns = pickapic(n=2, captions=[text] * 2, size=8)
        write_table(tmp_path / folder / "train.parquet", columns)
        write_arrow_file(tmp_path / f"{folder}.arrow", columns)
    (tmp_path / "other").mkdir()
    as_image_feature(pickapic(n=2, captions=["right"] * 2, size=8)).save_to_disk(tmp_path / "other" / "saved")
    os.rename(tmp_path / "other" / "saved", tmp_path / f"saved {name}")
    write_jsonl(tmp_path / f"lines {name}", pickapic(n=2, captions=["right"] * 2, size=8))
    for given in (name, f"{name}.arrow", tmp_path / name / "train.parquet", f"saved {name}", f"./lines {name}"):
        for streaming in (False, True):
            source = open_pairs(given, streaming=streaming, cache_dir="cache[1]")
            captions = [row.caption for row in source.rows()] if streaming else source.captions()
            assert captions == ["right"] * 2, (given, streaming)


def test_a_file_whose_name_needs_a_link_is_copied_once_and_again_when_it_changes(tmp_path):
    file = write_pickapic(tmp_path / "a::b.parquet", n=3, size=8)
    stamps = {open_pairs(file, cache_dir=tmp_path / "cache").identity.stamp for _ in range(2)}
    assert len(stamps) == 1
    write_pickapic(file, n=4, size=8)
    source = open_pairs(file, cache_dir=tmp_path / "cache")
    assert len(source) == 4 and source.identity.stamp not in stamps


def test_a_cache_in_which_sets_would_be_mixed_up_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"a::b.*--cache_dir"):
        open_pairs(write_pickapic(tmp_path / "a.parquet", n=2), cache_dir=tmp_path / "a::b")
    with pytest.raises(BadInput, match=r"a\$X.*--cache_dir"):
        open_pairs(write_pickapic(tmp_path / "a::b.parquet", n=2), cache_dir=tmp_path / "a$X")


def test_the_real_sample(sample):
    source = open_pairs(sample)
    assert source.labels() == [1, 0, 1, 0, 1, 0, 0.5]
    assert len(set(source.captions())) == 1
    images = {image for row in range(7) for image in source.image_bytes(row)}
    assert len(images) == 4 and all(image.startswith(b"\xff\xd8") for image in images)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", [lambda t: write_table(t / "a.parquet", COLUMNS), lambda t: write_jsonl(t, COLUMNS)])
def test_max_rows(make, streaming, tmp_path):
    source = open_pairs(make(tmp_path), max_rows=3, streaming=streaming)
    captions = [row.caption for row in source.rows()] if streaming else source.captions()
    assert captions == COLUMNS["caption"][:3]
    with pytest.raises(BadInput, match="max_train_samples"):
        open_pairs(tmp_path, max_rows=0)


def test_images_are_not_decoded_to_read_labels_and_captions(tmp_path, monkeypatch):
    source = open_pairs(saved(tmp_path / "saved"))

    def touched(*_, **__):
        raise AssertionError("an image was touched")

    monkeypatch.setattr(datasets.Image, "decode_example", touched)
    monkeypatch.setattr("dpo_fast.data.sources._embedded", touched)
    assert source.captions() == COLUMNS["caption"] and source.labels() == COLUMNS["label_0"]


def test_splits(tmp_path):
    folder = sharded(tmp_path / "shards")
    assert len(open_pairs(folder, split="validation_unique")) == 2
    with pytest.raises(BadInput, match=r"no split 'val': .*--dataset_split_name: train, validation_unique"):
        open_pairs(folder, split="val")
    two = tmp_path / "two"
    for name in ("good.jsonl", "better.jsonl"):
        write_jsonl(two, COLUMNS, name)
    with pytest.raises(BadInput, match=r"no split 'train': .*better, good"):
        open_pairs(two)
    assert open_pairs(two, split="good").identity.rows != open_pairs(two, split="better").identity.rows


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-00000-of-00645-b66ac786bf6fb553.parquet", "train"),
        ("data/validation_unique-00000-of-00002.parquet", "validation_unique"),
        ("0000.parquet", "train"),
        ("part-0001.parquet", "train"),
        ("test/0000.parquet", "test"),
        ("default/train/part-3.parquet", "train"),
        ("metadata.jsonl", "metadata"),
    ],
)
def test_split_names_of_files(file, split, tmp_path):
    assert _split_of(tmp_path / file, tmp_path) == split


def test_identity_is_about_content_not_place(tmp_path):
    first = open_pairs(write_pickapic(tmp_path / "a" / "pairs.parquet", n=3))
    second = open_pairs(write_pickapic(tmp_path / "b" / "pairs.parquet", n=3))
    longer = open_pairs(write_pickapic(tmp_path / "c" / "pairs.parquet", n=4))
    swapped = open_pairs(tmp_path / "a" / "pairs.parquet", image_columns=("jpg_1", "jpg_0"), label_column="label_0")
    assert first.identity.rows == second.identity.rows
    assert len({first.identity.rows, longer.identity.rows, swapped.identity.rows}) == 3


# name -> (what makes it, keywords, what the error says)
BAD = {
    "not there": (lambda t: t / "nowhere", {}, "does not exist"),
    "relative, not there": (lambda t: "./nowhere/data", {}, "does not exist"),
    "empty folder": (lambda t: t, {}, "holds no .jsonl, .parquet or .arrow"),
    "another file type": (lambda t: (t / "a.csv").write_text("a,b") and t / "a.csv", {}, "Pick-a-Pic"),
    "broken parquet": (
        lambda t: (t / "a.parquet").write_bytes(b"PAR1junk") and t / "a.parquet",
        {},
        "cannot be opened",
    ),
    "broken arrow": (lambda t: (t / "a.arrow").write_bytes(b"junk") and t / "a.arrow", {}, "cannot be opened"),
    "broken saved data set": (lambda t: (t / "state.json").write_text("{") and t, {}, "cannot be opened"),
    "no images": (lambda t: write_table(t / "a.parquet", {"caption": ["a"]}), {}, "columns are caption"),
    "no label": (
        lambda t: write_table(t / "a.parquet", {k: v for k, v in COLUMNS.items() if k != "label_0"}),
        {},
        "--label_column, or 'none'",
    ),
    "no caption": (
        lambda t: write_table(t / "a.parquet", {k: v for k, v in COLUMNS.items() if k != "caption"}),
        {},
        "--caption_column",
    ),
    "unknown column": (lambda t: write_table(t / "a.parquet", COLUMNS), {"caption_column": "text"}, "no column 'text'"),
    "one image column": (
        lambda t: write_table(t / "a.parquet", COLUMNS),
        {"image_columns": ("jpg_0",)},
        "two different",
    ),
    "text preferences": (
        lambda t: write_table(t / "a.parquet", {"prompt": ["a"], "chosen": ["yes"], "rejected": ["no"]}),
        {},
        "'chosen' holds text, not images",
    ),
    "numbers for images": (
        lambda t: write_table(t / "a.parquet", {"prompt": ["a"], "chosen": [1], "rejected": [2]}),
        {},
        "not images",
    ),
    "config of a local set": (lambda t: write_table(t / "a.parquet", COLUMNS), {"config_name": "x"}, "config_name"),
    "broken JSON": (lambda t: (t / "train.jsonl").write_text('{"prompt": 1}\n{oops\n') and t, {}, "line 2 is not JSON"),
    "JSON list": (lambda t: (t / "train.jsonl").write_text("[1]\n") and t, {}, "line 1 is not an object"),
    "latin-1": (lambda t: (t / "train.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n') and t, {}, "UTF-8"),
    "empty JSONL": (lambda t: (t / "train.jsonl").write_text("\n") == 1 and t, {}, "is empty"),
    "hub, offline": (lambda t: "nobody/none", {}, "'nobody/none' cannot be opened"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, streaming, tmp_path):
    make, options, said = BAD[case]
    with pytest.raises(BadInput) as caught:
        open_pairs(make(tmp_path), streaming=streaming, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_hub(tmp_path, monkeypatch):
    """A hub id settles its split first and loads that one only; nothing is fetched in this test."""
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        table = as_image_feature(COLUMNS)
        return table.to_iterable_dataset() if kwargs["streaming"] else table

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, **_: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_pairs("some/set", config_name="big", revision="abc", cache_dir=tmp_path)
    assert source.image_bytes(0) == (COLUMNS["jpg_0"][0], COLUMNS["jpg_1"][0])
    assert calls[0] == (
        ("some/set", "big"),
        {"split": "train", "streaming": False, "cache_dir": str(tmp_path), "revision": "abc", "token": None},
    )
    assert "some/set/big@abc" in source.identity.rows
    streamed = open_pairs("some/set", streaming=True, split="test")
    assert [row.images[0] for row in streamed.rows()] == COLUMNS["jpg_0"]
    with pytest.raises(BadInput, match="train, test"):
        open_pairs("some/set", split="validation")


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), KeyError("features"), Exception("httpx: timed out")])
def test_a_failing_hub_is_one_line(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(BadInput, match=r"^data set 'some/set' cannot be opened: [^\n]+$"):
        open_pairs("some/set")


def test_a_parquet_without_rows(tmp_path):
    nothing = write_pickapic(tmp_path / "set" / "train-00000-of-00002.parquet", n=0)
    for streaming in (False, True):
        with pytest.raises(BadInput, match="is empty: it has no rows"):
            open_pairs(nothing, streaming=streaming)
    write_pickapic(tmp_path / "set" / "train-00001-of-00002.parquet", n=3)
    assert len(open_pairs(tmp_path / "set")) == 3  # one empty shard is no fault


def test_opening_is_quiet_and_leaves_the_bars_as_they_were(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    whole = write_pickapic(tmp_path / "pairs.parquet", n=3)
    cut = write_arrow_file(tmp_path / "cut.arrow", COLUMNS)
    cut.write_bytes(cut.read_bytes()[:-2000])
    datasets.enable_progress_bars()
    try:
        open_pairs(whole)
        with pytest.raises(BadInput):
            open_pairs(cut)
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()
    assert capfd.readouterr() == ("", "")


def test_a_stream_that_breaks_off_says_where(monkeypatch, tmp_path):
    def broken():
        yield {name: values[0] for name, values in COLUMNS.items()}
        raise ConnectionError("peer\nreset")

    table = datasets.IterableDataset.from_generator(
        broken,
        features=datasets.Features.from_arrow_schema(
            pa.schema({"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "caption": pa.string()})
        ),
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    rows = open_pairs("some/set", streaming=True).rows()
    assert next(rows).row == 0
    with pytest.raises(Unresponsive, match=r"broke off after 1 rows.*peer reset.*resumed"):
        next(rows)


def test_a_null_image_names_its_column(tmp_path):
    columns = {**COLUMNS, "jpg_1": [None, *COLUMNS["jpg_1"][1:]]}
    source = open_pairs(write_table(tmp_path / "a.parquet", columns))
    with pytest.raises(BadImage, match=r"^jpg_1 is missing$"):
        source.image_bytes(0)
    row = next(open_pairs(tmp_path / "a.parquet", streaming=True).rows())
    assert row.images[0] == COLUMNS["jpg_0"][0] and str(row.images[1]) == "jpg_1 is missing"


def test_an_image_that_is_only_a_path_is_not_read(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(COLUMNS["jpg_0"][0])
    cell = {"bytes": None, "path": str(tmp_path / "secret.jpg")}
    source = open_pairs(write_table(tmp_path / "a.parquet", {**COLUMNS, "jpg_0": [cell] * 5}))
    with pytest.raises(BadImage, match="jpg_0 is not embedded"):
        source.image_bytes(0)


def test_paths_stay_inside_the_folder(tmp_path):
    folder = write_jsonl(tmp_path / "set", COLUMNS)
    (tmp_path / "outside.jpg").write_bytes(COLUMNS["jpg_0"][0])
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inner.jpg").symlink_to(folder / "images" / "0-chosen.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    good = "images/0-rejected.jpg"
    hostile = {
        "../outside.jpg": "leads out",
        str(tmp_path / "outside.jpg"): "leads out",
        "link.jpg": "leads out",
        "up/outside.jpg": "leads out",
        "images/../../outside.jpg": "leads out",
        "loop.jpg": "not an existing file",
        "pipe.jpg": "not an existing file",
        "images": "not an existing file",
        "images/none.jpg": "not an existing file",
        "x" * 5000: "not an existing file",
        "nul\0.jpg": "not a file path",
        "half \ud800": "not a file path",
        "": "not a file path",
        5: "not a file path",
        None: "not a file path",
    }
    lines = [{"prompt": "a", "chosen": path, "rejected": good} for path in (*hostile, "inner.jpg")]
    lines += [{"prompt": "a", "rejected": good}]  # no key at all
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_pairs(folder)
    missing = source.missing_images()
    assert [bad.row for bad in missing] == [*range(len(hostile)), len(hostile) + 1]  # a link inside the folder is fine
    assert all(isinstance(bad, BadRow) and bad.column == "chosen" for bad in missing)
    for bad, reason in zip(missing, hostile.values(), strict=False):
        assert reason in bad.reason
        with pytest.raises(BadImage, match=f"^chosen .*{reason}"):
            source.image_bytes(bad.row)
    assert source.image_bytes(len(hostile)) == (DECIDED["chosen"][0], DECIDED["rejected"][0])


def test_lines_in_a_snapshot_of_the_hubs_cache(tmp_path):
    """Every file there is a link into the repository's blobs; one into another repository's is refused."""
    repository, other = tmp_path / "datasets--me--set", tmp_path / "datasets--you--set"
    snapshot = write_jsonl(repository / "snapshots" / "abc", COLUMNS)
    (repository / "blobs").mkdir()
    (other / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(snapshot.rglob("*.*"))):
        blob = (other if file.name == "2-chosen.jpg" else repository) / "blobs" / f"{number:040d}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    for given in (snapshot, snapshot / "train.jsonl"):
        source = open_pairs(given)
        assert [(bad.row, bad.column) for bad in source.missing_images()] == [(2, "chosen")]
        assert source.image_bytes(3) == (DECIDED["chosen"][3], DECIDED["rejected"][3])
    lines = [{"prompt": "a", "chosen": f"../../blobs/{0:040d}", "rejected": "images/1-chosen.jpg"}]
    (snapshot / "named.jsonl").write_text(json.dumps(lines[0]))
    assert "leads out" in open_pairs(snapshot / "named.jsonl").missing_images()[0].reason
