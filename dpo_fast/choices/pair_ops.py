"""A plan: the backends of the pair ops (`dpo_fast.kernels`), proven and timed at the shapes of a run.

A backend is proven if, at the run's own shape and at odd ones,

- noise, noisy latents and gradients have the bits of the CPU's native ops, where those are built and are not what is
  being proven; else noise x is within 2e-6 (1 + |x|) of the reference's, and gradients are rounded once;
- errors, margins and losses are within twice PyTorch's own error, plus 4 ulp of the terms, of float64;
- three calls with inputs at different addresses, moved by 0, 1 and 3 elements, give the same bits, with outputs
  poisoned before;
- inputs and what surrounds them in memory are left alone (a write beside an output is not seen);
- on CUDA, a call on another stream waits for what that stream does before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.choices.child import Disproved, Unusable
from dpo_fast.choices.timing import Times, in_turn, open_device
from dpo_fast.kernels import dispatch, reference

BASELINE = "reference"
BACKENDS = ("native", "triton")
GUARD = 64  # elements before and after an input
OFFSETS = (0, 1, 3)  # elements by which the three calls' inputs are moved
ROUNDS, ROUND_SECONDS = 15, 4e-3
NOISE_BOUND = 2e-6  # of normals, against the reference's, which are float64's rounded once
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Shape:
    """One call of the ops."""

    pairs: int
    image: tuple[int, int, int]  # C, H, W
    dtype: torch.dtype  # of noisy latents and predictions; latents are fp16
    prediction_type: str = "epsilon"
    reference_errors: bool = False  # the reference gives its errors [2B] instead of predictions
    channels_last: bool = False
    labels: bool = False

    @staticmethod
    def of(arguments: dict[str, Any]) -> "Shape":
        """Read a shape from JSON values, as `as_arguments` makes them."""
        values = {name: value for name, value in arguments.items() if name != "device"}
        return Shape(**values | {"image": tuple(values["image"]), "dtype": getattr(torch, values["dtype"])})

    def as_arguments(self, device: str) -> dict[str, Any]:
        """The arguments of this plan."""
        return vars(self) | {"dtype": str(self.dtype).removeprefix("torch."), "device": device}


def start(arguments: dict[str, Any]) -> None:
    """Take the device, on which backends are judged and events recorded. Raises RuntimeError if it cannot be used."""
    open_device(arguments["device"])


def prove(candidate: str, arguments: dict[str, Any]) -> None:
    """Raise Disproved if a backend is wrong at a run's shape or an odd one, Unusable if it cannot be used here."""
    device, own = torch.device(arguments["device"]), Shape.of(arguments)
    modules = _modules(candidate, device)
    with _poisoned_outputs():
        for number, shape in enumerate(_shapes(own)):
            inputs = _inputs(shape, seed=number)
            truth = _truth(inputs, candidate, device)
            first = None
            for offset in OFFSETS:
                placed = _Placed(inputs, device, offset)
                results = {name: value.cpu() for name, value in _every_output(modules, placed.values).items()}
                placed.check()
                _check(truth, results, f"{shape}, inputs moved by {offset} elements")
                bits = {name: _bits(value) for name, value in results.items()}
                if bits != (first := first or bits):
                    raise Disproved(f"the same call gives other bits at {shape}")
        if device.type == "cuda":
            _check_stream(modules, _inputs(own, seed=0), device)


def times(candidates: Sequence[str], arguments: dict[str, Any]) -> dict[str, Times]:
    """Time, by backend, what a step calls: noise, loss and its gradient."""
    device = torch.device(arguments["device"])
    inputs = _Placed(_inputs(Shape.of(arguments), seed=0), device, 0).values
    calls = {name: partial(_step, _modules(name, device), inputs) for name in candidates}
    return in_turn(calls, device, rounds=ROUNDS, round_seconds=ROUND_SECONDS)


# ---- what is run -------------------------------------------------------------------------------------------------


def _modules(name: str, device: torch.device) -> dict[str, ModuleType]:
    sample = torch.zeros(1, device=device)
    try:
        return {op: dispatch.module_for(op, name, sample) for op in ("noise_pair", "pair_errors", "dpo_loss")}
    except RuntimeError as error:
        raise Unusable(dispatch.usable_backends(device.type).get(name) or str(error)) from error


