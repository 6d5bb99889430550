"""The training stream: every pair once an epoch, whatever the ranks, batches, workers and resume points."""

import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import fields

import pytest
import torch

from dpo_fast import draws
from dpo_fast.data import (
    VALIDATION_DRAWS,
    PairDataset,
    PairTransform,
    StreamedPairs,
    TrainStream,
    build_index,
    make_loader,
    stream,
    validation_loader,
)
from dpo_fast.errors import BadInput, Unresponsive
from tests.helpers.pairs import open_pairs, pickapic, write_jsonl, write_table

IDS = torch.tensor([3, 5, 8, 9, 11, 20, 21, 40, 41, 77])


def flat(batches):
    return [item for batch in batches for item in batch]


def keys(batches):
    return [key for b in batches for key in zip(b.pair_id.tolist(), b.draw.tolist(), strict=True)]


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def train_stream(**options):
    return TrainStream(**{"seed": 1, "pair_ids": IDS, "pairs_per_step": 4, "batch_size": 2, **options})


def transform(**options):
    return PairTransform(resolution=8, seed=1, timesteps=torch.arange(1000), hflip=True, random_crop=True, **options)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Eleven usable pairs, a tie (row 2) and a row without a caption (row 7)."""
    labels = [1.0, 0.0, 0.5, *[1.0, 0.0] * 5]
    captions = ["" if i == 7 else f"caption {i}" for i in range(13)]
    return write_table(
        tmp_path_factory.mktemp("t") / "a.parquet", pickapic(n=13, size=12, labels=labels, captions=captions)
    )


@pytest.fixture
def dataset(table):
    source = open_pairs(table)
    return PairDataset(source, build_index(source, seed=1, max_bad_fraction=0.1, progress=False).train, transform())


def streamed(table, source=None, **options):
    source = source or open_pairs(table, streaming=True)
    options = {"pairs_per_step": 4, "batch_size": 2, "max_bad_fraction": 0.1, "progress": False, **options}
    return StreamedPairs(source, transform(), **options)


# ---- the order -----------------------------------------------------------------------------------------------------


def test_epochs_are_permutations_laid_end_to_end():
    taken = flat(train_stream().batches(0, 10))  # 40 positions: four epochs of ten
    for epoch in range(4):
        part = taken[epoch * 10 : epoch * 10 + 10]
        assert [position for position, _ in part] == draws.epoch_order(1, epoch, IDS).tolist()
        assert {draw for _, draw in part} == {epoch} and {position for position, _ in part} == set(range(10))
    assert taken[:10] != [(position, 0) for position, _ in taken[10:20]]


def test_there_is_no_short_batch():
    assert [len(batch) for batch in train_stream().batches(0, 7)] == [2] * 14


def test_a_step_larger_than_the_set():
    taken = flat(train_stream(pairs_per_step=24).batches(0, 1))
    assert len(set(taken)) == 24 and {draw for _, draw in taken} == {0, 1, 2}


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (4, 1), (1, 1), (2, 1)])
def test_ranks_and_batches_share_the_same_steps(world_size, batch_size):
    whole = train_stream(batch_size=4)
    ranks = [train_stream(batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(9):
        parts = [flat(rank.batches(step, step + 1)) for rank in ranks]
        assert all(len(part) == 4 // world_size for part in parts)
        assert flat(parts) == flat(whole.batches(step, step + 1))


def test_resuming_goes_on_where_it_stopped():
    whole = list(train_stream().batches(0, 12))
    for step in (1, 2, 3, 5, 11):
        assert list(train_stream().batches(step, 12)) == whole[2 * step :]


def test_leaving_a_pair_out_keeps_the_order_of_the_others():
    fewer = TrainStream(seed=1, pair_ids=IDS[1:], pairs_per_step=9, batch_size=9)
    kept = [IDS[1:][position].item() for position, _ in flat(fewer.batches(0, 1))]
    before = [IDS[position].item() for position, _ in flat(train_stream(pairs_per_step=10).batches(0, 1))]
    assert kept == [pair for pair in before if pair != IDS[0]]


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 0}, {"pairs_per_step": 0}, {"world_size": 3}])
def test_pairs_per_step_must_divide(options, table):
    with pytest.raises(BadInput, match=r"pairs_per_step \(\d\) must be a multiple of batch_size \(\d\)"):
        train_stream(**options)
    with pytest.raises(BadInput, match="pairs_per_step"):
        streamed(table, **options)


# ---- the loader ----------------------------------------------------------------------------------------------------


def test_the_loader_gives_the_stream(dataset):
    order = train_stream(pair_ids=dataset.index.pair_id)
    batches = list(make_loader(dataset, order, 2, 8))
    expected = [(dataset.index.pair_id[p].item(), draw) for p, draw in flat(order.batches(2, 8))]
    assert keys(batches) == expected and {draw for _, draw in expected} == {0, 1, 2}


def test_workers_change_nothing(dataset):
    order = train_stream(pair_ids=dataset.index.pair_id)
    assert_same(make_loader(dataset, order, 0, 6, num_workers=2), make_loader(dataset, order, 0, 6))


def test_workers_read_files_too(tmp_path):
    source = open_pairs(write_jsonl(tmp_path / "set", pickapic(n=6, size=8)))
    dataset = PairDataset(source, build_index(source, seed=0, progress=False).train, transform())
    order = train_stream(pair_ids=dataset.index.pair_id)
    assert_same(make_loader(dataset, order, 0, 3, num_workers=2), make_loader(dataset, order, 0, 3))


class Failing(PairDataset):
    def __init__(self, dataset, fault):
        super().__init__(dataset.source, dataset.index, dataset.transform)
        self.fault = fault

    def __getitems__(self, keys):
        self.fault()


def bad_input():
    raise BadInput("the value and the remedy")


def division():
    return 1 // 0


def killed():
    os._exit(9)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (bad_input, BadInput, "the value and the remedy$"),
        (division, RuntimeError, "worker failed: ZeroDivisionError"),
        (killed, RuntimeError, "worker died.*fewer --dataloader_num_workers"),
    ],
)
def test_a_fault_in_a_worker_is_one_line(dataset, fault, kind, said):
    order = train_stream(pair_ids=dataset.index.pair_id)
    with pytest.raises(kind, match=said) as caught:
        list(make_loader(Failing(dataset, fault), order, 0, 2, num_workers=1))
    assert "\n" not in str(caught.value)


def test_without_workers_a_fault_is_itself(dataset):
    with pytest.raises(ZeroDivisionError):
        list(make_loader(Failing(dataset, division), train_stream(pair_ids=dataset.index.pair_id), 0, 2))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (3, 5), (2, 100)])
def test_validation_sees_every_pair_once_at_each_draw(dataset, world_size, batch_size):
    taken = []
    for rank in range(world_size):
        batches = list(validation_loader(dataset, batch_size=batch_size, rank=rank, world_size=world_size))
        assert all(len(batch.captions) <= batch_size for batch in batches)
        taken += keys(batches)
    assert sorted(taken) == [(row, draw) for row in dataset.index.pair_id.tolist() for draw in range(VALIDATION_DRAWS)]


def test_validation_covers_the_timesteps_evenly(dataset):
    first, second = (list(validation_loader(dataset, batch_size=VALIDATION_DRAWS)) for _ in range(2))
    for batch in first:
        assert sorted((batch.timesteps * VALIDATION_DRAWS // 1000).tolist()) == list(range(VALIDATION_DRAWS))
    assert_same(first, second)


THREADS: list[threading.Thread] = []  # started in every process that is forked while this holds `forking`
forking: list[bool] = []


def _start_thread() -> None:
    if forking:
        THREADS.append(threading.Thread(target=time.sleep, args=(60,), daemon=True))
        THREADS[-1].start()


os.register_at_fork(after_in_child=_start_thread)


@pytest.mark.parametrize("threads", [False, True], ids=["alone", "beside a library's thread"])
def test_workers_outlive_what_ends_the_trainer(dataset, monkeypatch, threads):
    """Ctrl-C and a cluster's SIGTERM go to every process of a run, and the trainer has a checkpoint to write first."""
    monkeypatch.setattr(sys.modules[__name__], "forking", [True] * threads)
    order = train_stream(pair_ids=dataset.index.pair_id)
    before = set(torch.multiprocessing.active_children())
    loading = make_loader(dataset, order, 0, 40, num_workers=1)
    batches = [next(loading)]
    (worker,) = set(torch.multiprocessing.active_children()) - before
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # another process's signal
    batches += loading
    assert_same(batches, make_loader(dataset, order, 0, 40))


