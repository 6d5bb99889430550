"""The proof of the pair ops' backends: the right ones pass, and each planted fault is found."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dpo_fast.choices import pair_ops, timing
from dpo_fast.choices.child import Disproved, Unusable
from dpo_fast.choices.pair_ops import Shape
from dpo_fast.kernels import dispatch, reference
from tests.helpers.runs import environment

OWN = Shape(2, (4, 8, 8), torch.bfloat16)
SHAPES = [
    OWN,
    Shape(3, (4, 8, 6), torch.float16, "v_prediction", channels_last=True),
    Shape(2, (4, 8, 8), torch.float32, reference_errors=True, labels=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_is_proven_on_a_cpu(shape):
    if reason := dispatch.usable_backends("cpu")["native"]:
        pytest.skip(reason)
    pair_ops.prove("native", shape.as_arguments("cpu"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_passes_its_own_proof(shape, monkeypatch):
    without_bits(monkeypatch)
    pair_ops.prove("reference", shape.as_arguments("cpu"))


def without_bits(monkeypatch) -> None:
    """Leave the comparison with native's bits out: the reference rounds otherwise."""
    monkeypatch.setattr(dispatch, "usable_backends", lambda device="cpu": {"native": "left out"})


def planted(monkeypatch, **changed: Callable) -> None:
    """Let the candidate be the reference, but for these functions."""
    functions = {name: getattr(reference, name) for name in vars(reference) if name.endswith(("_fwd", "_bwd"))}
    module = SimpleNamespace(**functions | changed)
    monkeypatch.setattr(pair_ops, "_modules", lambda name, device: dict.fromkeys(
        ("noise_pair", "pair_errors", "dpo_loss"), module))  # fmt: skip
    without_bits(monkeypatch)


def _noise(change: Callable[[Tensor, Tensor], None]) -> Callable:
    def noise_pair_fwd(latents: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        noisy, target = reference.noise_pair(latents, *rest)
        change(noisy, target)
        return noisy, target

    return noise_pair_fwd


def _errors(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Callable:
    return lambda policy, ref, target: change(policy, *reference.pair_errors_fwd(policy, ref, target))


def _write_beside(policy: Tensor, *errors: Tensor) -> tuple[Tensor, ...]:
    torch.as_strided(policy, (1,), (1,), policy.storage_offset() + policy.numel()).zero_()
    return errors


def _write_input(policy: Tensor, *errors: Tensor) -> tuple[Tensor, ...]:
    policy.view(-1)[0] = 0
    return errors


def _leave_out(policy: Tensor, error: Tensor, ref_error: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    empty = torch.empty_like(delta)
    empty[:-1] = delta[:-1]
    return error, ref_error, empty


def _by_address(policy: Tensor, error: Tensor, ref_error: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    moved = policy.storage_offset() % 2
    return error * (1 + moved * 2**-23), ref_error, delta


def _loss(place: int, change: Callable[[Tensor], Tensor]) -> dict[str, Callable]:
    def dpo_loss_fwd(*args: object) -> tuple[Tensor, ...]:
        return tuple(change(v) if k == place else v for k, v in enumerate(reference.dpo_loss_fwd(*args)))

    return dict(dpo_loss_fwd=dpo_loss_fwd)


def _without_last_pair(*args: object) -> Tensor:
    grad = reference.dpo_loss_bwd(*args)
    if len(grad) == 4:  # margin 9: its gradient is small beside the other pair's
        grad[[1, 3]] = 0
    return grad


FAULTS = {
    "target is .* further from float64": dict(noise_pair_fwd=_noise(lambda noisy, target: target.mul_(1 + 1e-4))),
    "noisy latents is .* further": dict(noise_pair_fwd=_noise(lambda noisy, target: noisy.view(-1)[-1:].add_(1))),
    "policy_error is .* further": dict(pair_errors_fwd=_errors(lambda p, e, r, d: (e * (1 + 1e-5), r, d))),
    "error_delta is .* further": dict(pair_errors_fwd=_errors(lambda p, e, r, d: (e, r, e - r + 1e-6))),
    "error_delta is not finite, or was not written": dict(pair_errors_fwd=_errors(_leave_out)),
    "ref_error is .*, not ": dict(pair_errors_fwd=_errors(lambda p, e, r, d: (e, r[:1], d))),
    "the same call gives other bits": dict(pair_errors_fwd=_errors(_by_address)),
    "memory beside it, was written": dict(pair_errors_fwd=_errors(_write_beside)),
    "an input, or memory": dict(pair_errors_fwd=_errors(_write_input)),
    "margin is .* further": _loss(1, lambda value: value * 1.001),
    "the loss's policy_error is not finite": _loss(2, lambda value: value * float("nan")),
    "the loss's ref_error is .* further": _loss(3, lambda value: value * 0 - 7),
    "loss is .* further": dict(dpo_loss_fwd=lambda *args: reference.dpo_loss_fwd(*args[:-1], None)),  # no weights
    "gradient of the loss is .* further": dict(dpo_loss_bwd=lambda *args: reference.dpo_loss_bwd(*args) * 1.004),
    r"gradient of the loss is \d\S* further": dict(dpo_loss_bwd=_without_last_pair),
    "error_delta without a reference is": dict(
        pair_errors_fwd=lambda policy, ref, target: (
            reference.pair_errors_fwd(policy, ref, target)
            if ref is not None
            else (*reference.pair_errors_fwd(policy, ref, target)[:2], torch.zeros(len(policy)))
        )
    ),
    "gradient of the errors is .* further": dict(pair_errors_bwd=lambda *args: -reference.pair_errors_bwd(*args)),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_planted_fault_is_found(monkeypatch, said):
    planted(monkeypatch)
    pair_ops.prove("planted", OWN.as_arguments("cpu"))  # without a fault it passes
    planted(monkeypatch, **FAULTS[said])
    with pytest.raises(Disproved, match=said):
        pair_ops.prove("planted", OWN.as_arguments("cpu"))


def test_a_backend_of_another_device_cannot_be_used():
    if not dispatch.usable_backends("cpu")["triton"]:
        pytest.skip("Triton is interpreted here")
    with pytest.raises(Unusable, match="CUDA"):
        pair_ops.prove("triton", OWN.as_arguments("cpu"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_interpreted_triton_has_the_bits_of_the_cpu(shape):
    script = f"from dpo_fast.choices import pair_ops; pair_ops.prove('triton', {shape.as_arguments('cpu')!r})"
    env = environment() | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_times_are_of_every_candidate():
    names = ["reference", *(["native"] if not dispatch.usable_backends("cpu")["native"] else [])]
    found = pair_ops.times(names, OWN.as_arguments("cpu"))
    assert list(found) == names
    for first, rounds in found.values():
        assert first > 0 and timing.LEAST_ROUNDS <= len(rounds) <= pair_ops.ROUNDS and min(rounds) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", pair_ops.BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(backend, shape):
    if reason := dispatch.usable_backends("cuda")[backend]:
        pytest.skip(reason)
    pair_ops.prove(backend, shape.as_arguments("cuda"))
