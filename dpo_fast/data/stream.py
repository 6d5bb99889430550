"""The training stream: epoch permutations end to end, cut into full global batches; its whole state is pairs_seen.

Step g takes the positions [g * N, (g + 1) * N) of the stream, N = pairs_per_step. Rank r takes the r-th equal slice of
them, in micro-batches of `batch_size`. So a step trains on the same pairs whatever the number of ranks and the batch
size, no pair is repeated or left out at an epoch's end, and resuming at a step needs nothing but its number.
"""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing, contextmanager
from dataclasses import fields
from functools import partial
from itertools import islice
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dpo_fast import draws
from dpo_fast.data.batch import Batch, EncodedPair, PairDataset, PairItem, PairTransform, chosen_first, collate
from dpo_fast.data.budget import Budget
from dpo_fast.data.images import share
from dpo_fast.data.pairs import SaysNothing, Usable, faulty, judge_streamed, nothing_to_train_on, too_many_bad
from dpo_fast.data.sources import BadRow, StreamedSource
from dpo_fast.errors import BadInput, Unresponsive
from dpo_fast.threads import one_ahead

PATIENCE = 600  # seconds without a batch from any worker after which they are presumed dead

WINDOW = 1024  # pairs shuffled together when streaming: they wait encoded in memory, about 300 MB for Pick-a-Pic

VALIDATION_DRAWS = 4  # measurements of a held-out pair: draws 0 to 3 fall one in each quarter of the timesteps


class TrainStream:
    """Which pairs each rank trains on at each step, for pairs that are all at hand."""

    def __init__(
        self,
        *,
        seed: int,
        pair_ids: Tensor,  # int64 [n]
        pairs_per_step: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        assert len(pair_ids) > 0
        self._slice = _Slice(pairs_per_step, batch_size, rank, world_size)
        self._seed, self._pair_ids = seed, pair_ids
        self._orders: dict[int, list[int]] = {}

    def batches(self, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """This rank's micro-batches of the steps first_step, ..., last_step - 1, as lists of (position, draw)."""
        for step in range(first_step, last_step):
            for micro_batch in self._slice.of_step(step):
                yield [self._at(position) for position in micro_batch]

    def visited(self, last_step: int) -> Tensor:
        """Ids of the pairs that all ranks together train on before `last_step`, ascending: int64 [n]."""
        positions = last_step * self._slice.pairs_per_step
        order = draws.epoch_order(self._seed, 0, self._pair_ids)
        return self._pair_ids[order[:positions]].sort().values

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self._pair_ids))
        if epoch not in self._orders:
            # A step may reach into the next epoch, so the one before is kept; older ones are done with.
            self._orders = {past: order for past, order in self._orders.items() if past == epoch - 1}
            self._orders[epoch] = draws.epoch_order(self._seed, epoch, self._pair_ids).tolist()
        return self._orders[epoch][place], epoch