def test_workers_send_nothing_through_shared_memory(dataset):
    """A tensor that does not fit into /dev/shm is lost on its way, and the trainer waits for it for ever."""
    packed = stream._packed(dataset.__getitems__([(0, 0), (1, 0)]))
    assert not any(isinstance(value, torch.Tensor) for value in packed.values.values())
    sent = pickle.loads(pickle.dumps(packed)).unpacked()
    assert_same([sent], [dataset.batch([(0, 0), (1, 0)])])
    sent.pixels.add_(1)  # writable, as training's batches are


class Slow(PairDataset):
    """Answers after a minute."""

    def __init__(self, dataset):
        super().__init__(dataset.source, dataset.index, dataset.transform)

    def __getitems__(self, keys):
        time.sleep(60)


@pytest.mark.exhaustive
def test_a_worker_that_never_answers_ends_the_wait(dataset, monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE", 1)
    order = train_stream(pair_ids=dataset.index.pair_id)
    with pytest.raises(Unresponsive, match="no batch came from 1 data loader workers in 1 s"):
        next(make_loader(Slow(dataset), order, 0, 2, num_workers=1))
    release = threading.Event()
    with pytest.raises(Unresponsive, match="no batch came in 1 s"):
        list(stream._in_threads(lambda item: release.wait(60), iter(range(3)), 1, False))
    release.set()


def test_the_trainer_can_end_its_workers(dataset):
    before = set(torch.multiprocessing.active_children())
    loading = make_loader(dataset, train_stream(pair_ids=dataset.index.pair_id), 0, 1000, num_workers=1)
    next(loading)
    (worker,) = set(torch.multiprocessing.active_children()) - before
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_dataset_can_be_sent_to_another_process(dataset, tmp_path):
    folder = open_pairs(write_jsonl(tmp_path / "set", pickapic(n=6, size=8)))
    index = build_index(folder, seed=0, progress=False).train
    for pairs in (dataset, PairDataset(folder, index, transform())):
        order = train_stream(pair_ids=pairs.index.pair_id)
        assert_same(make_loader(pickle.loads(pickle.dumps(pairs)), order, 0, 3), make_loader(pairs, order, 0, 3))


# ---- streamed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [4, 1024])
def test_a_stream_visits_every_pair_once_an_epoch(table, window, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", window)
    pairs = streamed(table, pairs_per_step=11, batch_size=11)
    usable = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    orders = []
    for epoch, batch in enumerate(pairs.batches(0, 3)):
        rows = batch.pair_id.tolist()
        assert sorted(rows) == usable and batch.draw.tolist() == [epoch] * 11
        starts = range(0, 11, window)
        assert [sorted(rows[s : s + window]) for s in starts] == [usable[s : s + window] for s in starts]
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2] and usable not in orders
    assert (pairs.rows, pairs.ties_dropped, pairs.bad_rows) == (13, 1, 1)
    assert pairs.bad[0].row == 7 and pairs.bad[0].column == "caption"


def test_a_streamed_pair_is_the_indexed_pair(table, dataset):
    """Pixels, timestep, label and so on are the same functions of the pair and its draw."""
    place = {row: position for position, row in enumerate(dataset.index.pair_id.tolist())}
    batches = list(streamed(table).batches(0, 6))
    again = [[(place[row], draw) for row, draw in keys([batch])] for batch in batches]
    assert_same(batches, stream._load(dataset, again, 0, False))


@pytest.mark.parametrize("window", [3, 1024])
@pytest.mark.parametrize("first", [1, 2, 3, 7, 20])
def test_a_stream_resumes_where_it_stopped(table, window, first, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", window)
    whole = list(streamed(table).batches(0, 22))
    assert_same(streamed(table).batches(first, 22), whole[2 * first :])


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 2), (4, 1), (2, 1)])
def test_ranks_share_a_stream(table, world_size, batch_size):
    whole = keys(streamed(table, batch_size=4).batches(0, 6))
    ranks = [
        list(streamed(table, batch_size=batch_size, rank=rank, world_size=world_size).batches(0, 6))
        for rank in range(world_size)
    ]
    share = 4 // world_size
    for step in range(6):
        part = [key for rank in ranks for key in keys(rank)[step * share : (step + 1) * share]]
        assert part == whole[4 * step : 4 * step + 4]


