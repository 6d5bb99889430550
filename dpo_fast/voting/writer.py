"""One thread that does all the work on a session's desk, and commits several pieces of it at once.

A piece of work is acknowledged (its future is done) once the transaction it was part of is flushed to disk. Under load
the pieces that came while the last transaction was being flushed form the next one, so that the cost of a flush is
shared.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from dpo_fast.votes.desk import Desk, Refused

T = TypeVar("T")
MOST_AT_ONCE = 64  # pieces of work in a transaction
MOST_WAITING = 2000

logger = logging.getLogger(__name__)


class Writer:
    """See the module. As a context manager, which ends the thread after the work that was accepted."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._work: queue.Queue[tuple[Callable[[Desk], object], Future] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="votes", daemon=True)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._work.put(None)
        self._thread.join()

    def submit(self, work: Callable[[Desk], T]) -> "Future[T]":
        """Do `work` of the desk; the future has its result, or what it raised, once that is on disk.

        `work` raises Refused before it changes anything. Raises Refused (503) if too much is waiting.
        """
        future: Future[T] = Future()
        try:
            self._work.put_nowait((work, future))
        except queue.Full:
            raise Refused(503, "Too many people vote at this moment; try again.") from None
        return future

    def _run(self) -> None:
        while True:
            batch = [self._work.get()]
            while len(batch) < MOST_AT_ONCE and batch[-1] is not None:
                try:
                    batch.append(self._work.get_nowait())
                except queue.Empty:
                    break
            self._do([one for one in batch if one is not None])
            if batch[-1] is None:
                return

    def _do(self, batch: list[tuple[Callable[[Desk], object], Future]]) -> None:
        batch = [one for one in batch if one[1].set_running_or_notify_cancel()]  # a request may be gone by now
        if not batch:
            return
        done: list[tuple[Future, object, Exception | None]] = []
        try:
            with self._desk.store.transaction():
                for work, future in batch:
                    try:
                        done.append((future, work(self._desk), None))
                    except Refused as refused:
                        done.append((future, None, refused))
        except Exception as error:  # a full disk, for one: nothing of the batch is kept
            logger.error("votes cannot be written: %s", error)
            for _, future in batch:
                future.set_exception(Refused(503, "Your vote could not be written; try again in a moment."))
            self._load_again()
            return
        for future, result, refused in done:
            if refused is not None:
                future.set_exception(refused)
            else:
                future.set_result(result)

    def _load_again(self) -> None:
        try:
            self._desk.load()
        except Exception as error:
            logger.error("votes cannot be read: %s", error)
