"""Process state and the few collectives of data-parallel training. One process needs no launcher and no process group.

Gradients are fp32 and are reduced once per optimizer step, so the ranks hold plain modules: no wrapper hooks the
backward pass, and the reference runs on the same module that is trained.
"""

import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration
from PIL import Image

from dpo_fast import heartbeat
from dpo_fast.errors import BadInput, Unresponsive, disk_error, missing_extra, one_line

T = TypeVar("T")

# Other ranks wait while the main rank samples, saves and uploads. A dead rank is noticed long before this, by its
# heartbeat; this ends the wait for one that is alive but never answers.
PATIENCE = timedelta(days=1)
TRACKERS = ("tensorboard", "wandb", "comet_ml")
STATES = (AcceleratorState, PartialState, GradientState)  # of accelerate, one each a process
BUCKET_ELEMENTS = 32 * 1024 * 1024  # 128 MiB of fp32 per collective: large enough for full bandwidth


@dataclass
class Ranks:
    """This process's position: `rank` of `world_size`, computing on `device`."""

    accelerator: Accelerator
    rank: int
    world_size: int
    device: torch.device
    signals: "dist.ProcessGroup | None"  # a CPU group, so that agreeing on a flag never waits for the GPU
    leave: Callable[[], None] = lambda: None  # restores what `start` changed in the process
    waiting_for: str | None = None  # what this rank waits for in a collective operation, for the heartbeat
    heartbeat: "heartbeat.Heartbeat | None" = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: list[torch.Tensor], like: list[torch.Tensor] | None = None) -> None:
        """Sum fp32 `tensors` over the ranks in place, bucketed; every rank ends with the same bits.

        like: for each tensor, one of the same shape in whose memory order it is put into its bucket; default: the order
        of its indices. For gradients pass the parameters: a gradient with its parameter's layout is then copied without
        a transposition, and one with another layout (autograd may choose) is still added to those of other ranks
        element by element, since all ranks hold their parameters in the same order (`broadcast_`).
        """
        if self.world_size == 1:
            return
        views = tensors if like is None else [t.permute(memory_order(p)) for t, p in zip(tensors, like, strict=True)]
        for bucket in _buckets(views):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            with self._waiting("the other ranks' gradients"):
                dist.all_reduce(flat)
            torch._foreach_copy_(
                bucket, [part.view_as(t) for part, t in zip(_split(flat, bucket), bucket, strict=True)]
            )

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Give every rank the main rank's values, in place.

        Raises RuntimeError if a rank's shapes or memory order differ, since elements are sent in memory order.
        """
        if self.world_size > 1:
            orders = self.gather([(tuple(t.shape), memory_order(t)) for t in tensors])
            if different := [rank for rank, order in enumerate(orders) if order != orders[0]]:
                raise RuntimeError(
                    f"rank {different[0]} does not hold the weights in the shapes and memory order of rank 0; run the"
                    " same versions of dpo_fast, diffusers and torch on every host"
                )
            with self._waiting("the main rank's weights"):
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is true on any rank."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        with self._waiting("the other ranks to agree"):
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.signals)
        return bool(votes.item())

    def share(self, value: object) -> object:
        """Return the main rank's `value` on every rank (a small picklable object of our own making)."""
        box = [value]
        if self.world_size > 1:
            with self._waiting("the main rank's work"):
                dist.broadcast_object_list(box, src=0, group=self.signals)
        return box[0]

    def gather(self, value: object) -> list[object]:
        """Return every rank's `value` on every rank, in rank order (small picklable objects of our own making)."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        with self._waiting("the other ranks' work"):
            dist.all_gather_object(values, value, group=self.signals)
        return values

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Run `work` on the main rank while the others wait. Returns its value there and None on the others.

        An error in `work` is raised on every rank.
        """
        problem = value = None
        if self.is_main:
            try:
                value = work()
            except Exception as error:  # whatever it is, the others must not wait for ever
                problem = error
        problem = self.share(problem)
        if problem is not None:
            raise problem
        return value

    def from_main(self, work: Callable[[], T]) -> T:
        """Run `work` on the main rank and return its small, picklable value on every rank. Raises like `on_main`."""
        return self.share(self.on_main(work))

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return each rank's own value. If it fails on any, that rank raises its error
        and the others BadInput with its message."""
        problem = value = None
        try:
            value = work()
        except Exception as error:  # whatever it is, the others must not wait for ever
            problem = error
        found = [other for other in self.gather(problem and str(problem)) if other]
        if problem is not None:
            raise problem
        if found:
            raise BadInput(found[0])
        return value

    def start_trackers(self, folder: Path, project: str, config: dict[str, object]) -> None:
        """Start accelerate's trackers, writing into `folder`. Non-scalar values are logged as text.

        Raises BadInput if a tracker cannot be started.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.project_configuration.logging_dir = str(folder)
        scalars = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
        try:
            self.accelerator.init_trackers(project, config=scalars, init_kwargs={"wandb": {"dir": str(folder)}})
        except Exception as error:  # each raises its own: no login, no network, a project without write access
            if disk_error(error) is not None:
                raise
            names = ", ".join(str(getattr(one, "value", one)) for one in self.accelerator.log_with)
            raise BadInput(
                f"--report_to {names}: a tracker cannot be started ({one_line(error)}); or leave it out"
            ) from error

    def end_trackers(self) -> None:
        """Let the trackers write out their data. (accelerate's end_training would also end the process group.)"""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def track_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture to the trackers that support it."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({name: wandb.Image(picture)}, step=step)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            with self._waiting("the other ranks"):
                dist.barrier(group=self.signals)

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Mark the block as waiting for other ranks. Raises Unresponsive if one of them is gone."""
        self.waiting_for = what
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise Unresponsive(f"another rank ended while rank {self.rank} waited for {what} ({reason})") from error
        finally:
            self.waiting_for = None

    def close(self) -> None:
        """Leave the process group, and restore what `start` and `allow_tf32` changed in the process."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.leave()


