"""A heartbeat between ranks, so that no rank waits for one that is dead or was stopped.

Every process increments its own counter in a small TCP store and watches those of the others. A collective operation
cannot be interrupted, so a rank that waits in one for a silent rank reports that and ends its process.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dpo_fast.errors import printable

INTERVAL = 5.0  # seconds between two beats
SILENCE = 120.0  # seconds without a beat after which a rank is presumed dead


class Heartbeat:
    """Sends this rank's heartbeat and watches the others', in a thread, until `stop`.

    waiting_for: returns what the main thread is waiting for in a collective operation, in words, or None.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, waiting_for: Callable[[], str | None]) -> None:
        self.store, self.rank, self.waiting_for = store, rank, waiting_for
        self.others = [other for other in range(world_size) if other != rank]
        self.store.set(f"process/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; the others then presume this rank dead."""
        self._ended.set()
        self._thread.join(timeout=INTERVAL)

    def _run(self) -> None:
        counts: dict[int, int] = {}
        heard = dict.fromkeys(self.others, time.monotonic())
        last = time.monotonic()
        while not self._ended.wait(INTERVAL):
            now = time.monotonic()
            if now - last > 3 * INTERVAL:  # this process itself was paused, and the others may have been, too
                heard = dict.fromkeys(self.others, now)
            last = now
            try:
                self.store.add(f"beat/{self.rank}", 1)
                for other in self.others:
                    if (count := self.store.add(f"beat/{other}", 0)) != counts.get(other):
                        counts[other], heard[other] = count, now
            except RuntimeError as error:  # the store lives in the main rank's process
                self._end_if_waiting(f"the main rank is gone ({' '.join(str(error).split())[:100]})")
                continue
            for other, since in heard.items():
                if now - since > SILENCE:
                    self._end_if_waiting(f"rank {other} ({self._process(other)}) was silent for {now - since:.0f} s")

    def _process(self, rank: int) -> str:
        with suppress(RuntimeError):
            if self.store.check([f"process/{rank}"]):
                return self.store.get(f"process/{rank}").decode()
        return "its process never started"

    def _end_if_waiting(self, why: str) -> None:
        if (what := self.waiting_for()) is not None:
            line = f"dpo_fast, rank {self.rank}: error: {why} while this rank waited for {what}; ending"
            with suppress(OSError):
                os.write(2, (printable(line) + "\n").encode())
            os._exit(1)


def start(group: dist.ProcessGroup, waiting_for: Callable[[], str | None]) -> Heartbeat:
    """Connect to the heartbeats of the other ranks of `group`, a CPU group of all ranks. Every rank calls this."""
    rank, world_size = group.rank(), group.size()
    host = os.environ["MASTER_ADDR"]
    options = dict(world_size=world_size, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
    store = dist.TCPStore(host, 0, is_master=True, **options) if rank == 0 else None
    box = [store and store.port]
    dist.broadcast_object_list(box, src=0, group=group)
    return Heartbeat(store or dist.TCPStore(host, box[0], is_master=False, **options), rank, world_size, waiting_for)
