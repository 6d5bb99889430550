"""What a run calls as it goes: objects of the user's own, given to `dpo_fast.train` or to a `Trainer`."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.errors import BadInput, mark_of_this_rank

if TYPE_CHECKING:
    from dpo_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Callback:
    """The base class of callbacks: override the methods you need; these do nothing.

    Every rank calls the methods of its own objects, in the order in which they were given and at the same steps, so a
    method may use the collective operations of `trainer.ranks`, if it does so on every rank. For what is to happen
    once (a line on the terminal, a file) ask `trainer.ranks.is_main`.

    A callback may read everything of the trainer: `trainer.run.step`, `trainer.config`, `trainer.unet`, ... It may ask
    the run to stop (`trainer.stop`). It must change nothing else: not the weights and their gradients, the optimizer,
    the batches, nor the configuration, which a checkpoint could not know of. The random numbers of a run do not depend
    on PyTorch's generators, which a callback may use. A resumed run makes new calls from its first step on; a callback
    keeps what it needs itself.

    An exception ends the run as any error does: checkpoints saved before stay whole, and no result is written.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """Called once, before the first step of this process; `trainer.run.step` is greater than 0 in a resumed run."""

    def on_step(self, trainer: "Trainer") -> None:
        """Called after every optimizer step, the `trainer.run.step`-th.

        The device may not have finished it: nothing is waited for. Reading a tensor here (`item()`, `print`) makes
        every step wait; values that are read anyway come to `on_log`.
        """

    def on_log(self, trainer: "Trainer", metrics: dict[str, object]) -> None:
        """Called with every line of metrics.jsonl, as a copy: `loss`, `implicit_accuracy`, `lr` and so on.

        The means are over the pairs of all ranks; `step_time`, `data_wait` and `peak_memory_gib` are this rank's.
        """

    def on_validate(self, trainer: "Trainer", accuracy: float | None, picture: Path) -> None:
        """Called after a validation: the held-out implicit accuracy, None if no pairs are held out, and the samples'
        picture, which the main rank has written.
        """

    def on_save(self, trainer: "Trainer", checkpoint: Path) -> None:
        """Called once a checkpoint is whole."""

    def on_end(self, trainer: "Trainer", error: BaseException | None) -> None:
        """Called once for every callback that was started, however the run ends.

        error: None if the result and summary.json are written (an evaluation comes later), else what ends the run: a
        `Stopped` if a callback asked for it, an `Interrupted` after a signal, or an error.
        """


def checked(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """Return the callbacks as a tuple. Raises BadInput for what is none."""
    if isinstance(callbacks, (Callback, type)) or not isinstance(callbacks, Iterable):
        raise BadInput(f"callbacks must be a list of Callback objects, not {callbacks!r:.80}: give [...]")
    found = tuple(callbacks)
    for number, callback in enumerate(found):
        if not isinstance(callback, Callback):
            made = f": make an object of it, {callback.__name__}()" if isinstance(callback, type) else ""
            raise BadInput(
                f"callbacks[{number}] ({callback!r:.80}) is no Callback{made or ': derive it from Callback'}"
            )
    return found


class Callbacks:
    """Calls the methods of several callbacks, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks

    def call(self, method: str, trainer: "Trainer", *values: object) -> None:
        """Call a method of each."""
        for callback in self.callbacks:
            _call(callback, method, trainer, *values)

    @contextmanager
    def around(self, trainer: "Trainer") -> Iterator[None]:
        """Call `on_start` before the block and `on_end` after it, however it ends."""
        started: list[Callback] = []
        try:
            for callback in self.callbacks:
                started.append(callback)
                _call(callback, "on_start", trainer)
            yield
        except BaseException as error:
            for callback in started:
                try:
                    callback.on_end(trainer, error)
                except Exception as further:  # what ends the run is more important
                    logger.warning("%s.on_end failed: %r", type(callback).__name__, further)
            raise
        self.call("on_end", trainer, None)


def _call(callback: Callback, method: str, trainer: "Trainer", *values: object) -> None:
    """Call a method; an exception is marked as this rank's own, since the others may have met none."""
    try:
        getattr(callback, method)(trainer, *values)
    except Exception as error:
        mark_of_this_rank(error)
        raise
