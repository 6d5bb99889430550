"""Choose how a run computes: which candidates are asked about, by whom, and what follows from the answers.

Three questions: how the UNet runs eagerly (attention and memory order), whether compiling it pays, and which backend
computes the pair ops. One rank of every host and kind of device asks; all ranks get the same choices.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dpo_fast.choices import machine, pair_ops, unet
from dpo_fast.choices.decision import Outcome, decide, merged
from dpo_fast.choices.remembered import recall, remember
from dpo_fast.choices.trial import UNPROVABLE, Evidence, Limits, judge
from dpo_fast.choices.unet import Variant
from dpo_fast.choices.workload import Workload
from dpo_fast.files import human_seconds
from dpo_fast.kernels import dispatch
from dpo_fast.models.attention import ATTENTIONS
from dpo_fast.models.compiling import MODES, TUNED, compiles
from dpo_fast.models.load_errors import bad_input
from dpo_fast.models.memory_order import FORMATS
from dpo_fast.parallel import Ranks

AUTO = "auto"
FLOPS = {"cpu": 1e11, "cuda": 1e14}  # a second, roughly: to tell seconds from hours before anything is measured
GAIN_AT_MOST = 0.25  # of a run's time, assumed before anything is tried: what a trial may take
EAGER_SECONDS, COMPILE_SECONDS = 30.0, 90.0  # that trying eager candidates takes together, and a compiled one each
# Both eager questions together end within a minute.
PAIR_OPS_LIMITS = Limits(seconds=20.0, all_seconds=10.0, end_seconds=20.0)
EAGER_LIMITS = Limits(seconds=30.0, all_seconds=25.0, end_seconds=40.0)
COMPILE_LIMITS = Limits(seconds=600.0, all_seconds=1800.0, end_seconds=2400.0)
HOST_MEMORY = 0.8  # of what is available, for the UNet's trials

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choices:
    """How a run computes, by the flags' names; "auto": not chosen, which is plain PyTorch on a GPU."""

    backend: str = AUTO
    attention: str = AUTO
    memory_order: str = AUTO
    compile: str = AUTO


@dataclass(frozen=True)
class Chosen:
    """The choices of a run, and what they rest on."""

    choices: Choices
    outcomes: tuple[Outcome, ...] = ()
    lines: tuple[str, ...] = ()  # for the user


@dataclass(frozen=True)
class Question:
    """Which of some candidates is best."""

    what: str  # in words
    plan: str  # a module's name
    baseline: str
    candidates: tuple[str, ...]
    arguments: dict[str, Any]
    limits: Limits
    seconds: float = EAGER_SECONDS  # about how long a trial takes

    def about(self, device: torch.device) -> dict[str, Any]:
        """All that the answer depends on, except which of several equal GPUs is used."""
        arguments = {name: value for name, value in self.arguments.items() if name != "device"}
        asked = {"plan": self.plan, "baseline": self.baseline, "candidates": list(self.candidates)}
        return asked | {"arguments": arguments, "machine": machine.facts(device)}

    def judge(self, note: Callable[[str], None], seconds: float = math.inf) -> Evidence:
        """Prove and time the candidates now, within some seconds."""
        limits = replace(self.limits, end_seconds=min(self.limits.end_seconds, seconds))
        try:
            return judge(self.plan, self.baseline, self.candidates, self.arguments, limits, note)
        except OSError as error:  # no process can be started
            return Evidence(dict.fromkeys(self.candidates, f"{UNPROVABLE}: {error}"))