class StreamedPairs:
    """The same batches from a source that can only be read in order.

    Usable pairs are counted in the order of the source and shuffled within windows of 1024; epochs repeat, each with
    its own shuffle. Rows are judged as `build_index` judges them (a tie is dropped, an empty caption is a bad row),
    when they are met, and a row with the same image twice is a bad one. An image that does not decode leaves its pair
    in its place with weight 0. Each rank reads the whole stream and decodes its own share. Resuming reads again from
    the start, up to where the run was. Rows that contradict or repeat others are not found.
    """

    def __init__(
        self,
        source: StreamedSource,
        transform: PairTransform,
        *,
        pairs_per_step: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        soft_labels: bool = False,
        max_bad_fraction: float = 0.01,
        progress: bool = True,
    ):
        self._source, self._transform = source, transform
        self._slice = _Slice(pairs_per_step, batch_size, rank, world_size)
        self._soft_labels, self._max_bad_fraction, self._progress = soft_labels, max_bad_fraction, progress
        self.rows = 0  # met so far, in the first epoch; so are the next three
        self.ties_dropped = 0
        self.unlabelled = 0
        self.bad: list[BadRow] = []

    contradicted = duplicates = None  # of a stream nobody knows

    @property
    def bad_rows(self) -> int:
        return len(self.bad)

    def batches(
        self, first_step: int, last_step: int, *, num_workers: int = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """This rank's micro-batches of the steps first_step, ..., last_step - 1, decoded by `num_workers` threads.

        Raises BadInput, at the same row on every rank, when more than `max_bad_fraction` of the rows are bad (from the
        1000th row on, or at the end of the source).
        """
        keys = (key for step in range(first_step, last_step) for key in self._slice.of_step(step))
        with closing(self._from(first_step * self._slice.pairs_per_step)) as pairs:
            yield from _in_threads(self._to_batch, self._cut(keys, pairs), num_workers, pin_memory)

    def _cut(self, micro_batches: Iterator[range], pairs: "Iterator[_Placed]") -> Iterator[list["_Placed"]]:
        """Pick the micro-batches (ascending ranges of positions) out of all the pairs."""
        for positions in micro_batches:
            picked = []
            while len(picked) < len(positions):
                placed = next(pairs)
                if placed.position >= positions.start:
                    picked.append(placed)
            yield picked

    def _to_batch(self, placed: list["_Placed"]) -> Batch:
        pair_id = torch.tensor([pair.pair_id for pair in placed], dtype=torch.int64)
        draw = torch.tensor([pair.epoch for pair in placed], dtype=torch.int64)
        return self._transform.batch(pair_id, draw, [pair.encoded for pair in placed])

    def _from(self, first: int) -> "Iterator[_Placed]":
        """All pairs of the endless stream from position `first` on."""
        with closing(one_ahead(self._windows(first))) as windows:
            for epoch, start, window in windows:
                if start + len(window) <= first:
                    continue
                ids = torch.tensor([pair_id for pair_id, _ in window], dtype=torch.int64)
                order = draws.epoch_order(self._transform.seed, epoch, ids).tolist()
                for position, place in enumerate(order, start=start):
                    if position >= first:
                        yield _Placed(position, epoch, *window[place])

    def _windows(self, first: int) -> "Iterator[tuple[int, int, list[tuple[int, EncodedPair]]]]":
        """Each window: its epoch, the position of its first pair, its pairs with their ids. Endless.

        Windows before `first` come too, for a window's length is known by reading it; but of the whole epochs before it
        only the first.
        """
        epoch, start = 0, 0
        bar = tqdm(
            total=first, desc="Reading up to where the run was", unit=" pairs", disable=not self._progress or not first
        )
        while True:
            begin = start
            for window in _windows_of(self._epoch(epoch)):
                yield epoch, start, window
                start += len(window)
                bar.update(min(start, first) - bar.n)
                if start >= first:
                    bar.close()
            length = start - begin
            if length == 0:
                raise nothing_to_train_on(self._source.description, self.rows, self.ties_dropped, self.unlabelled)
            skipped = max(first - start, 0) // length  # every epoch is as long as the first
            epoch, start = epoch + 1 + skipped, start + skipped * length

    def _epoch(self, epoch: int) -> Iterator[tuple[int, EncodedPair]]:
        """The usable pairs of the source in its order; the first time through, count what is left out."""
        counting = epoch == 0
        if counting:
            self.rows, self.ties_dropped, self.unlabelled, self.bad = 0, 0, 0, []
        for streamed in self._source.rows():
            verdict = judge_streamed(streamed, self._source.columns, self._soft_labels)
            if counting:
                self.rows += 1
                self.ties_dropped += verdict is SaysNothing.TIE
                self.unlabelled += verdict is SaysNothing.UNLABELLED
                if isinstance(verdict, BadRow):
                    self.bad.append(verdict)
                    self._refuse_too_many(max(self.rows, 1000))
            if isinstance(verdict, Usable):
                images = chosen_first(streamed.images, verdict.chosen)
                yield streamed.row, EncodedPair(images, streamed.caption, verdict.label, verdict.chosen)
        if counting:
            self._refuse_too_many(self.rows)

    def _refuse_too_many(self, rows: int) -> None:
        bad = faulty(self.bad)
        if len(bad) > self._max_bad_fraction * rows:
            raise too_many_bad(bad, rows, self._max_bad_fraction, None)


def make_loader(
    dataset: PairDataset,
    stream: TrainStream,
    first_step: int,
    last_step: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The micro-batches of the steps first_step, ..., last_step - 1, in order, decoded by `num_workers` processes."""
    return _load(dataset, stream.batches(first_step, last_step), num_workers, pin_memory)


def validation_loader(
    dataset: PairDataset,
    *,
    batch_size: int,
    draws: int = VALIDATION_DRAWS,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every pair at draws 0 to `draws` - 1, each exactly once over the ranks.

    One draw says little of a pair, for its margin depends on the timestep above all. The draws are the same at every
    pass, so two passes differ by the model only. The last batch may be short, and a rank may have one batch fewer than
    another.
    """
    # The draws of a pair stand together: its caption is then encoded once a batch.
    total = len(dataset) * draws
    starts = range(rank * batch_size, total, world_size * batch_size)
    batches = ([divmod(k, draws) for k in range(i, min(i + batch_size, total))] for i in starts)
    return _load(dataset, batches, num_workers, pin_memory)


class _Slice:
    """The part of every global step that one rank trains on."""

    def __init__(self, pairs_per_step: int, batch_size: int, rank: int, world_size: int):
        if batch_size < 1 or pairs_per_step < 1 or pairs_per_step % (batch_size * world_size):
            raise BadInput(
                f"pairs_per_step ({pairs_per_step}) must be a multiple of batch_size ({batch_size}) "
                f"times the number of ranks ({world_size}), here {batch_size * world_size}"
            )
        assert 0 <= rank < world_size
        self.pairs_per_step, self._batch_size = pairs_per_step, batch_size
        share = pairs_per_step // world_size
        self._first, self._last = rank * share, (rank + 1) * share

    def of_step(self, step: int) -> Iterator[range]:
        """The positions of this rank's micro-batches in one step."""
        start = step * self.pairs_per_step
        for first in range(start + self._first, start + self._last, self._batch_size):
            yield range(first, first + self._batch_size)


class _Placed(NamedTuple):
    """A streamed pair at its position in the endless stream."""

    position: int
    epoch: int
    pair_id: int
    encoded: EncodedPair


def _load(
    dataset: PairDataset, batches: Iterable[list[tuple[int, int]]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """torch's loader over given micro-batches; what goes wrong in a worker comes out as one line.

    What is cached needs no decoding, and comes through threads.
    """
    if dataset.transform.in_threads:
        yield from _in_threads(dataset.batch, iter(batches), max(1, num_workers), pin_memory)
        return
    budget = Budget.of_processes(torch.multiprocessing.get_context()) if num_workers else None
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_packed if num_workers else collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        timeout=PATIENCE if num_workers else 0,
        worker_init_fn=partial(_start_worker, os.getpid(), budget),
    )
    try:
        with _sigterm_blocked():
            loading = iter(loader)  # starts the workers
        for batch in loading:
            yield batch.unpacked() if isinstance(batch, _Packed) else batch
    except Exception as error:
        message = str(error)
        if "DataLoader timed out" in message:
            raise Unresponsive(
                f"no batch came from {num_workers} data loader workers in {PATIENCE} s: the disk that holds the images"
                " does not answer, or the workers were stopped; --dataloader_num_workers 0 decodes in this process"
            ) from error
        if "DataLoader worker" not in message:
            raise
        if "Traceback" in message:  # torch puts the worker's whole traceback into the message
            kind = BadInput if isinstance(error, BadInput) else RuntimeError
            raise kind(f"a data loader worker failed: {message.strip().splitlines()[-1]}") from error
        raise Unresponsive(
            f"a data loader worker died ({' '.join(message.split())}): often memory ran out; "
            "try fewer --dataloader_num_workers"
        ) from error


class _Packed:
    """A batch as plain arrays, which a worker process sends through a pipe.

    torch would send tensors through shared memory. Where that is small (64 MB in Docker) the tensor is lost on its way
    while its worker lives, and the trainer waits for ever.
    """

    def __init__(self, batch: Batch) -> None:
        self.values = {field.name: _to_arrays(getattr(batch, field.name)) for field in fields(batch)}

    def unpacked(self) -> Batch:
        return Batch(**{name: _to_tensors(value) for name, value in self.values.items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's loader calls this in a thread of the trainer."""
        return self.unpacked().pin_memory()


def _packed(items: Sequence[PairItem]) -> _Packed:
    return _Packed(collate(items))


def _to_arrays(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _to_tensors(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, and for good in the processes and threads that it starts in the block."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS: nothing in a worker would wait for it
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(trainer: int, budget: Budget, worker: int) -> None:
    # Ctrl-C and a cluster's signals reach every process of a run; the trainer answers them, and needs its workers until
    # it has saved. It ends them itself, by a SIGTERM of its own. A worker has SIGTERM blocked from its start: libraries
    # may have started threads in it by now, and any thread that does not block a signal may get it.
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # where a server of forks started this process
        Thread(target=_end_by, args=(trainer,), daemon=True).start()
    torch.set_num_threads(1)
    share(budget)


def _end_by(trainer: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != trainer:
        pass
    os._exit(0)


def _windows_of(pairs: Iterator) -> Iterator[list]:
    """Cut into lists of WINDOW, the last one shorter."""
    while window := list(islice(pairs, WINDOW)):
        yield window


def _in_threads(make_batch, items: Iterator, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """`make_batch` of each item, in order, a few ahead in threads (decoding releases Python's lock)."""

    def make(item) -> Batch:
        batch = make_batch(item)
        return batch.pin_memory() if pin_memory else batch

    if num_workers == 0:
        yield from map(make, items)
        return
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > 2 * num_workers:
                yield _soon(pending.popleft())
        while pending:
            yield _soon(pending.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _soon(batch: Future[Batch]) -> Batch:
    try:
        return batch.result(timeout=PATIENCE)
    except FutureTimeout:
        if batch.done():  # raised by the work itself
            raise
        raise Unresponsive(
            f"no batch came in {PATIENCE} s: the disk that holds the cache or the images does not answer"
        ) from None
