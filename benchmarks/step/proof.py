"""Prove equal work: compare what a row computed with the fp32 truth."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.step.plain import Seen
from benchmarks.step.work import PROOF_STEPS

MARGIN = 0.1  # least rms margin at the sixth step: then its loss depends on the updates before


@dataclass(frozen=True)
class Noise:
    """How far rounding alone may move a row from the truth."""

    error: float  # relative, of an image's mean squared error
    norm: float  # relative, of the gradient norm
    loss: float  # absolute, of the loss at the sixth step
    margin: float  # relative to the rms margin at the sixth step


NOISE = {
    "fp32": Noise(error=1e-4, norm=1e-3, loss=2e-2, margin=2e-2),
    "fp16": Noise(error=5e-3, norm=3e-2, loss=0.1, margin=0.1),
    "bf16": Noise(error=3e-2, norm=0.15, loss=0.4, margin=0.4),
}


@dataclass
class Proof:
    """What a row computed, as plain lists."""

    policy_error: list[float]  # [2P] at the first step
    ref_error: list[float]  # [2P]
    grad_norm: float  # at the first step, before clipping
    margin: list[float]  # [P] at the sixth step

    @property
    def loss(self) -> float:
        """The loss at the sixth step."""
        return -F.logsigmoid(torch.tensor(self.margin, dtype=torch.float64)).mean().item()

    @staticmethod
    def of(first: Seen, sixth: Seen) -> "Proof":
        return Proof(
            first.policy_error.tolist(), first.ref_error.tolist(), first.grad_norm.item(), sixth.margin.tolist()
        )


def prove(provider) -> Proof:
    """Run a fresh provider's first six steps and return what they computed."""
    first = provider.observed_step()
    first = Seen(first.policy_error.clone(), first.ref_error.clone(), first.margin, first.grad_norm.clone())
    for _ in range(PROOF_STEPS - 2):
        provider.step()
    return Proof.of(first, provider.observed_step())


def problems(row: Proof, truth: Proof, dtype: str) -> list[str]:
    """Return where a row deviates from the truth: a line each, with both values and what was allowed."""
    noise, found = NOISE[dtype], []

    def relative(name: str, got: list[float], want: list[float], allowed: float, scale: float | None = None) -> None:
        if len(got) != len(want):
            found.append(f"{name}: {len(got)} values, the truth has {len(want)}")
            return
        worst = max(range(len(want)), key=lambda i: _distance(got[i], want[i], scale))
        distance = _distance(got[worst], want[worst], scale)
        if not distance <= allowed:
            found.append(
                f"{name} [{worst}] is {got[worst]:.6g}, the truth {want[worst]:.6g}: off by {distance:.1e}"
                f" of {'it' if scale is None else 'the rms'}, {dtype} allows {allowed:.0e}"
            )

    relative("policy MSE", row.policy_error, truth.policy_error, noise.error)
    relative("reference MSE", row.ref_error, truth.ref_error, noise.error)
    relative("gradient norm", [row.grad_norm], [truth.grad_norm], noise.norm)
    relative("margin at step 6", row.margin, truth.margin, noise.margin, _rms(truth.margin))
    if not abs(row.loss - truth.loss) <= noise.loss:
        found.append(
            f"loss at step 6 is {row.loss:.6g}, the truth {truth.loss:.6g}: off by {abs(row.loss - truth.loss):.1e},"
            f" {dtype} allows {noise.loss:.0e}"
        )
    return found


def weakness(truth: Proof) -> str | None:
    """Return why the truth proves nothing; None if it does prove something."""
    rms = _rms(truth.margin)
    if rms > MARGIN:
        return None
    return f"the rms margin at step 6 is {rms:.3g}, not above {MARGIN}: raise the case's learning_rate"


def _distance(got: float, want: float, scale: float | None) -> float:
    return abs(got - want) / max(abs(want) if scale is None else scale, 1e-30)


def _rms(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).square().mean().sqrt().item()