def test_threads_change_nothing(table):
    assert_same(streamed(table).batches(1, 9, num_workers=3), streamed(table).batches(1, 9))


def test_a_stream_reads_no_further_than_it_must(table, monkeypatch):
    """A window ahead, not the whole source; and stopping early leaves nothing running."""
    monkeypatch.setattr(stream, "WINDOW", 2)
    source = open_pairs(table, streaming=True)
    read, rows = [], source.rows
    monkeypatch.setattr(source, "rows", lambda: (read.append(row.row) or row for row in rows()))
    batches = streamed(table, source, pairs_per_step=2).batches(0, 100)
    next(batches)
    batches.close()
    assert max(read) <= 6


def test_a_stream_without_a_missing_image(tmp_path):
    columns = pickapic(n=4, size=8)
    columns["jpg_1"][2] = None
    path = write_table(tmp_path / "a.parquet", columns)
    pairs = streamed(path, pairs_per_step=3, batch_size=3, max_bad_fraction=0.3)
    batch = next(pairs.batches(0, 1))
    assert sorted(batch.pair_id.tolist()) == [0, 1, 3] and pairs.bad == [(2, "jpg_1", "is missing")]


def test_a_streamed_image_that_does_not_decode_keeps_its_place(tmp_path):
    columns = pickapic(n=4, size=8)
    columns["jpg_0"][2] = b"junk"
    batch = next(streamed(write_table(tmp_path / "a.parquet", columns), batch_size=4).batches(0, 1))
    assert sorted(batch.pair_id.tolist()) == [0, 1, 2, 3]
    assert batch.weight[batch.pair_id == 2].item() == 0 and batch.weight.sum() == 3 and batch.bad[0][0] == 2


