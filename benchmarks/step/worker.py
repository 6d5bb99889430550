"""Run one provider in a process of its own, so that its peak memory, threads and compiled code are its own."""

import gc
import importlib
import multiprocessing
import re
import time
import traceback
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.step.profiling import profiled
from benchmarks.step.proof import prove
from benchmarks.step.work import Settings

PROVIDERS = {
    "ours": ("ours", "Ours"),
    "ours-cached": ("ours", "OursCached"),
    "ours-chosen": ("ours", "OursChosen"),
    "tuned": ("tuned", "Tuned"),
    "peer-diffusers": ("peer_diffusers", "PeerDiffusers"),
    "peer-salesforce": ("peer_salesforce", "PeerSalesforce"),
    "truth": ("truth", "Truth"),
}
_PRELOADED = ("worker", "prepare", *sorted({module for module, _ in PROVIDERS.values()}))


class Failed(Exception):
    """A provider's process raised; the message has its traceback."""


class Worker:
    """The parent's side: `ask` runs a method of `_Server` in the provider's process and returns its result."""

    def __init__(self, name: str, folder: Path, **options: object) -> None:
        # forked from a process that has imported everything and computed nothing
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"benchmarks.step.{module}" for module in _PRELOADED])
        self.name = name
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, name, folder, options), name=name)
        self.process.start()
        far.close()

    def ask(self, method: str, *arguments: object) -> object:
        """Run `method` in the provider's process and return its result.

        Raises Failed with that process's traceback, or with its exit status if it has ended.
        """
        try:
            self.pipe.send((method, arguments))
            kind, value = self.pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self.process.join(10)
            raise Failed(f"{self.name}: its process ended with status {self.process.exitcode}") from error
        if kind == "failed":
            raise Failed(f"{self.name}:\n{value}")
        return value

    def close(self) -> None:
        """End the process; kill it if it takes longer than 30 s."""
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()


def _serve(pipe, name: str, folder: Path, options: dict) -> None:
    server = _Server(name, folder, options)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", getattr(server, method)(*arguments)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


class _Server:
    """The provider's side, in its process."""

    def __init__(self, name: str, folder: Path, options: dict) -> None:
        self.name, self.folder, self.options = name, folder, options
        self.device = Settings.read(folder).device if (folder / "settings.json").exists() else "cpu"
        self.provider = None

    def prepare(self, settings: Settings) -> None:
        """Write what the providers of the run share."""
        from benchmarks.step.prepare import prepare

        prepare(self.folder, settings)

    def open(self) -> float:
        """Create the provider; return the seconds it took."""
        started = time.perf_counter()
        if self.device == "cpu":
            # names compiled kernels in a profile, at about a microsecond each
            torch._inductor.config.cpp.enable_kernel_profile = True
        module, kind = PROVIDERS[self.name]
        self.provider = getattr(importlib.import_module(f"benchmarks.step.{module}"), kind)(self.folder, **self.options)
        return time.perf_counter() - started

    def prove(self):
        """Run the first six steps; return what they computed, and the seconds they took (compilation included)."""
        started = time.perf_counter()
        proof = prove(self.provider)
        return proof, time.perf_counter() - started

    def reset_memory(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set

    def peak_memory(self) -> int:
        """Return the peak bytes: the allocator's on a GPU; the process's on a CPU, Python and libraries included."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Run `count` steps; return the seconds of each, and the part of them spent waiting for data."""
        waits = [self.provider.waited]
        if self.device == "cpu":
            times = []
            for _ in range(count):
                started = time.perf_counter()
                self.provider.step()
                times.append(time.perf_counter() - started)
                waits.append(self.provider.waited)
        else:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            torch.cuda.synchronize()
            events[0].record()
            for event in events[1:]:
                self.provider.step()
                event.record()
                waits.append(self.provider.waited)
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        return [(t, b - a) for t, a, b in zip(times, waits, waits[1:], strict=False)]

    def profile(self):
        """Profile one step with torch.profiler."""
        return profiled(self.provider.step, self.device)
