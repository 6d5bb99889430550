"""Shards of records: what is written is found again, and what was cut off is taken up where it was."""

import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpo_fast.caching.reader import CachedItems
from dpo_fast.caching.recipe import cache_recipe, caption_key, mirrored
from dpo_fast.checksums import Damaged
from dpo_fast.data.images import image_key
from dpo_fast.errors import BadInput
from dpo_fast.store import (
    Field,
    Recipe,
    Store,
    Writer,
    begin_folder,
    drop_damaged,
    finish_orphans,
    locked,
    log_keys,
    mend,
    remove_shard,
    writing,
)
from tests.data.conftest import no_bars, own_cache  # noqa: F401  the user's data set cache stays as it is

FIELDS = (Field("wide", (3, 4)), Field("pooled", (5,)), Field("exact", (2,), "float32"))
RECIPE = cache_recipe("text", {"encoder": "abc"}, FIELDS)
SIZE = RECIPE.record_bytes  # 42


def items(n: int) -> dict[bytes, tuple[bytes, object]]:
    """Keys -> (record, meta)."""
    return {random.randbytes(16): (random.randbytes(SIZE), [i, 2 * i] if i % 3 else None) for i in range(n)}


def write(root: Path, entries: dict, rank: int = 0) -> None:
    begin_folder(root, RECIPE)
    with Writer(root, RECIPE, rank) as writer:
        for key, (record, meta) in entries.items():
            if key not in writer.pending:
                writer.add(key, record, meta)


def assert_holds(root: Path, entries: dict) -> None:
    there = Store(root, RECIPE)
    assert len(there) == len(entries) and there.keys() == set(entries)
    found = there.find(list(entries))
    for (key, (record, meta)), shard, row in zip(entries.items(), found.shard, found.row, strict=True):
        assert there.record(shard, row).tobytes() == record, key
        assert there.meta(shard, row) == meta


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * SIZE + 1)  # four records