def _shapes(own: Shape) -> Iterator[Shape]:
    """The run's shape, one pair of it, and odd ones: sizes, channels, layouts, soft labels, a reference's errors."""
    yield own
    yield replace(own, pairs=1, labels=True)
    for image, changes in (
        ((4, 7, 5), {"labels": True}),
        ((5, 3, 9), {"prediction_type": "v_prediction", "reference_errors": True}),
        ((1, 1, 1031), {}),
        ((3, 5, 7), {"channels_last": True}),
        ((1, 1, 1), {"reference_errors": True}),
    ):
        yield replace(own, pairs=3, image=image, **{"channels_last": False} | changes)


@dataclass(frozen=True)
class _Inputs:
    """Inputs of all ops, on the CPU."""

    shape: Shape
    latents: Tensor
    signal: Tensor
    sigma: Tensor
    pair_id: Tensor
    draw: Tensor
    seed: int
    policy: Tensor
    ref: Tensor
    target: Tensor
    label: Tensor | None
    weight: Tensor
    # gradients are of these numbers, not of a backend's own margins, which differ in the last bits
    grad_error: Tensor
    margin: Tensor
    grad_loss: Tensor
    beta: float = 2000.0

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def _inputs(shape: Shape, seed: int) -> _Inputs:
    """Draw inputs like a training step's: unit targets, a policy close to its reference, all timesteps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(images: int) -> Tensor:
        return torch.randn(images, *shape.image, generator=generator)

    def laid(x: Tensor, dtype: torch.dtype) -> Tensor:
        layout = torch.channels_last if shape.channels_last else torch.contiguous_format
        return x.to(dtype).contiguous(memory_format=layout)

    pairs = shape.pairs
    shared = shape.prediction_type == "epsilon"
    target = normal(pairs if shared else 2 * pairs)
    every = target.repeat(2, 1, 1, 1) if shared else target
    ref = every + 0.3 * normal(2 * pairs)
    policy = ref + 3e-3 * normal(2 * pairs)
    alpha_bar = torch.rand(pairs, generator=generator, dtype=torch.float64)
    return _Inputs(
        shape,
        laid(normal(2 * pairs), torch.float16),  # as the cache and the VAE give them, whatever the compute dtype
        alpha_bar.sqrt().float(),
        (1 - alpha_bar).sqrt().float(),
        torch.randint(1 << 40, (pairs,), generator=generator),
        torch.randint(1 << 28, (pairs,), generator=generator),
        int(torch.randint(1 << 62, (), generator=generator)),
        laid(policy, shape.dtype),
        (ref - every).square().mean((1, 2, 3)) if shape.reference_errors else laid(ref, shape.dtype),
        laid(target, torch.float32),
        torch.rand(pairs, generator=generator) if shape.labels else None,
        torch.arange(1, pairs + 1) % 3 / 2,  # 0.5, 1, 0, ...
        torch.linspace(-1, 1, 2 * pairs),
        torch.linspace(-9, 9, pairs) if pairs > 1 else torch.tensor([0.5]),
        torch.tensor(8.0),
    )


class _Placed:
    """Inputs on a device, each inside a buffer of its own that nothing may change."""

    def __init__(self, inputs: _Inputs, device: torch.device, offset: int) -> None:
        self.buffers, self.before, placed = [], [], {}
        for name, tensor in inputs.tensors().items():
            filling = float("nan") if tensor.is_floating_point() else -1
            buffer = torch.full((tensor.numel() + 2 * GUARD + offset,), filling, dtype=tensor.dtype, device=device)
            inside = buffer[GUARD + offset : GUARD + offset + tensor.numel()]
            placed[name] = inside.as_strided(tensor.shape, tensor.stride(), inside.storage_offset())
            placed[name].copy_(tensor)
            self.buffers.append(buffer)
            self.before.append(_bits(buffer))
        self.values = replace(inputs, **placed)

    def check(self) -> None:
        """Raise Disproved if an input or what surrounds it has changed."""
        if any(_bits(buffer) != before for buffer, before in zip(self.buffers, self.before, strict=True)):
            raise Disproved(f"an input, or memory beside it, was written at {self.values.shape}")


def _step(modules: dict[str, ModuleType], x: _Inputs) -> tuple[Tensor, ...]:
    """What a training step calls: noisy latents and target; loss, margin, policy_error, ref_error; the gradient."""
    noise = modules["noise_pair"].noise_pair_fwd(
        x.latents, x.signal, x.sigma, x.seed, x.pair_id, x.draw, x.shape.prediction_type, x.shape.dtype
    )
    loss = modules["dpo_loss"].dpo_loss_fwd(x.policy, x.ref, x.target, x.beta, x.label, x.weight)
    grad = modules["dpo_loss"].dpo_loss_bwd(x.grad_loss, x.policy, x.target, x.margin, x.beta, x.label, x.weight)
    return *noise, *loss, grad


def _every_output(modules: dict[str, ModuleType], x: _Inputs) -> dict[str, Tensor]:
    """The outputs of `_step`, and of the errors on their own, with and without a reference."""
    values = (
        *_step(modules, x),
        *modules["pair_errors"].pair_errors_fwd(x.policy, x.ref, x.target),
        *modules["pair_errors"].pair_errors_fwd(x.policy, None, x.target),
        modules["pair_errors"].pair_errors_bwd(x.grad_error, x.policy, x.target),
    )
    return dict(zip(NAMES, values, strict=True))


@contextmanager
def _poisoned_outputs() -> Iterator[None]:
    """Within the block, PyTorch fills new memory with NaN, or with the largest integer."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = filled


