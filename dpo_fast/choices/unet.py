"""A plan: how the UNet runs (attention, memory order, compilation), proven and timed on a thin UNet.

The thin UNet has the widths, heads, blocks and resnets of the run's own, with one transformer layer where that has
several, every parameter random; its inputs have the run's shapes. A variant is proven if

- before the first update policy (with a graph) and reference (without one, and without adapters) predict the same bits,
  so that the first margin is exactly 0;
- its predictions and gradients are as near to the truth as plain PyTorch's: at most twice as far as the farther of two
  eager batch shapes, and no pixel of the prediction more than four times as far as plain PyTorch's worst. The truth is
  computed one pair at a time, in a wider dtype; for fp32 on a GPU, where float64 can be 64 times as slow, in fp32.

What is timed is a training pass: the reference's forward, where it runs, then the policy's forward and backward.
"""

import copy
import json
import math
import time
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.choices.child import Disproved, Unusable
from dpo_fast.choices.timing import Times, in_turn, open_device
from dpo_fast.errors import BadInput
from dpo_fast.forward import AdapterOff, FrozenCopy, Reference
from dpo_fast.models import add_lora, check_compiler, compile_unet, compiles, recompute_activations, set_attention
from dpo_fast.models.inputs import of_one_image, pooled_width
from dpo_fast.models.memory_order import format_of
from dpo_fast.models.sd15 import SD15
from dpo_fast.models.sdxl import SDXL

ROUNDS, ROUND_SECONDS = 9, 0.02
RANK = 8  # of the adapters, whatever the run's
FACTOR = 2.0  # of plain PyTorch's own error
FACTOR_OF_ONE = 4.0  # the same for the worst pixel and for one parameter's gradient, whose errors vary more
LEAST_ULPS = 64  # of a relative error that is allowed where the truth has no wider dtype
LEAST_GRADIENT = 0.01  # of the root mean square over parameters: smaller gradients are measured against it
PREDICTION, GRADIENTS, PIXEL = "prediction", "gradients", "the worst pixel"


class Variant(NamedTuple):
    """One way to run the UNet."""

    attention: str = "sdpa"
    memory_order: str = "channels_last"
    compile: str = "off"

    def __str__(self) -> str:
        return ", ".join(self)

    @staticmethod
    def of(candidate: str) -> "Variant":
        """Read a variant from its name."""
        return Variant(*candidate.split(", "))


def start(arguments: dict[str, Any]) -> None:
    """Take the device. Raises RuntimeError if it cannot be used."""
    open_device(arguments["device"])


def prove(candidate: str, arguments: dict[str, Any]) -> float:
    """Return the seconds of a variant's first pass, which compiles it.

    Raises Disproved if it computes something else than plain PyTorch, Unusable if it cannot run here.
    """
    bench, variant = _bench(json.dumps(arguments)), Variant.of(candidate)
    step, expected, plain = bench.step(variant), bench.expected, bench.plain_errors
    if not all(map(math.isfinite, plain.values())):
        raise Unusable("plain PyTorch itself is not finite here, so there is nothing to compare with")
    began = time.perf_counter()
    if step.reference is not None:
        bench.change(step.unet, 0.0)
        _check_margin(step)
    bench.change(step.unet)
    found = step.results()
    first = time.perf_counter() - began
    for name, value in found.items():
        if not value.isfinite().all():
            raise Disproved(f"{name} is not finite")
    errors = _errors(found, expected)
    least = torch.finfo(bench.dtype).eps * (1 if bench.truth_is_wider else LEAST_ULPS)
    for name, error in errors.items():
        whole = name in (PREDICTION, GRADIENTS)
        allowed = (FACTOR if whole else FACTOR_OF_ONE) * max(plain[name], least)
        if not error <= allowed:
            raise Disproved(f"{name}: relative error {error:.3g}, {plain[name]:.3g} in plain PyTorch")
    return first


