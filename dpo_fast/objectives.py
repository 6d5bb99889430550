"""The losses a pair can be trained with, each a row of one table.

A row's function gives the loss of pairs whose chosen image is the better one. A soft label y, the probability of that,
weighs it against the loss of the same pair with its images exchanged:

    loss = (1/B) sum over pairs of weight * [y f(pair) + (1 - y) f(exchanged pair)]

margin and implicit reward are in our unit, which has beta/2 in it:

    margin = -(beta/2) [(e_w - eref_w) - (e_l - eref_l)]        implicit reward = -(beta/2) (e - eref), of an image
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.kernels import DPOLoss, dpo_loss, pair_errors
from dpo_fast.kernels.pair_errors import check_per_pair
from dpo_fast.kernels.reference import batch_mean, pair_margin


class Pairs(NamedTuple):
    """What a loss is a function of; all [B], those of the reference None where there is none."""

    error_w: Tensor
    error_l: Tensor
    margin: Tensor | None = None
    reward_w: Tensor | None = None
    reward_l: Tensor | None = None

    def exchanged(self) -> "Pairs":
        """The same pairs with the rejected image as the chosen one."""
        margin = None if self.margin is None else -self.margin
        return Pairs(self.error_l, self.error_w, margin, self.reward_l, self.reward_w)


class Terms(NamedTuple):
    """The loss and what is reported beside it."""

    loss: Tensor  # [], the only one with a gradient
    margin: Tensor | None  # [B]; None for an objective without a margin
    policy_error: Tensor  # [2B]
    ref_error: Tensor | None  # [2B]; None without a reference
    implicit_reward: Tensor | None  # [2B]; None without a reference


def dpo(pairs: Pairs, beta: float, kl: Tensor | None) -> Tensor:
    """-logsigmoid(margin): arXiv 2311.12908 eq. 14; with smoothed labels cDPO (ericmitchell.ai/cdpo.pdf)."""
    return -F.logsigmoid(pairs.margin)


def ipo(pairs: Pairs, beta: float, kl: Tensor | None) -> Tensor:
    """(margin - 1/2)^2: arXiv 2310.12036 eq. 17 times tau^2, so that its gradient is of order beta."""
    return (pairs.margin - 0.5).square()


def hinge(pairs: Pairs, beta: float, kl: Tensor | None) -> Tensor:
    """relu(1 - margin): SLiC's rank loss (arXiv 2305.10425) on implicit rewards."""
    return F.relu(1 - pairs.margin)


def kto(pairs: Pairs, beta: float, kl: Tensor | None) -> Tensor:
    """Mean over both images of 1 - sigmoid(+-(reward - kl)): Diffusion-KTO, arXiv 2404.04465."""
    if kl is None:
        raise ValueError("kto needs kl, a detached scalar >= 0: the mean implicit reward of the previous step, or 0")
    return (torch.sigmoid(kl - pairs.reward_w) + torch.sigmoid(pairs.reward_l - kl)) / 2


def mapo(pairs: Pairs, beta: float, kl: Tensor | None) -> Tensor:
    """e_w - beta logsigmoid(T (phi(e_w) - phi(e_l))), phi(e) = s e / (exp(s e) - 1): MaPO, arXiv 2406.06424."""
    s, T = 0.5, 1000
    return pairs.error_w - beta * F.logsigmoid(
        T * (_x_over_expm1(s * pairs.error_w) - _x_over_expm1(s * pairs.error_l))
    )


def sft(pairs: Pairs, beta: float, kl: Tensor | None) -> Tensor:
    """The diffusion loss of the chosen image (arXiv 2006.11239 eq. 14)."""
    return pairs.error_w


@dataclass(frozen=True)
class Objective:
    """A row of the table."""

    function: Callable[[Pairs, float, Tensor | None], Tensor]  # loss [B] of pairs, at beta and kl
    needs_reference: bool
    default_beta: float
    fused: Callable[..., DPOLoss] | None = None  # the op that gives the same loss from predictions, if there is one
    smooths_labels: bool = False

    @property
    def has_margin(self) -> bool:
        """Whether there is a margin to report: it compares with the reference."""
        return self.needs_reference