# ---- what must come of it ----------------------------------------------------------------------------------------


NAMES = (
    *("noisy latents", "target", "loss", "margin", "the loss's policy_error", "the loss's ref_error"),
    *("the gradient of the loss", "policy_error", "ref_error", "error_delta", "policy_error without a reference"),
    *("ref_error without a reference", "error_delta without a reference", "the gradient of the errors"),
)
WITH_BITS = ("noisy latents", "target", "the gradient of the loss", "the gradient of the errors")


class _Expected(NamedTuple):
    """What an output must be: the bits of `exact`, where that is known, and near `truth`."""

    exact: Tensor | None
    truth: Tensor  # float64
    allowed: Tensor  # float64: how far from the truth


def _truth(x: _Inputs, candidate: str, device: torch.device) -> dict[str, _Expected]:
    plain = _every_output(dict.fromkeys(("noise_pair", "pair_errors", "dpo_loss"), reference), x)
    pairs, target = x.shape.pairs, x.target.double()
    target = target.repeat(2, 1, 1, 1) if len(target) < len(x.policy) else target
    policy, ref = x.policy.double(), x.ref.double()
    error, nothing = (policy - target).square().mean((1, 2, 3)), torch.zeros(2 * pairs, dtype=torch.float64)
    if x.shape.reference_errors:
        ref_error, delta, terms = ref, error - ref, error + ref
    else:
        ref_error = (ref - target).square().mean((1, 2, 3))
        products = (policy - ref) * (policy + ref - 2 * target)
        delta, terms = products.mean((1, 2, 3)), products.abs().mean((1, 2, 3))
    margin = -x.beta / 2 * (delta[:pairs] - delta[pairs:])
    margin_terms = x.beta / 2 * (terms[:pairs] + terms[pairs:])
    label = torch.ones(pairs, dtype=torch.float64) if x.label is None else x.label.double()
    weight = x.weight.double()
    loss = (weight * (label * -F.logsigmoid(margin) + (1 - label) * -F.logsigmoid(-margin))).mean()

    def gradient(per_image: Tensor) -> Tensor:
        return (2 * per_image / x.policy[0].numel()).view(-1, 1, 1, 1) * (policy - target)

    up, down = label * torch.sigmoid(-x.margin.double()), (1 - label) * torch.sigmoid(x.margin.double())
    slope = x.grad_loss.double() * x.beta / 2 / pairs * weight
    grad_loss = gradient(torch.cat([slope * (up - down), -slope * (up - down)]))
    loss_terms = gradient(torch.cat([slope * (up + down)] * 2)).abs()
    grad_errors = gradient(x.grad_error.double())
    draws = (x.signal, x.sigma, x.seed, x.pair_id, x.draw, x.shape.prediction_type)
    # not rounded to the latents' dtype
    noisy, noise_target = (v.double() for v in reference.noise_pair(x.latents, *draws, torch.float32))
    sums = {  # truth, and the sum of the absolute values of its terms; a loss moves at most as far as its margins
        "loss": (loss, loss + (weight * margin_terms).mean()),
        "margin": (margin, margin_terms),
        "the loss's policy_error": (error, error),
        "the loss's ref_error": (ref_error, ref_error),
        "policy_error": (error, error),
        "ref_error": (ref_error, ref_error),
        "error_delta": (delta, terms),
        "policy_error without a reference": (error, error),
        "ref_error without a reference": (nothing, nothing),
        "error_delta without a reference": (error, error),
    }
    rounded = {  # truth in float32 or better, and how far a result may be from it before it is rounded to its dtype
        "noisy latents": (noisy, NOISE_BOUND * (1 + noisy.abs())),
        "target": (noise_target, NOISE_BOUND * (1 + noise_target.abs())),
        "the gradient of the loss": (grad_loss, 16 * torch.finfo(torch.float32).eps * loss_terms),
        "the gradient of the errors": (grad_errors, 16 * torch.finfo(torch.float32).eps * grad_errors.abs()),
    }
    allowed = {}
    for name, (truth, magnitude) in sums.items():
        info = torch.finfo(plain[name].dtype)
        ulp = (magnitude * info.eps).clamp(min=info.smallest_normal * info.eps)
        allowed[name] = 2 * (plain[name].double() - truth).abs().max() + 4 * ulp
    for name, (truth, before) in rounded.items():
        info = torch.finfo(plain[name].dtype)
        half_ulp = (truth.abs() * info.eps / 2).clamp(min=info.smallest_normal * info.eps)
        allowed[name] = before + 1.01 * half_ulp * (1 + before)
    exact: dict[str, Tensor] = {}
    if (candidate, device.type) != ("native", "cpu") and not dispatch.usable_backends("cpu")["native"]:
        of_cpu = _every_output(_modules("native", torch.device("cpu")), x)
        exact = {name: of_cpu[name] for name in WITH_BITS}
    return {name: _Expected(exact.get(name), truth, allowed[name]) for name, (truth, _) in (sums | rounded).items()}