def choose(
    workload: Workload, ranks: Ranks, fixed: Choices, passes: float, root: Path, *, only_known: bool = False
) -> Chosen:
    """Choose what `fixed` leaves open, "auto", for a run of `passes` training passes. Every rank calls this.

    Answers are kept in the cache folder `root`. What is not proven, or not worth a proof, stays "auto". only_known:
    prove nothing now, and write nothing.
    """
    ask = _Asking(ranks, root, only_known)
    chosen, outcomes, lines = fixed, [], []
    compiled = compiles(fixed.compile)
    plain = Variant(
        "sdpa" if fixed.attention == AUTO else fixed.attention,
        "channels_last" if fixed.memory_order == AUTO else fixed.memory_order,
        fixed.compile if compiled else "off",
    )

    length = cache(lambda: expected_seconds(workload, passes))
    eager = ask.outcome(eager_question(workload, fixed, plain), length)
    if eager is not None:
        outcomes.append(eager)
        best = Variant.of(eager.chosen)
        if eager.settled:
            chosen = replace(chosen, attention=best.attention, memory_order=best.memory_order)
        lines.append(_line(f"attention {best.attention}, memory order {best.memory_order}", eager))
    if fixed.compile == AUTO:
        best = Variant.of(eager.chosen) if eager is not None else plain
        compiling, line = _compiling(ask, workload, best, eager, passes, length)
        lines.append(line)
        if compiling is not None:
            outcomes.append(compiling)
            chosen = replace(chosen, compile=Variant.of(compiling.chosen).compile)
    if fixed.backend == AUTO and not any(ranks.gather(bool(os.environ.get(dispatch.VARIABLE)))):
        ops = ask.outcome(pair_ops_question(workload, chosen.memory_order), length)
        if ops is not None:
            outcomes.append(ops)
            chosen = replace(chosen, backend=ops.chosen if ops.settled else AUTO)
            lines.append(_line(f"pair ops by {ops.chosen if ops.settled else 'the default'}", ops))
    if not outcomes and not only_known and GAIN_AT_MOST * length() < EAGER_SECONDS:
        seconds = human_seconds(length())
        lines = [f"nothing is proven for a run of about {seconds}, which would not pay for it: plain defaults are used"]
    return Chosen(chosen, tuple(outcomes), tuple(filter(None, lines)))


def expected_seconds(workload: Workload, passes: float) -> float:
    """Estimate how long a run takes from its FLOPs; a backward pass has two forward passes'.

    Raises BadInput for a configuration of which no UNet can be made.
    """
    forwards = 3 + (workload.reference == "online")
    with bad_input("the configuration of the UNet cannot be used", "name a whole diffusers pipeline"):
        flops = 2 * workload.pairs * forwards * unet.forward_flops(workload.for_unet())
    return passes * flops / FLOPS[torch.device(workload.device).type]


def eager_question(workload: Workload, fixed: Choices, plain: Variant) -> Question | None:
    """Ask for attention and memory order, as far as they are open; None if there is nothing to choose from."""
    on_gpu = workload.device != "cpu"  # a CPU has PyTorch's own attention only
    attentions = ATTENTIONS[1:] if fixed.attention == AUTO and on_gpu else [plain.attention]
    orders = list(FORMATS) if fixed.memory_order == AUTO else [plain.memory_order]
    variants = [Variant(attention, order, plain.compile) for order, attention in product(orders, attentions)]
    candidates = tuple(str(variant) for variant in variants if variant != plain)
    what = f"attention and memory order on {workload.device}"
    return _unet_question(what, workload, plain, candidates, compiles(plain.compile)) if candidates else None


def compile_question(workload: Workload, plain: Variant) -> Question:
    """Ask how to compile the UNet that otherwise runs as `plain` says."""
    on_gpu = workload.device != "cpu"  # elsewhere Inductor times nothing, and "-tuned" is the same program
    modes = [mode for mode in MODES if on_gpu or not mode.endswith(TUNED)]
    candidates = tuple(str(plain._replace(compile=mode)) for mode in modes)
    return _unet_question(f"compilation on {workload.device}", workload, plain, candidates, compiled=True)


def _unet_question(
    what: str, workload: Workload, plain: Variant, candidates: tuple[str, ...], compiled: bool
) -> Question:
    limits = replace(COMPILE_LIMITS if compiled else EAGER_LIMITS, memory_mib=_available_mib())
    seconds = COMPILE_SECONDS * (1 + len(candidates)) if compiled else EAGER_SECONDS
    return Question(what, unet.__name__, str(plain), candidates, workload.for_unet(), limits, seconds)


