"""The losses that pairs can be trained with, as rows of one table.

A row's function returns the loss of pairs whose chosen image is the better one. A soft label y, the probability of
that, weighs this loss against the loss of the same pair with its images exchanged:

    loss = (1/B) sum over pairs of weight * [y f(pair) + (1 - y) f(exchanged pair)]

margin and implicit reward are in our unit, which includes beta/2:

    margin = -(beta/2) [(e_w - eref_w) - (e_l - eref_l)]        implicit reward = -(beta/2) (e - eref), per image
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.errors import BadInput, one_line
from dpo_fast.kernels import DPOLoss, dpo_loss, pair_errors
from dpo_fast.kernels.pair_errors import check_per_pair
from dpo_fast.kernels.reference import batch_mean, pair_margin
from dpo_fast.presets import DEFAULT_BETA

FROM_PYTHON = "python:"  # begins the name of an objective that was given in Python


class Pairs(NamedTuple):
    """The arguments of a loss, all [B]; margin and rewards are None without a reference."""

    error_w: Tensor
    error_l: Tensor
    margin: Tensor | None = None
    reward_w: Tensor | None = None
    reward_l: Tensor | None = None

    def exchanged(self) -> "Pairs":
        """The same pairs with the rejected image as the chosen one."""
        margin = None if self.margin is None else -self.margin
        return Pairs(self.error_l, self.error_w, margin, self.reward_l, self.reward_w)


@dataclass(frozen=True)
class Settings:
    """What an objective's function takes besides the pairs."""

    beta: float  # in our unit (see the module docstring)

    @classmethod
    def of(cls, **values: object) -> "Settings":
        """Build the settings from all values of a run; each class takes those it has a field for."""
        lacking = [field.name for field in fields(cls) if field.name not in values and field.default is MISSING]
        if lacking:
            raise BadInput(f"{cls.__name__}.{lacking[0]} needs a default: a run gives only {', '.join(values)}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True)
class SmoothedLabels(Settings):
    """Settings of cDPO."""

    label_smoothing: float = 0.0  # the probability that a label is wrong, in [0, 0.5)


@dataclass(frozen=True)
class KLTerm(Settings):
    """Settings of Diffusion-KTO."""

    kl: Tensor  # [] float32 >= 0, detached: the mean implicit reward of the previous step, or 0


class Terms(NamedTuple):
    """The loss and the values reported with it."""

    loss: Tensor  # [], the only one with a gradient
    margin: Tensor | None  # [B]; None for an objective without a margin
    policy_error: Tensor  # [2B]
    ref_error: Tensor | None  # [2B]; None without a reference
    implicit_reward: Tensor | None  # [2B]; None without a reference


def dpo(pairs: Pairs, settings: Settings) -> Tensor:
    """-logsigmoid(margin): arXiv 2311.12908 eq. 14; with smoothed labels cDPO (ericmitchell.ai/cdpo.pdf)."""
    return -F.logsigmoid(pairs.margin)


def ipo(pairs: Pairs, settings: Settings) -> Tensor:
    """(margin - 1/2)^2: arXiv 2310.12036 eq. 17 times tau^2, so that its gradient is of order beta."""
    return (pairs.margin - 0.5).square()


def hinge(pairs: Pairs, settings: Settings) -> Tensor:
    """relu(1 - margin): SLiC's rank loss (arXiv 2305.10425) on implicit rewards."""
    return F.relu(1 - pairs.margin)


def kto(pairs: Pairs, settings: KLTerm) -> Tensor:
    """Mean over both images of 1 - sigmoid(+-(reward - kl)): Diffusion-KTO, arXiv 2404.04465."""
    return (torch.sigmoid(settings.kl - pairs.reward_w) + torch.sigmoid(pairs.reward_l - settings.kl)) / 2


def mapo(pairs: Pairs, settings: Settings) -> Tensor:
    """e_w - beta logsigmoid(T (phi(e_w) - phi(e_l))), phi(e) = s e / (exp(s e) - 1): MaPO, arXiv 2406.06424."""
    s, T = 0.5, 1000
    return pairs.error_w - settings.beta * F.logsigmoid(
        T * (_x_over_expm1(s * pairs.error_w) - _x_over_expm1(s * pairs.error_l))
    )


def sft(pairs: Pairs, settings: Settings) -> Tensor:
    """The diffusion loss of the chosen image (arXiv 2006.11239 eq. 14)."""
    return pairs.error_w


@dataclass(frozen=True)
class Objective:
    """A row of the table, or an objective of your own (`dpo_fast.train(..., objective=Objective(...))`).

    The function takes `Pairs`, float32 [B] each, whose chosen image is the better one, and `settings`; it returns the
    loss of each pair, [B], which autograd can follow back to the pairs. It must be pure: of a soft label it is called
    twice, the second time with the images exchanged.
    """

    function: Callable[[Pairs, Settings], Tensor]  # loss [B] of pairs
    needs_reference: bool = True  # False: margin and rewards are None, and no reference is held or run
    settings: type[Settings] = Settings  # KLTerm for a function that uses kto's mean reward
    fused: Callable[..., DPOLoss] | None = None  # the op that gives the same loss from predictions, if there is one
    default_beta: float = DEFAULT_BETA["dpo"]  # in our unit
    name: str | None = None  # that results record; None: the function's

    @property
    def has_margin(self) -> bool:
        """Whether there is a margin to report, which needs the reference."""
        return self.needs_reference

    @property
    def title(self) -> str:
        """The name in results and messages."""
        return self.name or getattr(self.function, "__name__", str(self.function))


# Names and default betas are in `presets.DEFAULT_BETA`, which the command line reads without PyTorch.
OBJECTIVES = {
    "dpo": Objective(dpo, fused=dpo_loss),
    "ipo": Objective(ipo),
    "hinge": Objective(hinge),
    "cdpo": Objective(dpo, settings=SmoothedLabels, fused=dpo_loss, name="cdpo"),
    "kto": Objective(kto, settings=KLTerm),
    "mapo": Objective(mapo, needs_reference=False, default_beta=DEFAULT_BETA["mapo"]),
    "sft": Objective(sft, needs_reference=False),  # beta has no effect; any positive value will do
}


@contextmanager
def registered(objective: "Objective | Callable[[Pairs, Settings], Tensor] | None") -> Iterator[str | None]:
    """Within the block the table has a row for this objective of the user's own. Yields the row's name.

    A function stands for its row with the defaults; for None there is no row and no name. Raises BadInput for what is
    neither, and for a name that is not an identifier.
    """
    if objective is None:
        yield None
        return
    row = objective if isinstance(objective, Objective) else _own(objective)
    if row is None:
        raise BadInput(
            f"objective={objective!r:.200} is neither a name, an Objective nor a function of (pairs, settings)"
        )
    if not row.title.isidentifier():
        raise BadInput(
            f"the objective {row.title!r:.80} needs a name that is an identifier: Objective(..., name='mine')"
        )
    name = FROM_PYTHON + row.title
    if name in OBJECTIVES:
        raise BadInput(f"an objective named {row.title} is in use by another run of this process: name it otherwise")
    OBJECTIVES[name], DEFAULT_BETA[name] = row, row.default_beta
    try:
        yield name
    finally:
        del OBJECTIVES[name], DEFAULT_BETA[name]


def find_objective(name: str) -> Objective:
    """Return the row called `name`, or a row made from the user's own function, `module:function`.

    The function takes `Pairs` and `Settings` and returns the loss [B]; if its attribute `needs_reference` is False it
    gets neither margin nor rewards. Raises BadInput for an unknown name and for a function that cannot be imported.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if name.startswith(FROM_PYTHON):
        raise BadInput(
            f"--objective {name} is a function that was given in Python and is not in any file: go on from Python, with"
            " dpo_fast.train(..., objective=Objective(...)) of the same name"
        )
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise BadInput(
            f"--objective {name} is not one of {', '.join(OBJECTIVES)}; name your own loss as module:function"
        )
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise BadInput(
            f"--objective {name} cannot be imported ({one_line(error)}): is its folder on PYTHONPATH?"
        ) from error
    if (objective := _own(function)) is None:
        raise BadInput(f"--objective {name} is not a function: it must take (pairs, settings) and give the loss [B]")
    return objective


def _own(function: object) -> Objective | None:
    """Return a row made from the user's own function; None for anything else."""
    if not callable(function) or isinstance(function, type):
        return None
    return Objective(function, needs_reference=getattr(function, "needs_reference", True))


def try_out(objective: Objective, settings: Settings, device: torch.device) -> None:
    """Compute the loss of a few made-up pairs and its gradient, as in a run's first step and in later ones.

    Raises BadInput for a function that fails, and for a loss or gradient that a run could not use.
    """
    generator = torch.Generator().manual_seed(0)
    target, ref, step = torch.randn(3, 6, 4, 8, 8, generator=generator).to(device).unbind()
    target = target[:3]
    ref = target.repeat(2, 1, 1, 1) + 0.3 * ref
    for moved, when in ((0.0, "before the first step"), (0.02, "once the policy has moved")):
        policy = (ref + moved * step).requires_grad_()
        try:
            loss = evaluate(objective, policy, ref if objective.needs_reference else None, target, settings).loss
            (gradient,) = torch.autograd.grad(loss, policy)
        except BadInput:
            raise
        except Exception as error:  # whatever the user's function raises
            raise BadInput(
                f"the objective {objective.title} fails ({type(error).__name__}: {one_line(error)})"
            ) from error
        if not (loss.isfinite() and gradient.isfinite().all()):
            what = f"a loss of {loss.item():g}" if not loss.isfinite() else "a gradient that is not finite"
            raise BadInput(f"the objective {objective.title} gives {what} {when}, for errors near 1: mend the function")


def _check_own(name: str, loss: object, pairs: Pairs) -> None:
    """Raise BadInput for what a user's function returned, if it is not the loss [B] of `pairs`."""
    if not isinstance(loss, Tensor):
        raise BadInput(f"the objective {name} gives a {type(loss).__name__}, not a tensor: it must give the loss [B]")
    if loss.shape != pairs.error_w.shape:
        raise BadInput(
            f"the objective {name} gives a loss of shape {[*loss.shape]}, not [{len(pairs.error_w)}]: it must give the"
            " loss of each pair, without a mean over them"
        )
    if not loss.is_floating_point():
        raise BadInput(f"the objective {name} gives a loss of dtype {loss.dtype}: it must be a floating-point tensor")
    if pairs.error_w.requires_grad and not loss.requires_grad:
        raise BadInput(
            f"the objective {name} gives a loss without a gradient: compute it from the pairs by torch operations,"
            " without item(), detach() or no_grad()"
        )


def evaluate(
    objective: Objective,
    policy_pred: Tensor,  # [2B, C, H, W] any float dtype, chosen first
    ref: Tensor | None,  # predictions [2B, C, H, W] or float32 errors [2B]; None if the objective needs none
    target: Tensor,  # [B, C, H, W] shared, or [2B, C, H, W]
    settings: Settings,  # of the objective's class
    *,
    label: Tensor | None = None,  # [B] float32, probability that the chosen image is the better one; None: all 1
    weight: Tensor | None = None,  # [B] float32; None: all 1
) -> Terms:
    """Compute the loss of B pairs. Raises ValueError for a missing or unwanted reference, for settings of another
    objective and for whatever pair_errors and dpo_loss refuse, and BadInput for a function that does not return the
    loss [B] with a gradient.
    """
    title = objective.title
    if objective.needs_reference != (ref is not None):
        wanted = "needs ref, the reference's predictions or errors" if ref is None else "takes no reference: ref=None"
        raise ValueError(f"the objective {title} {wanted}")
    if type(settings) is not objective.settings:
        raise ValueError(f"the objective {title} takes {objective.settings.__name__}, not {settings}")
    pair_count = policy_pred.shape[0] // 2
    for name, value in (("label", label), ("weight", weight)):
        if value is not None:
            check_per_pair(name, value, pair_count, policy_pred.device)
    if isinstance(settings, SmoothedLabels) and settings.label_smoothing:
        label = torch.ones(pair_count, device=policy_pred.device) if label is None else label
        label = label * (1 - settings.label_smoothing) + (1 - label) * settings.label_smoothing

    beta = settings.beta
    if objective.fused is not None:
        report = objective.fused(policy_pred, ref, target, beta, label=label, weight=weight)
        return Terms(*report, implicit_reward=(beta / 2) * (report.ref_error - report.policy_error))

    policy_error, ref_error, error_delta = pair_errors(policy_pred, ref, target)
    pairs = Pairs(*policy_error.chunk(2))
    if objective.needs_reference:
        reward = -(beta / 2) * error_delta
        pairs = Pairs(pairs.error_w, pairs.error_l, pair_margin(error_delta, beta), *reward.chunk(2))
    pair_loss = objective.function(pairs, settings)
    _check_own(title, pair_loss, pairs)
    if label is not None:
        pair_loss = label * pair_loss + (1 - label) * objective.function(pairs.exchanged(), settings)
    loss = batch_mean(pair_loss, weight)
    if not objective.needs_reference:
        return Terms(loss, None, policy_error.detach(), None, None)
    return Terms(loss, pairs.margin.detach(), policy_error.detach(), ref_error, reward.detach())


def _x_over_expm1(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) for x >= 0, with its limit 1 and slope -1/2 at 0.

    Near 0 the quotient's derivative is a difference of two large numbers, so the Taylor series is used there.
    """
    small = x < 0.1
    square = x.square()
    series = 1 - x / 2 + square / 12 - square.square() / 720
    safe = x.where(~small, 1.0)  # the branch not taken must not put nan in the gradient
    return torch.where(small, series, safe * (-safe).exp() / -(-safe).expm1())  # no exp(x), which overflows