def allow_tf32(allowed: bool) -> None:
    """Let CUDA compute products and convolutions of fp32 in TF32, or not; the process's default is a mixture."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _own_state() -> Callable[[], None]:
    """Give a run states of its own: of accelerate, TF32, threads and process groups. Returns what restores the user's.

    accelerate keeps one state a process and refuses other settings once there is one; a process group of the user's is
    used and left.
    """
    states = [(kind._shared_state, {**kind._shared_state}) for kind in STATES]
    tf32 = [(part, *_tf32_of(part)) for part in (torch.backends.cuda.matmul, torch.backends.cudnn)]
    grouped, threads = dist.is_initialized(), torch.get_num_threads()
    for state, _ in states:
        state.clear()

    def restore() -> None:
        if dist.is_initialized() and not grouped:
            dist.destroy_process_group()
        for state, before in states:
            state.clear()
            state.update(before)
        for part, name, value in tf32:
            setattr(part, name, value)
        if torch.get_num_threads() != threads:  # accelerate sets it for several processes on CPUs
            torch.set_num_threads(threads)

    return restore


def _tf32_of(part: Any) -> tuple[str, object]:
    """Return the attribute that says whether a part of PyTorch uses TF32, and its value."""
    try:
        return "allow_tf32", part.allow_tf32
    except RuntimeError:  # the user set it by PyTorch's newer name, and the older one cannot be read
        return "fp32_precision", part.fp32_precision


@contextmanager
def joined(report_to: str) -> Iterator[Ranks]:
    """Within the block this process has joined the launched ones (`start`). The process is left as it was: PyTorch's
    random generators, which libraries draw from, too. Raises like `start`.
    """
    ranks = start(report_to)
    try:
        with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
            yield ranks
    finally:
        ranks.close()


def start(report_to: str) -> Ranks:
    """Join the launched processes (`accelerate launch`, torchrun), or run alone.

    `report_to` is a comma-separated list of trackers, `all` or `none`. Raises BadInput for a tracker that is unknown,
    not installed or without its key, and for launcher settings that are not supported here; RuntimeError if not all
    launched processes joined.
    """
    _check_launcher()
    trackers = None if report_to == "none" else report_to.split(",")
    for name in trackers or ():
        if name not in (*TRACKERS, "all"):
            raise BadInput(f"--report_to {name} is not known; choose {', '.join(TRACKERS)}, all or none")
        if name != "all" and importlib.util.find_spec(name) is None:
            raise missing_extra(name, "trackers", f"--report_to {name}")
    _check_keys(trackers or ())
    leave = _own_state()
    try:
        return _joined(trackers, leave)
    except BaseException:
        leave()
        raise


_joins = itertools.count()  # how many runs of this process have joined; the same on every rank


def _join_again() -> None:
    """Make the process group of a second or later run of launched processes.

    PyTorch would use the keys of the first one's store again, and a rank that reads an address of then never answers.
    """
    number = next(_joins)
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if number and launched and not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://"))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"run-{number}", store), rank=rank, world_size=world_size
        )


def _joined(trackers: list[str] | None, leave: Callable[[], None]) -> Ranks:
    _join_again()
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        log_with=trackers,
        project_config=ProjectConfiguration(logging_dir="logs"),  # replaced in start_trackers; some need one here
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched but {accelerator.num_processes} joined")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    signals = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size > 1 else None
    ranks = Ranks(accelerator, rank, world_size, accelerator.device, signals, leave)
    if world_size > 1:
        ranks.heartbeat = heartbeat.start(signals, lambda: ranks.waiting_for)
    return ranks


# Settings that `accelerate launch` passes by environment and that have no effect here, each with its neutral value.
_NOT_HEEDED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "false"),
    "ACCELERATE_USE_FSDP": ("FSDP", "false"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "false"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", "false"),
    "ACCELERATE_DYNAMO_BACKEND": ("a dynamo backend (--compile regional compiles here)", "no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient accumulation (--gradient_accumulation_steps here)", "1"),
}


def _check_keys(trackers: Sequence[str]) -> None:
    """Raise BadInput for wandb without a key; wandb itself would ask for it only after all images are encoded."""
    wanted = "wandb" in trackers or ("all" in trackers and importlib.util.find_spec("wandb") is not None)
    asks = sys.stdin is not None and sys.stdin.isatty()  # on a terminal wandb asks for a key
    if wanted and os.environ.get("RANK", "0") == "0" and not asks and not _wandb_is_set_up():
        raise BadInput(
            "--report_to wandb needs a key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to log"
            " without one"
        )


def _wandb_is_set_up() -> bool:
    """Whether wandb may find a key, or needs none, according to its environment, settings or netrc."""
    said = os.environ.get
    if said("WANDB_MODE", "online") not in ("online", "run", "shared"):
        return True
    if said("WANDB_API_KEY") or said("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(os.path.expanduser("~"))
    settings = (Path(said("WANDB_CONFIG_DIR") or home / ".config/wandb"), Path(said("WANDB_DIR") or ".", "wandb"))
    netrcs = (Path(said("NETRC") or home / ".netrc"), home / "_netrc")
    host = urlsplit(said("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for folder in settings:
        if any(word in _text_of(folder / "settings") for word in ("mode", "api_key", "base_url")):
            return True
    return any(host in _text_of(file) for file in netrcs)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError:
        return ""


def _check_launcher() -> None:
    """Raise BadInput if the launcher asks for something that would silently have no effect."""
    for variable, (what, nothing) in _NOT_HEEDED.items():
        value = os.environ.get(variable, nothing)
        if value.lower() not in (nothing, "", "0", "none", "no"):
            raise BadInput(
                f"accelerate asks for {what} ({variable}={value}), which has no effect here: launch without it, for"
                " example by `accelerate launch --multi_gpu`, or mend its configuration with `accelerate config`"
            )


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions from the largest stride to the smallest.

    A dense tensor permuted this way is contiguous. Dimensions of size 1 come first: their strides mean nothing.
    """
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d) if tensor.shape[d] > 1 else -math.inf)


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    buckets: list[list[torch.Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def _split(flat: torch.Tensor, like: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return flat.split([t.numel() for t in like])
