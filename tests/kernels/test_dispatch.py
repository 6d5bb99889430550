"""dispatch: who is asked first, and what happens when what was asked for cannot be had."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dpo_fast.kernels import dispatch, dpo_loss, noise_pair, pair_errors
from dpo_fast.kernels import reference as reference_module

X = torch.zeros(2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice of an earlier call or of the machine's environment, before or after."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    caches = (dispatch._reason_against, dispatch._announce)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def native(monkeypatch):
    """A native backend that can be imported."""
    module = ModuleType("dpo_fast.kernels.native")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def no_native(monkeypatch):
    """A native backend that was not built."""
    monkeypatch.setitem(dispatch._HOME, "native", "dpo_fast.kernels.not_built")


def test_the_argument_wins_over_the_context_and_that_over_the_variable(monkeypatch, native):
    assert dispatch.module_for("dpo_loss", "auto", X) is native
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.module_for("dpo_loss", "auto", X) is reference_module
    with dispatch.backend("native"):
        assert dispatch.module_for("dpo_loss", "auto", X) is native
        assert dispatch.module_for("dpo_loss", "reference", X) is reference_module
        with dispatch.backend("reference"):
            assert dispatch.module_for("dpo_loss", "auto", X) is reference_module
        assert dispatch.module_for("dpo_loss", "auto", X) is native  # as before, not as without a context
        with dispatch.backend("auto"):  # undoes the variable too
            assert dispatch.module_for("dpo_loss", "auto", X) is native
    assert dispatch.module_for("dpo_loss", "auto", X) is reference_module
    assert dispatch.module_for("dpo_loss", "native", X) is native


def test_the_context_is_left_after_an_error(native):
    with pytest.raises(KeyError), dispatch.backend("reference"):
        raise KeyError
    assert dispatch.module_for("dpo_loss", "auto", X) is native


def test_auto_takes_the_reference_for_float64_and_for_unknown_devices(native):
    assert dispatch.module_for("dpo_loss", "auto", X, None, X.double()) is reference_module
    assert dispatch.module_for("dpo_loss", "auto", X.to("meta")) is reference_module


def test_auto_falls_back_to_the_reference(no_native):
    assert dispatch.module_for("dpo_loss", "auto", X) is reference_module


def test_triton_has_a_module_for_each_op(monkeypatch):
    package, module = ModuleType("dpo_fast.kernels.triton"), ModuleType("dpo_fast.kernels.triton.dpo_loss")
    for entry in (package, module):
        monkeypatch.setitem(sys.modules, entry.__name__, entry)
    assert dispatch.module_for("dpo_loss", "triton", X) is module


def test_what_cannot_be_had_raises(monkeypatch, no_native):
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot be used here .*; choose auto, reference"):
        dispatch.module_for("dpo_loss", "native", X)
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    with pytest.raises(RuntimeError, match="DPO_FAST_BACKEND 'native' cannot be used here"):
        pair_errors(torch.zeros(2, 1, 1, 1), None, torch.zeros(1, 1, 1, 1))


def test_unknown_names_raise(monkeypatch):
    with pytest.raises(ValueError, match="backend 'cuda' is unknown; choose auto, reference, triton, native"):
        dispatch.module_for("dpo_loss", "cuda", X)
    with pytest.raises(ValueError, match="'cuda' is unknown"), dispatch.backend("cuda"):
        pass
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="DPO_FAST_BACKEND 'fast' is unknown"):
        dispatch.module_for("dpo_loss", "auto", X)


def test_usable_backends_gives_the_reason(monkeypatch, no_native):
    def import_module(name):
        if name == "dpo_fast.kernels.triton":
            raise ImportError("triton needs a GPU; or set TRITON_INTERPRET=1")
        if name == "dpo_fast.kernels.not_built":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return SimpleNamespace()

    monkeypatch.setattr(dispatch, "import_module", import_module)
    assert dispatch.usable_backends() == {
        "reference": "",
        "triton": "triton needs a GPU; or set TRITON_INTERPRET=1",
        "native": "not in this installation of dpo_fast",
    }


def test_the_choice_is_logged_once(caplog, no_native):
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        for op in ("dpo_loss", "pair_errors", "dpo_loss"):
            dispatch.module_for(op, "auto", X)
    assert [record.getMessage() for record in caplog.records] == ["kernels on cpu: reference"]


def test_forward_and_backward_ask_for_the_backend_they_were_given(monkeypatch):
    asked = []

    def module_for(op, name, *tensors):
        asked.append((op, name))
        return reference_module

    monkeypatch.setattr(dispatch, "module_for", module_for)
    p = torch.ones(2, 1, 1, 1, requires_grad=True)
    pair_errors(p, None, torch.zeros(1, 1, 1, 1), backend="reference").error_delta.sum().backward()
    dpo_loss(p, torch.zeros(2), torch.zeros(1, 1, 1, 1), 1.0, backend="reference").loss.backward()
    assert asked == [("pair_errors", "reference")] * 2 + [("dpo_loss", "reference")] * 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_kernel_gets_dense_tensors_in_the_memory_order_of_the_prediction(monkeypatch, channels_last):
    """It reads an image as a row of numbers, so all inputs have to come in one order."""
    strides = []

    class Recorder:
        def __getattr__(self, name):
            def call(*arguments):
                strides.extend(x.stride() for x in arguments if isinstance(x, torch.Tensor) and x.dim() == 4)
                return getattr(reference_module, name)(*arguments)

            return call

    monkeypatch.setattr(dispatch, "module_for", lambda op, name, *tensors: Recorder())
    layouts = torch.channels_last, torch.contiguous_format
    own, other = layouts if channels_last else layouts[::-1]
    p = torch.ones(4, 3, 5, 6).contiguous(memory_format=own).requires_grad_()
    ref, target = torch.zeros(4, 3, 5, 6).contiguous(memory_format=other), torch.zeros(2, 3, 5, 12)[..., ::2]
    pair_errors(p, ref, target).error_delta.sum().backward()
    dpo_loss(p, ref, target, 1.0).loss.backward()
    assert len(strides) == 10 and set(strides) == {p.stride()}


def test_the_noise_kernel_gets_dense_tensors(monkeypatch):
    given = []

    class Recorder:
        def noise_pair_fwd(self, *arguments):
            given.extend(x for x in arguments if isinstance(x, torch.Tensor))
            return reference_module.noise_pair_fwd(*arguments)

    monkeypatch.setattr(dispatch, "module_for", lambda op, name, *tensors: Recorder())
    per_pair, ids = torch.ones(2, 2)[:, 0], torch.arange(4)[::2]
    latents = torch.zeros(4, 3, 5, 12)[..., ::2]
    noise_pair(latents, per_pair, per_pair, 0, ids, ids, prediction_type="epsilon", dtype=torch.float32)
    assert len(given) == 5 and all(x.is_contiguous() for x in given)