@pytest.mark.parametrize("n", [0, 1, 4, 5, 41])
def test_what_is_written_is_found(tmp_path, n):
    entries = items(n)
    write(tmp_path, entries)
    assert_holds(tmp_path, entries)
    folder = tmp_path / RECIPE.folder_name
    assert len(list(folder.glob("shard-*.bin"))) == -(-n // 4)
    assert not list(folder.glob("*.part")) and not list(folder.glob("*.log"))
    missing = Store(tmp_path, RECIPE).find([bytes(16)])
    assert missing.shard.tolist() == [-1]


def test_keys_that_share_their_first_half_are_told_apart(tmp_path):
    head = random.randbytes(8)
    entries = {head + bytes([i]) * 8: (random.randbytes(SIZE), i) for i in range(6)}
    write(tmp_path, entries)
    assert_holds(tmp_path, entries)


def test_records_come_back_as_tensors(tmp_path):
    wide, pooled = np.random.randn(3, 4).astype(np.float16), np.random.randn(5).astype(np.float16)
    exact = np.random.randn(2).astype(np.float32)
    key = image_key(b"x")
    write(tmp_path, {key: (wide.tobytes() + pooled.tobytes() + exact.tobytes(), None)})
    read = CachedItems(Store(tmp_path, RECIPE)).read([key, None, key])
    for name, value in (("wide", wide), ("pooled", pooled), ("exact", exact)):
        assert read[name].numpy().dtype == value.dtype
        assert (read[name][0].numpy() == value).all() and (read[name][2].numpy() == value).all()
        assert (read[name][1] == 0).all()
    with pytest.raises(KeyError, match="no entry"):
        CachedItems(Store(tmp_path, RECIPE)).read([image_key(b"y")])


@pytest.mark.parametrize("records", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("torn", ["nothing", "record", "log", "bytes"])
def test_an_interrupted_writer_is_taken_up(tmp_path, records, torn):
    """Cut at any place: the next writer has what was whole, and the files end as if nothing had happened."""
    entries = items(9)
    write(tmp_path / "whole", entries)
    begin_folder(tmp_path / "cut", RECIPE)
    writer = Writer(tmp_path / "cut", RECIPE, 0)
    for key, (record, meta) in list(entries.items())[:records]:
        writer.add(key, record, meta)
    folder = tmp_path / "cut" / RECIPE.folder_name
    part, log = next(folder.glob("*.part"), None), next(folder.glob("*.log"), None)
    if part is not None:
        if torn == "record":  # the record was written, its line was not
            with part.open("ab") as file:
                file.write(random.randbytes(SIZE - 7))
        elif torn == "log":
            with log.open("ab") as file:
                file.write(b'["00')
        elif torn == "bytes":  # the line arrived on the disk before the record did
            with part.open("r+b") as file:
                file.seek(-3, 2)
                file.write(b"???")
    kept = records % 4 - (torn == "bytes" and part is not None)
    again = Writer(tmp_path / "cut", RECIPE, 0)
    assert again.pending == list(entries)[records - records % 4 :][:kept]
    assert log_keys(folder) == set(again.pending)
    done = Store(tmp_path / "cut", RECIPE).keys() | set(again.pending)
    with again:
        for key, (record, meta) in entries.items():
            if key not in done:
                again.add(key, record, meta)
    assert_holds(tmp_path / "cut", entries)
    whole = tmp_path / "whole" / RECIPE.folder_name
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["part", "log"])
def test_a_bit_that_flipped_in_an_unfinished_shard_is_no_entry(tmp_path, kind):
    """A record, its key, its checksum or what is noted beside it: the record is encoded again, as are those behind."""
    entries = items(3)
    begin_folder(tmp_path, RECIPE)
    writer = Writer(tmp_path, RECIPE, 0)
    for key, (record, meta) in entries.items():
        writer.add(key, record, meta)
    (file,) = (tmp_path / RECIPE.folder_name).glob(f"*.{kind}")
    before = {path: path.read_bytes() for path in file.parent.iterdir()}
    data = file.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 97)):
        for path, kept in before.items():
            path.write_bytes(kept)
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        again = Writer(tmp_path, RECIPE, 0)
        assert again.pending == list(entries)[: place * 3 // len(data) if kind == "part" else data[:place].count(b"\n")]
        for key in list(entries)[len(again.pending) :]:
            again.add(key, *entries[key])
        with again:
            pass
        assert_holds(tmp_path, entries)
        shutil.rmtree(file.parent)
        file.parent.mkdir()


@pytest.mark.parametrize("stopped_at", ["renamed", "indexed"])
def test_a_writer_killed_while_it_completed_a_shard(tmp_path, monkeypatch, stopped_at):
    entries = items(6)
    write(tmp_path / "whole", entries)

    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    begin_folder(tmp_path / "cut", RECIPE)
    writer = Writer(tmp_path / "cut", RECIPE, 0)
    with monkeypatch.context() as patched:
        if stopped_at == "renamed":
            patched.setattr(writing, "write_signed_json", kill)
        else:
            patched.setattr(Path, "unlink", kill)
        with pytest.raises(Killed):
            for key, (record, meta) in entries.items():
                writer.add(key, record, meta)
    writer = Writer(tmp_path / "cut", RECIPE, 0)
    there = Store(tmp_path / "cut", RECIPE).keys() | set(writer.pending)
    assert there == set(list(entries)[:4])
    with writer:
        for key in list(entries)[4:]:
            writer.add(key, *entries[key])
    folders = [tmp_path / name / RECIPE.folder_name for name in ("whole", "cut")]
    whole, cut = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert whole == cut


def test_an_unfinished_shard_is_taken_up_though_an_earlier_one_was_deleted(tmp_path):
    """Killed in the third shard; then the first was found damaged and removed."""
    entries = items(11)
    begin_folder(tmp_path, RECIPE)
    writer = Writer(tmp_path, RECIPE, 0)
    for key, value in list(entries.items())[:10]:
        writer.add(key, *value)
    folder = tmp_path / RECIPE.folder_name
    remove_shard(folder / "shard-0-00000.json")
    again = Writer(tmp_path, RECIPE, 0)
    assert again.pending == list(entries)[8:10]
    there = Store(tmp_path, RECIPE).keys() | log_keys(folder)
    assert there == set(list(entries)[4:10])
    with again:
        for key, value in entries.items():
            if key not in there:
                again.add(key, *value)
    assert Store(tmp_path, RECIPE).keys() == set(entries)
    assert sorted(p.name for p in folder.glob("shard-*.bin")) == [f"shard-0-{n:05d}.bin" for n in range(3)]
    assert not log_keys(folder)


def test_ranks_write_side_by_side_and_fewer_ranks_finish_for_more(tmp_path):
    entries = items(14)
    shares = [dict(list(entries.items())[rank::3]) for rank in range(3)]
    write(tmp_path, shares[0], 0)
    for rank in (1, 2):
        writer = Writer(tmp_path, RECIPE, rank)  # killed before its last shard was complete
        for key, value in shares[rank].items():
            writer.add(key, *value)
    assert len(Store(tmp_path, RECIPE)) == len(shares[0]) + 4 + 4
    finish_orphans(tmp_path, RECIPE, 1)
    assert_holds(tmp_path, dict(sorted(entries.items(), key=lambda e: [e[0] in s for s in shares].index(True))))


def test_every_flipped_byte_is_noticed_when_it_is_read(tmp_path):
    entries = items(4)
    write(tmp_path, entries)
    (path,) = (tmp_path / RECIPE.folder_name).glob("*.bin")
    good = path.read_bytes()
    for place in random.sample(range(len(good)), 20):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << random.randrange(8)]) + good[place + 1 :])
        there = Store(tmp_path, RECIPE)
        for row in range(4):
            if row == place // SIZE:
                with pytest.raises(Damaged, match=f"record {row} is damaged"):
                    there.record(0, row)
            else:
                there.record(0, row)