def test_too_many_bad_rows_end_a_stream(table):
    with pytest.raises(BadInput, match=r"1 of 13 rows.*--max_bad_fraction 0.05.*row 7: caption is empty"):
        list(streamed(table, max_bad_fraction=0.05).batches(0, 6))


def test_too_many_bad_rows_end_a_long_stream_early(tmp_path):
    n = 1500
    one = pickapic(n=1, size=8)
    columns = {name: values * n for name, values in one.items()}
    columns["caption"] = ["" if i % 50 == 0 else "a" for i in range(n)]
    pairs = streamed(write_table(tmp_path / "a.parquet", columns), max_bad_fraction=0.01)
    with pytest.raises(BadInput, match="11 of 1000 rows"):
        list(pairs.batches(0, 1000))
    assert pairs.rows == 501


def test_a_stream_of_ties(tmp_path):
    path = write_table(tmp_path / "a.parquet", pickapic(n=3, size=8, labels=[0.5] * 3))
    with pytest.raises(BadInput, match=r"all 3 rows are ties or unusable \(3 ties"):
        list(streamed(path).batches(0, 1))
    pairs = streamed(path, pairs_per_step=3, batch_size=3, soft_labels=True)
    assert next(pairs.batches(0, 1)).label.tolist() == [0.5] * 3 and pairs.ties_dropped == 0


def test_a_folder_can_be_streamed(tmp_path):
    folder = write_jsonl(tmp_path / "set", pickapic(n=4, size=8))
    (folder / "images" / "1-chosen.jpg").unlink()
    pairs = streamed(folder, pairs_per_step=3, batch_size=3, max_bad_fraction=0.3)
    assert sorted(next(pairs.batches(0, 1)).pair_id.tolist()) == [0, 2, 3]
    assert pairs.bad[0][:2] == (1, "chosen")


def test_the_real_sample_streamed(sample):
    pairs = streamed(sample, pairs_per_step=6, batch_size=3)
    rows = [row for batch in pairs.batches(0, 2) for row in batch.pair_id.tolist()]
    assert sorted(rows[:6]) == sorted(rows[6:]) == [0, 1, 2, 3, 4, 5] and pairs.ties_dropped == 1