def _check(expected: dict[str, _Expected], results: dict[str, Tensor], where: str) -> None:
    for name, result in results.items():
        exact, truth, allowed = expected[name]
        if result.shape != truth.shape:
            raise Disproved(f"{name} is {list(result.shape)}, not {list(truth.shape)}, at {where}")
        if not result.isfinite().all():
            raise Disproved(f"{name} is not finite, or was not written, at {where}")
        if exact is not None and _bits(result) != _bits(exact):
            raise Disproved(f"{name} does not have the bits of the CPU's, at {where}")
        error = (result.double() - truth).abs()
        if not (error <= allowed).all():
            worst = float((error - allowed).max())
            raise Disproved(f"{name} is {worst:.3g} further from float64 than allowed, at {where}")


def _check_stream(modules: dict[str, ModuleType], inputs: _Inputs, device: torch.device) -> None:
    """Raise Disproved if a call does not wait for what its own stream does before it."""
    expected = {name: _bits(x) for name, x in _every_output(modules, _Placed(inputs, device, 0).values).items()}
    late, side = _Placed(inputs, device, 0).values, torch.cuda.Stream(device)
    originals = {name: tensor.clone() for name, tensor in late.tensors().items()}
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        _every_output(modules, late)  # allocates: an allocation waits for all streams
        for cycles in (10**8, 10**9):
            for tensor in late.tensors().values():
                tensor.zero_()
            torch.cuda._sleep(cycles)
            for name, tensor in late.tensors().items():
                tensor.copy_(originals[name])
            waiting = torch.cuda.Event()
            waiting.record()
            results = _every_output(modules, late)
            if not waiting.query():  # the calls were made while the stream was still busy
                break
        else:
            raise Unusable("whether a call waits for its stream cannot be tried here: the stream was never busy")
    side.synchronize()
    if expected != {name: _bits(x) for name, x in results.items()}:
        raise Disproved("a call on another stream does not wait for that stream")


def _bits(x: Tensor) -> bytes:
    """The bits of a tensor in its logical order."""
    return x.detach().cpu().contiguous().view(_INTEGERS[x.element_size()]).numpy().tobytes()
