"""Compare two evaluations image by image: the same prompts, the same noise, the same scorer, or a reason why not.

A policy's image and its base's are paired already; images of two policies are paired when both start from the same
noise. Then what the prompt and the noise do to the score cancels, and a difference between runs shows with far fewer
prompts than two separate intervals would need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dpo_fast.comparing.reading import Evaluation
from dpo_fast.evaluation.findings import SAMPLING
from dpo_fast.evaluation.formats import counted
from dpo_fast.statistics import Bootstrap, Interval, median_of_prompt

# The base's scores in two evaluations may differ by rounding. Where their root mean square difference exceeds this
# share of their spread over images, its images are others: in the built-in world other noise gives 0.13 (a scorer that
# looks at little but the prompt) to 1.1, and other batches of the same noise less than 1e-6.
ROUNDING = 0.05
Key = tuple[str, int, int]  # prompt, seed, and which of several equal ones


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a scorer says of N images of each of K policies and of what they were compared with."""

    keys: list[Key]  # N
    base: Tensor  # fp64 [N, K]
    policy: Tensor  # fp64 [N, K]

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(prompt for prompt, *_ in self.keys)

    @property
    def looks(self) -> Tensor:
        """fp64 [N, K]: 1 where the policy wins over its base, 0 where it loses, 1/2 in a tie."""
        return _looks(self.policy, self.base)

    @property
    def gains(self) -> Tensor:
        """fp64 [N, K]: policy minus base."""
        return self.policy - self.base

    def ordered_as(self, keys: Sequence[Key]) -> "Evidence":
        """The same with its rows in the order of `keys`, which are its own."""
        place = {key: row for row, key in enumerate(self.keys)}
        rows = torch.tensor([place[key] for key in keys])
        return Evidence([*keys], self.base[rows], self.policy[rows])


@dataclass(frozen=True)
class Contrast:
    """How one run differs from another on the same prompts and noise, with paired intervals over prompts."""

    win_rate: Interval  # difference of the win rates over the base
    gain: Interval  # difference of the mean scores
    direct: Interval  # share of images that beat those of the other run, ties half


def evidence_of(evaluation: Evaluation, scorer: str) -> Evidence:
    """What a scorer says in an evaluation whose scores were read; prompt by prompt where medians are compared."""
    scored = evaluation.scored
    sides = [side[scorer].double() for side in (scored.base, scored.policy)]
    if evaluation.medians:
        prompts, seeds = list(dict.fromkeys(scored.prompts)), None
        sides = [median_of_prompt(side, scored.prompts) for side in sides]
    else:
        prompts, seeds = scored.prompts, scored.seeds
    keys: list[Key] = []
    times: dict[tuple[str, int], int] = {}
    for prompt, seed in zip(prompts, seeds or [0] * len(prompts), strict=True):
        times[prompt, seed] = times.get((prompt, seed), -1) + 1
        keys.append((prompt, seed, times[prompt, seed]))
    return Evidence(keys, *(side[:, None] for side in sides))


def together(several: Sequence[Evidence]) -> Evidence:
    """The evidence of several runs, which are of the same prompts and seeds, as one."""
    first, *others = several
    alike = [first, *(other.ordered_as(first.keys) for other in others)]
    return Evidence(first.keys, *(torch.cat([getattr(one, side) for one in alike], 1) for side in ("base", "policy")))


def contrast(one: Evidence, other: Evidence) -> Contrast:
    """Compare two runs, or two groups of runs, whose evidence is of the same prompts and seeds."""
    one = one.ordered_as(other.keys)
    bootstrap = bootstrap_of(other.prompts)
    return Contrast(
        bootstrap.mean(one.looks.mean(1) - other.looks.mean(1)),
        bootstrap.mean(one.gains.mean(1) - other.gains.mean(1)),
        bootstrap.share(_looks(one.policy[:, :, None], other.policy[:, None, :]).flatten(1)),
    )


@lru_cache(maxsize=4)
def bootstrap_of(prompts: tuple[str, ...]) -> Bootstrap:
    """The resamples of these prompts, one for each row."""
    return Bootstrap(prompts)


def why_not(one: Evaluation, other: Evaluation, scorer: str) -> str | None:
    """Why the first evaluation cannot be compared with the second by a scorer, in words; None: it can."""
    for evaluation, whose in ((one, "its"), (other, "the other's")):
        if evaluation.scored is None:
            return f"{whose} scores of single images cannot be read"
        if scorer not in evaluation.scored.base:
            return f"{whose} images have no scores by {scorer}"
    if one.medians != other.medians:
        return "one compares medians of a prompt's images, the other image by image"
    mine, theirs = evidence_of(one, scorer), evidence_of(other, scorer)
    if (reason := _other_images(mine, theirs)) is not None:
        return reason
    if (reason := _other_scorer(one, other, scorer)) is not None:
        return reason
    apart = [name for name in SAMPLING if (pair := _settings(one, other, name)) and pair[0] != pair[1]]
    if apart:
        said = (f"{name} {' instead of '.join(_settings(one, other, name))}" for name in apart)
        return f"its images were made otherwise: {', '.join(said)}"
    difference = mine.ordered_as(theirs.keys).base - theirs.base
    if not bool(difference.any()):
        return None
    if one.baseline and other.baseline and one.baseline != other.baseline:
        return "it was compared with another baseline"
    rms, spread = difference.square().mean().sqrt().item(), theirs.base.std(correction=0).item()
    if rms > ROUNDING * spread:
        dtypes = _settings(one, other, "dtype")
        how = f" ({' instead of '.join(dtypes)})" if dtypes and dtypes[0] != dtypes[1] else ""
        return (
            f"the scores of its baseline differ on the same prompts and seeds (by {rms:.3g} root mean square; over the"
            f" images they vary by {spread:.3g}): another baseline, other noise or other precision{how}"
        )
    return None


def _looks(one: Tensor, other: Tensor) -> Tensor:
    return (one > other).double() + 0.5 * (one == other).double()


def _other_images(mine: Evidence, theirs: Evidence) -> str | None:
    """In which prompts and seeds two evaluations differ, in words."""
    if set(mine.keys) == set(theirs.keys):
        return None
    prompts, others = set(mine.prompts), set(theirs.prompts)
    if prompts != others:
        shared = len(prompts & others)
        return f"other prompts: {shared} of its {len(prompts)} are among the {counted(len(others), 'prompt')}"
    shared = len(set(mine.keys) & set(theirs.keys))
    return f"other seeds: {shared} of its {counted(len(mine.keys), 'image')} have the prompt and seed of one of the" + (
        f" {len(theirs.keys)}"
    )


def _other_scorer(one: Evaluation, other: Evaluation, scorer: str) -> str | None:
    """In which facts the scorers of two evaluations differ, in words; a fact that only one knows does not count."""
    mine, theirs = one.provenance.get(scorer, {}), other.provenance.get(scorer, {})
    apart = [name for name in mine if name in theirs and mine[name] != theirs[name] and name != "dpo_fast"]
    return f"another {scorer}: its {', '.join(map(str, apart))} differ" if apart else None


def _settings(one: Evaluation, other: Evaluation, name: str) -> tuple[str, str] | None:
    """A setting of both; None where neither is known, or how the images of one were made is not."""
    mine, theirs = (of.settings.get(name.capitalize()) for of in (one, other))
    if not (one.settings and other.settings) or mine is theirs is None:
        return None
    return mine or "none", theirs or "none"