def times(candidates: Sequence[str], arguments: dict[str, Any]) -> dict[str, Times]:
    """Time a training pass of the thin UNet in every variant."""
    bench = _bench(json.dumps(arguments))
    variants = {name: Variant.of(name) for name in candidates}
    bench.keep_only(variants.values())
    calls = {name: bench.step(variant) for name, variant in variants.items()}
    return in_turn(calls, bench.device, rounds=ROUNDS, round_seconds=ROUND_SECONDS)


def share_of_run(arguments: dict[str, Any]) -> float:
    """Return the FLOPs of the thin UNet's forward as a fraction of the whole one's."""
    return forward_flops(arguments | {"unet": thin(arguments["unet"])}) / forward_flops(arguments)


def forward_flops(arguments: dict[str, Any]) -> int:
    """Count the FLOPs of one image's forward pass, without computing it."""
    return _forward_flops(json.dumps({name: arguments[name] for name in ("unet", "latent", "tokens")}))


@lru_cache
def _forward_flops(given: str) -> int:
    arguments = json.loads(given)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(arguments["unet"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**of_one_image(arguments["unet"], arguments["latent"], arguments["tokens"], torch.float32))
    return counter.get_total_flops()


def thin(unet: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a UNet with one transformer layer where `unet` has several."""
    layers = unet.get("transformer_layers_per_block", 1)
    once = [1] * len(layers) if isinstance(layers, (list, tuple)) else 1
    return unet | {"transformer_layers_per_block": once, "reverse_transformer_layers_per_block": None}


class _Step:
    """A policy and its reference in one variant. A call is a training pass."""

    def __init__(self, bench: "_Bench", variant: Variant) -> None:
        self.bench, self.variant = bench, variant
        self.model = bench.model(variant)
        self.unet, self.reference = self.model.unet, bench.reference(self.model, variant)

    def attend(self) -> None:
        """Set the attention, since eager variants share their UNet."""
        for unet in (self.unet, getattr(self.reference, "unet", self.unet)):
            try:
                set_attention(unet, self.variant.attention)
            except (BadInput, ImportError, ValueError, NotImplementedError) as error:  # of diffusers, about xformers
                raise Unusable(str(error)) from error

    def __call__(self) -> None:
        self.attend()
        self.refer()
        (self.predict().float() * self.bench.cotangent).sum().backward()
        self.unet.zero_grad(set_to_none=True)

    def refer(self) -> Tensor | None:
        """The reference's prediction."""
        inputs = self.bench.inputs
        return self.reference and self.reference(inputs.batch, self.noisy(), inputs.conditioning)

    def predict(self) -> Tensor:
        """The policy's prediction."""
        inputs = self.bench.inputs
        return self.model.denoise(self.unet, self.noisy(), inputs.batch.timesteps, inputs.conditioning)

    def noisy(self) -> Tensor:
        return self.bench.inputs.noisy.contiguous(memory_format=format_of(self.variant.memory_order))

    def results(self) -> dict[str, Tensor]:
        """The prediction and the gradients of what is trained."""
        self.attend()
        prediction = self.predict()
        (prediction.float() * self.bench.cotangent).sum().backward()
        return _taken(self.unet, prediction)


class _Bench:
    """Inputs, weights and what must come of them, for the arguments of one run."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.device, self.dtype = torch.device(arguments["device"]), getattr(torch, arguments["dtype"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments["tf32"]
        self.unet_config = thin(arguments["unet"])
        self.kind = SDXL if pooled_width(arguments["unet"]) else SD15
        self.inputs = _inputs(arguments, self.device)
        # small, so that no gradient overflows in fp16
        self.cotangent = (_normal(self.inputs.noisy.shape, 1, self.device) / 16).to(self.dtype).float()
        self.made: dict[tuple[str, str], _Model] = {}
        self.referred: dict[tuple[str, str], Reference] = {}
        half, tf32 = self.dtype != torch.float32, arguments["tf32"] and self.device.type == "cuda"
        self.truth_is_wider = half or tf32 or self.device.type == "cpu"
        self.truth_dtype = torch.float32 if half or self.device.type == "cuda" else torch.float64

    def step(self, variant: Variant) -> _Step:
        """Return the pass of a variant. Raises Unusable for one that cannot run here."""
        if compiles(variant.compile):
            try:
                check_compiler(self.device)
            except BadInput as error:
                raise Unusable(str(error)) from error
        step = _Step(self, variant)
        step.attend()
        return step

    def model(self, variant: Variant) -> "_Model":
        """Return the policy; eager variants of one memory order share it."""
        key = variant.memory_order, variant.compile
        if key not in self.made:
            unet = copy.deepcopy(self.plain).to(memory_format=format_of(variant.memory_order))
            compile_unet(unet, variant.compile)
            self.made[key] = _Model(self.kind, unet)
        return self.made[key]

    def reference(self, model: "_Model", variant: Variant) -> Reference | None:
        """Return the reference; None if the run holds none."""
        if self.arguments["reference"] != "online":
            return None
        key = variant.memory_order, variant.compile
        if key not in self.referred:
            lora = self.arguments["tuning"] == "lora"
            self.referred[key] = AdapterOff(model) if lora else FrozenCopy(model, variant.compile)
        return self.referred[key]

    def keep_only(self, variants: Iterable[Variant]) -> None:
        """Free what only proofs need, and the models of other variants."""
        keys = {(variant.memory_order, variant.compile) for variant in variants}
        for made in (self.made, self.referred):
            for key in made.keys() - keys:
                del made[key]
        for name in ("expected", "plain_errors"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def plain(self) -> UNet2DConditionModel:
        """The UNet that all variants are copied from, eager and at its start."""
        arguments = self.arguments
        with torch.device(self.device):
            unet = UNet2DConditionModel.from_config(self.unet_config).eval()
        randomise(unet)
        if arguments["tuning"] == "lora":
            add_lora(unet, RANK, RANK, arguments["targets"])
        else:
            unet.requires_grad_(True)
        unet.to(self.dtype)
        recompute_activations(unet, arguments["recompute"])
        set_attention(unet, "sdpa")
        return unet

    def change(self, unet: nn.Module, scale: float = 0.1) -> None:
        """Set a UNet's trained parameters to their start, plus the same change at every call: every adapter then has a
        gradient."""
        start = dict(self.plain.named_parameters())
        with torch.no_grad():
            for number, (name, parameter) in enumerate(unet.named_parameters()):
                if parameter.requires_grad:
                    change = _normal(parameter.shape, 1000 + number, self.device) / max(1, len(parameter)) ** 0.5
                    parameter.copy_(start[name] + (scale * change).to(parameter.dtype))

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Prediction and gradients, one pair at a time, without TF32."""
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            return self._one_pair_at_a_time(self.truth_dtype)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    @cached_property
    def plain_errors(self) -> dict[str, float]:
        """Plain PyTorch's own errors: the larger of those of the run's batch and of one pair at a time."""
        whole = self.step(Variant())
        self.change(whole.unet)
        both = [_errors(found, self.expected) for found in (whole.results(), self._one_pair_at_a_time(self.dtype))]
        return {name: max(errors[name] for errors in both) for name in both[0]}

    def _one_pair_at_a_time(self, dtype: torch.dtype) -> dict[str, Tensor]:
        unet = copy.deepcopy(self.plain)
        self.change(unet)
        model, inputs = _Model(self.kind, unet.to(dtype)), self.inputs
        pairs, predictions = len(inputs.batch.timesteps), []
        for pair in range(pairs):
            images = torch.tensor([pair, pairs + pair], device=self.device)
            of_pair = {name: value[pair : pair + 1] for name, value in inputs.conditioning.items()}
            noisy, at = inputs.noisy[images].to(dtype), inputs.batch.timesteps[pair : pair + 1]
            prediction = model.denoise(unet, noisy, at, of_pair)
            (prediction * self.cotangent[images].to(prediction.dtype)).sum().backward()
            predictions.append(prediction.detach())
        chosen, rejected = (torch.cat([one[side : side + 1] for one in predictions]) for side in (0, 1))
        return _taken(unet, torch.cat([chosen, rejected]))


class _Model:
    """A UNet with what a reference needs of its family."""

    def __init__(self, kind: type, unet: nn.Module) -> None:
        self.unet = unet
        self.denoise = partial(kind.denoise, self)
        self._added_conditioning = partial(kind._added_conditioning, self)


@lru_cache(maxsize=1)
def _bench(arguments: str) -> _Bench:
    return _Bench(json.loads(arguments))


def _inputs(arguments: dict[str, Any], device: torch.device) -> SimpleNamespace:
    """Draw inputs of the run's shapes: noisy [2B,C,h,w] in its dtype, timesteps [B], conditioning [B,...]."""
    unet, pairs, side = arguments["unet"], arguments["pairs"], arguments["latent"]
    dtype, text = getattr(torch, arguments["dtype"]), (pairs, arguments["tokens"], unet["cross_attention_dim"])
    conditioning = {"prompt_embeds": _normal(text, 2, device).to(dtype)}
    if pooled := pooled_width(unet):
        conditioning["pooled_prompt_embeds"] = _normal((pairs, pooled), 3, device).to(dtype)
        conditioning["time_ids"] = torch.full((pairs, 6), 8.0 * side, device=device)
    return SimpleNamespace(
        noisy=_normal((2 * pairs, unet["in_channels"], side, side), 4, device).to(dtype),
        batch=SimpleNamespace(timesteps=torch.arange(1, pairs + 1, device=device) * 997 % 1000),
        conditioning=conditioning,
    )


def _normal(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)


@torch.no_grad()
def randomise(unet: nn.Module) -> None:
    """Give every parameter a random value that keeps activations near one: untrained norms would hide a difference."""
    for number, (name, parameter) in enumerate(unet.named_parameters()):
        value = _normal(parameter.shape, 10_000 + number, parameter.device)
        if parameter.ndim > 1:
            parameter.copy_(value / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * value + ("norm" in name and name.endswith("weight")))


def _taken(unet: nn.Module, prediction: Tensor) -> dict[str, Tensor]:
    """Take the gradients from a UNet, beside a prediction."""
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad(set_to_none=True)
    return {PREDICTION: prediction.detach()} | {f"the gradient of {name}": g for name, g in gradients.items()}


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return relative errors, also of the prediction's worst pixel and of all gradients together.

    Raises Disproved if a gradient is missing.
    """
    if missing := expected.keys() - found.keys():
        raise Disproved(f"{min(missing)} was not computed")
    squares = {
        name: ((found[name].to(truth.dtype) - truth).double().square().sum(), truth.double().square().sum())
        for name, truth in expected.items()
    }
    gradients = [pair for name, pair in squares.items() if name != PREDICTION]
    squares[GRADIENTS] = tuple(torch.stack(side).sum() for side in zip(*gradients, strict=True))
    # a gradient that is nearly zero, as that of a bias before a norm can be, holds little but rounding
    least = LEAST_GRADIENT**2 * squares[GRADIENTS][1] / len(gradients)
    truth = expected[PREDICTION]
    of_pixels = (found[PREDICTION].to(truth.dtype) - truth).double().square().sum(1)  # a wrong tile is few pixels
    squares[PIXEL] = of_pixels.max(), truth.double().square().sum(1).mean()
    return {name: float((error / torch.maximum(truth, least)).sqrt()) for name, (error, truth) in squares.items()}


@torch.no_grad()
def _check_margin(step: _Step) -> None:
    """Raise Disproved unless policy and reference predict the same bits before the first update."""
    with torch.enable_grad():
        step.attend()
        ref, prediction = step.refer(), step.predict()
    if not prediction.isfinite().all():
        raise Disproved("the prediction is not finite")
    if not torch.equal(prediction, ref):
        differing = (prediction != ref).float().mean()
        worst = (prediction.float() - ref.float()).abs().max()
        raise Disproved(f"policy and reference differ before the first update: {differing:.1%}, by up to {worst:.3g}")