OBJECTIVES = {
    "dpo": Objective(dpo, needs_reference=True, default_beta=5000.0, fused=dpo_loss),
    "ipo": Objective(ipo, needs_reference=True, default_beta=5000.0),
    "hinge": Objective(hinge, needs_reference=True, default_beta=5000.0),
    "cdpo": Objective(dpo, needs_reference=True, default_beta=5000.0, fused=dpo_loss, smooths_labels=True),
    "kto": Objective(kto, needs_reference=True, default_beta=5000.0),
    "mapo": Objective(mapo, needs_reference=False, default_beta=0.1),
    "sft": Objective(sft, needs_reference=False, default_beta=5000.0),  # beta has no effect; any positive one will do
}


def evaluate(
    objective: Objective,
    policy_pred: Tensor,  # [2B, C, H, W] any float dtype, chosen first
    ref: Tensor | None,  # predictions [2B, C, H, W] or float32 errors [2B]; None where the objective needs none
    target: Tensor,  # [B, C, H, W] shared, or [2B, C, H, W]
    beta: float,
    *,
    label: Tensor | None = None,  # [B] float32, probability that the chosen image is the better one; None: all 1
    weight: Tensor | None = None,  # [B] float32; None: all 1
    kl: Tensor | None = None,  # [] float32 >= 0, detached; for kto: the mean implicit reward of the previous step
    label_smoothing: float = 0.0,  # for cdpo: the probability that a label is wrong, in [0, 0.5)
) -> Terms:
    """The loss of B pairs. Raises ValueError for a reference that is missing or that nobody asked for, label_smoothing
    with another objective than cdpo, kto without kl, and what pair_errors and dpo_loss refuse.
    """
    if objective.needs_reference != (ref is not None):
        wanted = "needs ref, the reference's predictions or errors" if ref is None else "takes no reference: ref=None"
        raise ValueError(f"the objective {objective.function.__name__} {wanted}")
    pair_count = policy_pred.shape[0] // 2
    for name, value in (("label", label), ("weight", weight)):
        if value is not None:
            check_per_pair(name, value, pair_count, policy_pred.device)
    if label_smoothing:
        if not objective.smooths_labels:
            raise ValueError(f"label_smoothing ({label_smoothing}) belongs to cdpo, not {objective.function.__name__}")
        label = torch.ones(pair_count, device=policy_pred.device) if label is None else label
        label = label * (1 - label_smoothing) + (1 - label) * label_smoothing

    if objective.fused is not None:
        report = objective.fused(policy_pred, ref, target, beta, label=label, weight=weight)
        return Terms(*report, implicit_reward=(beta / 2) * (report.ref_error - report.policy_error))

    policy_error, ref_error, error_delta = pair_errors(policy_pred, ref, target)
    pairs = Pairs(*policy_error.chunk(2))
    if objective.needs_reference:
        reward = -(beta / 2) * error_delta
        pairs = Pairs(pairs.error_w, pairs.error_l, pair_margin(error_delta, beta), *reward.chunk(2))
    pair_loss = objective.function(pairs, beta, kl)
    if label is not None:
        pair_loss = label * pair_loss + (1 - label) * objective.function(pairs.exchanged(), beta, kl)
    loss = batch_mean(pair_loss, weight)
    if not objective.needs_reference:
        return Terms(loss, None, policy_error.detach(), None, None)
    return Terms(loss, pairs.margin.detach(), policy_error.detach(), ref_error, reward.detach())


def _x_over_expm1(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) for x >= 0, with its limit 1 and slope -1/2 at 0.

    Near 0 the quotient's derivative is a difference of two large numbers, so there it is the Taylor series.
    """
    small = x < 0.1
    square = x.square()
    series = 1 - x / 2 + square / 12 - square.square() / 720
    safe = x.where(~small, 1.0)  # the branch not taken must not put nan in the gradient
    return torch.where(small, series, safe * (-safe).exp() / -(-safe).expm1())  # no exp(x), which overflows