def pair_ops_question(workload: Workload, memory_order: str) -> Question:
    """Ask for the backend of the pair ops."""
    arguments = workload.for_pair_ops("channels_last" if memory_order == AUTO else memory_order)
    what = f"pair ops on {workload.device}"
    return Question(what, pair_ops.__name__, pair_ops.BASELINE, pair_ops.BACKENDS, arguments, PAIR_OPS_LIMITS)


def _compiling(
    ask: "_Asking",
    workload: Workload,
    best: Variant,
    eager: Outcome | None,
    passes: float,
    length: Callable[[], float],  # of the run in seconds, from its FLOPs: used where nothing was timed
) -> tuple[Outcome | None, str]:
    """Ask whether compiling pays within the run. Returns the outcome and a line for the user."""
    question = compile_question(workload, best)
    median = None if eager is None else eager.row(eager.chosen).median
    share = ask.ranks.from_main(lambda: unet.share_of_run(question.arguments))

    def timed() -> float:
        return passes * median / 1e3 / share

    length = length if median is None else timed
    outcome = ask.outcome(question, length, calls=passes / share)
    if outcome is None and (ask.only_known or GAIN_AT_MOST * length() < EAGER_SECONDS):
        return None, ""  # nothing to say, or no run to speak of
    if outcome is None:
        return None, f"compile off: a run of about {human_seconds(length())} is too short to pay for finding out"
    return outcome, _line("compile " + Variant.of(outcome.chosen).compile, outcome)


def _line(what: str, outcome: Outcome) -> str:
    """Say what was chosen, what it gains, and what failed a proof."""
    if outcome.chosen == outcome.baseline:
        said = "nothing that is proven here is faster"
    else:
        said = f"proven here, {outcome.gain:.2f} times as fast as {outcome.baseline}"
    failed = [f"{row.candidate} {row.reason}" for row in outcome.rows if row.reason and not row.unusable]
    return "; ".join((f"{what}: {said}", *failed))


class _Asking:
    """Asks questions for all ranks."""

    def __init__(self, ranks: Ranks, root: Path, only_known: bool) -> None:
        self.ranks, self.root, self.only_known = ranks, root, only_known
        mine = machine.site(ranks.device)
        self.sites = [str(site) for site in ranks.gather(mine)]
        self.asks = self.sites.index(mine) == ranks.rank  # the first rank of its site

    def outcome(
        self, question: Question | None, length: Callable[[], float], calls: float | None = None
    ) -> Outcome | None:
        """Return the outcome on which all ranks agree; None if a site knows no answer and none is to be found now, or
        a run of this length, in seconds, does not pay for a trial."""
        if question is None:
            return None
        device = self.ranks.device
        known = self.ranks.on_all(lambda: recall(self.root, question.about(device)) if self.asks else None)
        spare = math.inf
        if not all(self.ranks.gather(known is not None or not self.asks)):
            if self.only_known:
                return None
            spare = GAIN_AT_MOST * length()
            if spare < question.seconds:
                return None
        missing = self.asks and known is None
        mine = self.ranks.on_all(lambda: self._found_now(question, spare) if missing else known)
        found = self.ranks.gather(mine and asdict(mine))
        by_site = {site: Evidence(**found[self.sites.index(site)]) for site in self.sites}
        outcome = decide(question.what, question.baseline, merged(by_site, question.baseline), calls)
        logger.debug("%s", outcome)
        return outcome

    def _found_now(self, question: Question, seconds: float) -> Evidence:
        with _progress(question, shown=self.ranks.is_main) as note:
            evidence = question.judge(note, seconds)
        remember(self.root, question.about(self.ranks.device), evidence)
        return evidence


@contextmanager
def _progress(question: Question, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar over the candidates; the block gets a function that is told what begins."""
    with tqdm(total=len(question.candidates) + 1, desc=question.what, disable=not shown, leave=False) as bar:

        def note(doing: str) -> None:
            bar.set_postfix_str(doing)
            bar.update()

        yield note


def _available_mib() -> float:
    """The host memory that a trial may take."""
    memory = machine.memory_of(torch.device("cpu"))
    return Limits().memory_mib if memory is None else HOST_MEMORY * memory.free / 2**20
