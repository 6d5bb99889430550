"""What native.py does around a launch on a GPU, shown without one: fake CUDA tensors, an extension that notes calls."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dpo_fast import env
from dpo_fast.kernels import dispatch

if reason := dispatch.usable_backends()["native"]:
    pytest.skip(f"native cannot be used here: {reason}", allow_module_level=True)

from dpo_fast.kernels import native

STREAM = 77


class Machine:
    """Several GPUs: which one is current in PyTorch, and all that happens, in order."""

    def __init__(self) -> None:
        self.current, self.capturing, self.events = 0, False, []

    @contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device("cuda", device).index if type(device) is int else device.index
        yield
        self.current = before

    def current_stream(self, device):
        return SimpleNamespace(cuda_stream=STREAM + device.index)

    def note(self, name):
        def call(*args, place=None, **kwargs):
            self.events.append((name, self.current, place or args))

        return call


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    for name in ("device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(machine, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.capturing)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 4096)
    ops = ("noise_pair", "pair_errors", "pair_errors_grad", "dpo_loss", "dpo_loss_grad")
    extension = SimpleNamespace(
        **{name: machine.note(name) for name in ops},
        Place=lambda device, stream, threads: (device, stream, threads),
        Array=lambda address, dtype: address,
        PairErrors=lambda **_: None,
        PairErrorsGrad=lambda **_: None,
        pair_sums_floats=lambda place, images, elements: 8,
        cuda_fault=lambda device: machine.note("cuda_fault")(device) or "",
    )
    monkeypatch.setattr(native, "_native", extension)
    native._cuda_fault.cache_clear()
    yield machine
    native._cuda_fault.cache_clear()


def call_everything(device: str) -> None:
    """Each op once, on fake tensors of two pairs."""
    with FakeTensorMode(), torch.device(device):
        x, ones = torch.empty(4, 4, 8, 8), torch.ones(2)
        ids = torch.zeros(2, dtype=torch.int64)
        native.pair_errors_fwd(x, x, x)
        native.pair_errors_bwd(torch.ones(4), x, x)
        native.dpo_loss_fwd(x, x, x, 1.0, None, None)
        native.dpo_loss_bwd(torch.ones(()), x, x, ones, 1.0, None, None)
        native.noise_pair_fwd(x, ones, ones, 1, ids, ids, "epsilon", torch.float32)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_every_launch_is_made_with_the_device_of_its_tensors_current(machine, index):
    """Whatever device was current before, and it is current again afterwards; kernels were loaded first, once."""
    machine.current = 2
    call_everything(f"cuda:{index}")
    assert machine.current == 2
    assert {current for _, current, _ in machine.events} == {index}
    names = [name for name, _, _ in machine.events]
    assert names == ["cuda_fault", "pair_errors", "pair_errors_grad", "dpo_loss", "dpo_loss_grad", "noise_pair"]
    assert {place for name, _, place in machine.events if name != "cuda_fault"} == {(index, STREAM + index, 0)}


def test_the_first_use_of_a_device_in_a_capture_is_refused(machine):
    """There the kernels cannot be loaded. After a first call outside nothing has to be, on that device."""
    machine.capturing = True
    with pytest.raises(RuntimeError, match=r"used on cuda:1 for the first time while a CUDA graph is captured.*once"):
        call_everything("cuda:1")
    assert machine.events == []
    machine.capturing = False
    call_everything("cuda:1")
    machine.capturing = True
    call_everything("cuda:1")
    assert [name for name, _, _ in machine.events].count("cuda_fault") == 1
    with pytest.raises(RuntimeError, match="used on cuda:0 for the first time"):
        call_everything("cuda:0")


def test_a_device_that_cannot_run_the_kernels_is_told_before_a_launch(machine, monkeypatch):
    monkeypatch.setattr(native._native, "cuda_fault", lambda device: f"no image for {device}")
    with pytest.raises(RuntimeError, match="backend 'native' cannot be used on cuda:1: no image for 1"):
        call_everything("cuda:1")
    assert machine.events == []


# ---- which code a GPU runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "arch", "code", "ptx"),
    [
        ((8, 0), "80", True, True),
        ((8, 9), "80", True, True),  # code runs on later minor versions
        ((8, 0), "86", False, False),
        ((9, 0), "89", False, True),  # and not on later major ones, which PTX does
        ((10, 0), "90", False, True),
        ((12, 0), "100", False, True),
        ((12, 1), "120", True, True),
        ((8, 9), "90", False, False),
        ((9, 0), "90a", True, True),
        ((10, 0), "90a", False, False),
        ((10, 3), "100a", False, False),
        ((10, 3), "100f", True, True),
        ((12, 0), "100f", False, False),
    ],
)
def test_what_runs_on_a_capability(capability, arch, code, ptx):
    assert native.runs_on(capability, arch, is_ptx=False) is code
    assert native.runs_on(capability, arch, is_ptx=True) is ptx


@pytest.fixture
def gpu(monkeypatch):
    """Makes a build for some architectures and a GPU of some capability."""

    def make(cubins: str, ptx: str, capability: tuple[int, int]) -> None:
        extension = SimpleNamespace(cuda_cubins=cubins, cuda_ptx=ptx, cuda_fault=lambda device: "built without CUDA: x")
        monkeypatch.setattr(native, "_native", extension)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    return make


def test_env_says_jit_where_only_ptx_fits(gpu):
    gpu("80,86", "86", (9, 0))
    build, line = env._native_build()
    assert build == "native build: C++ and CUDA for sm_80, sm_86, and PTX of compute_86"
    assert line.startswith("gpu 0 native: JIT: the build has no code for sm_90, so the driver compiles its PTX of")
    assert line.endswith("or with DPO_FAST_CUDA_ARCHS=90")
    gpu("80,86,90", "90", (8, 9))
    assert env._native_build()[1] == "gpu 0 native: compiled code of sm_86"  # the closest, which a driver takes too
    gpu("90", "90", (8, 0))
    assert env._native_build()[1].startswith("gpu 0 native: none: the build has neither code nor PTX for sm_80")


def test_env_says_why_a_build_is_without_cuda(gpu):
    gpu("", "", (9, 0))
    assert env._native_build() == ["native build: C++; built without CUDA: x"]


def test_env_reports_the_build_at_hand():
    (line,) = [line for line in env.report().splitlines() if line.startswith("native build: ")]
    assert line == f"native build: {native.build()}"
    if archs := native._native.cuda_cubins:
        assert all(f"sm_{arch}" in line for arch in archs.split(","))
    else:
        assert "C++; built without CUDA: " in line and line.endswith(native._native.cuda_fault(0))