def test_damaged_shards_are_refused_or_dropped(tmp_path):
    entries = items(12)
    write(tmp_path, entries)
    paths = sorted((tmp_path / RECIPE.folder_name).glob("*.bin"))
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(Damaged, match="was cut off"):
        Store(tmp_path, RECIPE)
    with locked(tmp_path / RECIPE.folder_name), pytest.raises(BadInput, match="is being written by"):
        drop_damaged(tmp_path, RECIPE)
    drop_damaged(tmp_path, RECIPE)
    assert Store(tmp_path, RECIPE).keys() == set(list(entries)[:4] + list(entries)[8:])
    assert not paths[1].exists() and not paths[1].with_suffix(".json").exists()
    rest = {key: entries[key] for key in list(entries)[4:8]}
    write(tmp_path, rest)
    assert paths[1].exists()  # in its old place


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    write(tmp_path, items(1))
    path = tmp_path / RECIPE.folder_name / "recipe.json"
    value = json.loads(path.read_text())
    value["facts"]["encoder"] = "xyz"
    path.write_text(json.dumps(value))
    with pytest.raises(BadInput, match=r"facts.encoder: abc -> xyz"):
        Store(tmp_path, RECIPE)


def test_recipes_and_keys_tell_apart_what_differs():
    others = [
        cache_recipe("latents", RECIPE.facts, RECIPE.fields),
        cache_recipe("text", {"encoder": "abd"}, RECIPE.fields),
        cache_recipe("text", RECIPE.facts, RECIPE.fields[:2]),
    ]
    assert len({recipe.folder_name for recipe in [RECIPE, *others]}) == 4
    assert Recipe.from_json(json.loads(json.dumps(RECIPE.as_json()))) == RECIPE
    key = image_key(b"image")
    assert len({key, mirrored(key), mirrored(mirrored(key)), image_key(b"Image")}) == 4
    assert caption_key("image") != caption_key("Image")
    assert len(mirrored(key)) == len(key) == len(caption_key("x")) == 16


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    with locked(tmp_path):
        with pytest.raises(BadInput, match="is being written by process "), locked(tmp_path):
            raise AssertionError("locked twice")
    with locked(tmp_path):
        pass


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_shard_that_the_disk_does_not_give_is_not_dropped(tmp_path, monkeypatch, number):
    entries = items(8)
    write(tmp_path, entries)
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.suffix == ".json" and path.name.startswith("shard"):
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError) as caught:
            drop_damaged(tmp_path, RECIPE)
    assert caught.value.errno == number and caught.value.filename
    assert Store(tmp_path, RECIPE).keys() == set(entries)


def test_thousands_of_small_shards_need_few_open_files(tmp_path):
    begin_folder(tmp_path, RECIPE)
    entries = items(64)
    with Writer(tmp_path, RECIPE, 0, capacity=1) as writer:
        for key, (record, meta) in entries.items():
            writer.add(key, record, meta)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 16, before[1]))
    try:
        assert_holds(tmp_path, entries)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_rank_on_another_disk_makes_its_own_folder(tmp_path):
    """What it writes is then missing on the shared one, which the callers report."""
    with Writer(tmp_path / "elsewhere", RECIPE, 1) as writer:
        writer.add(b"k" * 16, bytes(SIZE))
    assert len(Store(tmp_path / "elsewhere", RECIPE)) == 1 and len(Store(tmp_path, RECIPE)) == 0


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', '{"kind": "\\ud800\\u001b[31m"}'])
def test_mend_writes_a_damaged_recipe_again(tmp_path, text, caplog):
    entries = items(3)
    write(tmp_path, entries)
    mark = tmp_path / RECIPE.folder_name / "recipe.json"
    mark.write_text(text)
    mend(tmp_path, RECIPE, ranks=1)
    assert json.loads(mark.read_text()) == RECIPE.as_json() and "recipe.json is damaged" in caplog.text
    assert "\x1b" not in caplog.text and caplog.text.encode()  # a log in UTF-8 takes it
    assert_holds(tmp_path, entries)


def test_mend_removes_the_log_of_a_complete_shard(tmp_path):
    """Left where the process could not delete it; nobody would open a writer when no record is missing."""
    entries = items(3)
    write(tmp_path, entries)
    folder = tmp_path / RECIPE.folder_name
    before = sorted(path.name for path in folder.iterdir())
    (folder / "shard-0-00000.log").write_text("a line\n")
    mend(tmp_path, RECIPE, ranks=1)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert_holds(tmp_path, entries)
