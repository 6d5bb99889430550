"""How often the intervals of people's votes hold the truth, by simulated voters.

    python benchmarks/vote_intervals.py --json benchmarks/results/vote-intervals.json
    python benchmarks/vote_intervals.py --part methods     other ways to an interval, for comparison
    python benchmarks/vote_intervals.py --part strengths   Davidson's strengths of three models

A vote is for the second model where a normal variable exceeds a threshold, for the first where it lies below the
opposite one, and a tie between. The variable is the sum of a constant, an effect of the prompt, the voter's taste and
the chance of a single vote, whose standard deviation is 1. The constant is set so that the true rate, that of all
prompts and voters, is the one wanted; it is computed by quadrature. A comparison has five votes, or those of all voters
if there are fewer. Seed 0; a few minutes on one core for each part.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.tables import table
from dpo_fast.files import atomic_file
from dpo_fast.statistics import Interval, students_t
from dpo_fast.votes.intervals import between, rates, won
from dpo_fast.votes.ranking import Table, fit, strengths

PROMPTS = (10, 20, 50, 200)
VOTERS = (3, 5, 10, 20)
RATES = (0.5, 0.7, 0.9)
VOTES = 5  # of a comparison, at most
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
STRENGTHS = (-0.6, 0.0, 0.9)  # constants of three models
RESAMPLES = 200  # of the crossed bootstrap of majorities


class World(NamedTuple):
    """How votes come about."""

    name: str
    prompt: float  # standard deviation of the prompts' effects
    taste: float  # of the voters' tastes
    tie: float  # threshold
    busy: bool = False  # whether the k-th voter votes in proportion to 1 / k, rather than all alike


WORLDS = (
    World("all voters and prompts alike", 0.0, 0.0, 0.0),
    World("moderate effects, ties", 0.5, 0.5, 0.3),
    World("moderate effects, ties, a few voters vote most", 0.5, 0.5, 0.3, busy=True),
    World("prompts differ much", 1.0, 0.3, 0.0),
    World("tastes differ as much as single votes, ties", 0.3, 1.0, 0.3),
)


class Held(NamedTuple):
    """How often intervals held the truth, and how wide they were on average."""

    share: float
    width: float


def normal(x: np.ndarray) -> np.ndarray:
    """The distribution function of the standard normal."""
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def majority(win: np.ndarray, tie: np.ndarray, votes: int) -> np.ndarray:
    """How often the majority of independent votes is for the second model, equal counts half."""
    total = np.zeros_like(win)
    for wins in range(votes + 1):
        for losses in range(votes + 1 - wins):
            ties = votes - wins - losses
            ways = math.factorial(votes) // (math.factorial(wins) * math.factorial(losses) * math.factorial(ties))
            chance = ways * win**wins * (1 - win - tie) ** losses * tie**ties
            total += chance * (1.0 if wins > losses else 0.5 if wins == losses else 0.0)
    return total


def truth(constant: float, world: World, votes: int) -> tuple[float, float]:
    """The rates by majority and by votes of all prompts and voters."""
    at = constant + world.prompt * NODES
    scale = math.sqrt(1 + world.taste**2)
    win, loss = 1 - normal((world.tie - at) / scale), normal((-world.tie - at) / scale)
    tie = np.maximum(1 - win - loss, 0.0)
    return float(majority(win, tie, votes) @ WEIGHTS), float((win + tie / 2) @ WEIGHTS)


@cache
def constant_for(rate: float, of: int, world: World, votes: int) -> float:
    """The constant that makes the rate (0: by majority, 1: by votes) the one wanted."""
    low, high = -1.0, 15.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if truth(middle, world, votes)[of] < rate else (low, middle)
    return low


def draw(
    constant: float, world: World, prompts: int, voters: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One data set: what each vote says of the second model, its prompt, its voter, [N] each."""
    votes = min(VOTES, voters)
    order = generator.gumbel(size=(prompts, voters))
    if world.busy:
        order += np.log(1 / np.arange(1, voters + 1))
    voter = np.argsort(-order, 1)[:, :votes].ravel()
    prompt = np.repeat(np.arange(prompts), votes)
    at = constant + generator.standard_normal(prompts * votes)
    at += (
        world.prompt * generator.standard_normal(prompts)[prompt]
        + world.taste * generator.standard_normal(voters)[voter]
    )
    return 0.5 * (at > world.tie) + 0.5 * (at > -world.tie), prompt, np.unique(voter, return_inverse=True)[1]


def held(intervals: Sequence[Interval], true: float) -> Held:
    """Summarise the intervals of many data sets."""
    inside = [of.low <= true <= of.high for of in intervals]
    return Held(float(np.mean(inside)), float(np.mean([of.high - of.low for of in intervals])))


# ---- rates ---------------------------------------------------------------------------------------------------------


def both_rates(world: World, rate: float, prompts: int, voters: int, sets: int, generator: np.random.Generator) -> dict:
    """The coverage of both rates in one world."""
    row = {"world": world.name, "rate": rate, "prompts": prompts, "voters": voters}
    for of, name in enumerate(("majority", "votes")):
        constant = constant_for(rate, of, world, min(VOTES, voters))
        drawn = (draw(constant, world, prompts, voters, generator) for _ in range(sets))
        row[name] = held([rates(second, prompt, prompt, voter)[of] for second, prompt, voter in drawn], rate)._asdict()
    return row


def rates_part(sets: int, generator: np.random.Generator, progress: "Progress") -> list[dict]:
    rows = []
    for world in WORLDS:
        for rate in RATES:
            for prompts in PROMPTS:
                for voters in VOTERS:
                    rows.append(both_rates(world, rate, prompts, voters, sets, generator))
                    progress.step(len(WORLDS) * len(RATES) * len(PROMPTS) * len(VOTERS))
    return rows


def rates_table(rows: Sequence[dict]) -> str:
    """A table for each world: coverage by majority / by votes."""
    blocks = []
    for world in dict.fromkeys(row["world"] for row in rows):
        of = {(r["rate"], r["prompts"], r["voters"]): r for r in rows if r["world"] == world}
        lines = [
            [str(rate), str(prompts), *(_pair(of[rate, prompts, voters]) for voters in VOTERS)]
            for rate in RATES
            for prompts in PROMPTS
        ]
        head = ("true rate", "prompts", *(f"{voters} voters" for voters in VOTERS))
        blocks.append(f"{world[0].upper()}{world[1:]}:\n\n{table(head, lines)}")
    return "\n\n".join(blocks)


def _pair(row: dict) -> str:
    return f"{row['majority']['share']:.3f} / {row['votes']['share']:.3f}"


# ---- methods -------------------------------------------------------------------------------------------------------

METHODS = ("here", "crossed bootstrap", "prompts only", "votes as if independent")


def other_intervals(second: np.ndarray, prompt: np.ndarray, voter: np.ndarray, of: int, seed: int) -> list[Interval]:
    """The intervals of one data set by METHODS but the first."""
    looks, group = second, prompt
    if of == 0:
        looks = won(np.bincount(prompt, 2 * second - 1))
        group = np.arange(len(looks))
    alone = float(looks.var(ddof=1)) / len(looks)
    if of == 0:
        crossed = _crossed_majority(second, prompt, voter, seed)
    else:  # of infinitely many resamples
        away = (second - second.mean()) / len(second)
        crossed = sum(float(np.square(np.bincount(by, away)).sum()) for by in (prompt, voter)) + float(
            np.square(away).sum()
        )
    return [_wilson(looks, v, len(set(prompt)) - 1) for v in (crossed, between(looks, group).variance, alone)]


def _crossed_majority(second: np.ndarray, prompt: np.ndarray, voter: np.ndarray, seed: int) -> float:
    """The variance of the rate by majority over resampled prompts and voters, whose weights multiply (Owen 2007)."""
    generator = np.random.default_rng(seed)
    prompts, voters = prompt.max() + 1, voter.max() + 1
    of_prompt = generator.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
    of_voter = generator.multinomial(voters, np.full(voters, 1 / voters), RESAMPLES)
    for_second, present = np.zeros((voters, prompts)), np.zeros((voters, prompts))
    for_second[voter, prompt], present[voter, prompt] = 2 * second - 1, 1.0
    weight = of_prompt * (of_voter @ present > 0)
    return float(((weight * won(of_voter @ for_second)).sum(1) / weight.sum(1)).var(ddof=1))


def _wilson(looks: np.ndarray, variance: float, freedom: float) -> Interval:
    share = float(looks.mean())
    spread = share * (1 - share)
    odds = students_t(freedom) ** 2 * (variance / spread if min(variance, spread) > 0 else 1 / len(looks))
    middle = (share + odds / 2) / (1 + odds)
    half = math.sqrt(odds * spread + odds**2 / 4) / (1 + odds)
    return Interval(share, middle - half, middle + half)


def methods_part(sets: int, generator: np.random.Generator, progress: "Progress") -> list[dict]:
    rows, rate = [], 0.7
    for world in WORLDS[:2]:
        for prompts in (20, 200):
            for voters in VOTERS[1:]:
                for of, name in enumerate(("majority", "votes")):
                    constant = constant_for(rate, of, world, min(VOTES, voters))
                    found = []
                    for seed in range(sets):
                        second, prompt, voter = draw(constant, world, prompts, voters, generator)
                        ours = rates(second, prompt, prompt, voter)[of]
                        found.append([ours, *other_intervals(second, prompt, voter, of, seed)])
                    row = {"world": world.name, "rate": name, "prompts": prompts, "voters": voters}
                    for method, of_method in zip(METHODS, zip(*found, strict=True), strict=True):
                        row[method] = held(of_method, rate)._asdict()
                    rows.append(row)
                    progress.step(2 * 2 * 3 * 2)
    return rows


def methods_table(rows: Sequence[dict]) -> str:
    head = ("world", "rate by", "prompts", "voters", *METHODS)
    lines = [
        [r["world"], r["rate"], str(r["prompts"]), str(r["voters"])]
        + [f"{r[method]['share']:.3f} ({r[method]['width']:.2f})" for method in METHODS]
        for r in rows
    ]
    return "Coverage (mean width), true rate 0.7:\n\n" + table(head, lines)


# ---- strengths -----------------------------------------------------------------------------------------------------


def chances_of(world: World) -> np.ndarray:
    """How often voters prefer the first, call a tie, prefer the second model of each pair: fp64 [3, 3]."""
    scale = math.sqrt(1 + 2 * world.prompt**2 + 2 * world.taste**2)
    pairs = [(0, 1), (0, 2), (1, 2)]
    gaps = np.array([STRENGTHS[first] - STRENGTHS[second] for first, second in pairs])
    win, loss = 1 - normal((world.tie - gaps) / scale), normal((-world.tie - gaps) / scale)
    return np.stack([win, 1 - win - loss, loss], 1)


def draw_table(world: World, prompts: int, voters: int, generator: np.random.Generator) -> Table:
    """Votes on all three pairs of three models, by drawn voters. Effects of prompts and tastes are of each model."""
    first, second = np.array([0, 0, 1]), np.array([1, 2, 2])
    votes = min(VOTES, voters)
    pair = np.tile(np.repeat(np.arange(3), votes), prompts)
    prompt = np.repeat(np.arange(prompts), 3 * votes)
    voter = np.argsort(generator.random((prompts * 3, voters)), 1)[:, :votes].ravel()
    of_prompt = world.prompt * generator.standard_normal((prompts, 3)) + np.array(STRENGTHS)
    taste = world.taste * generator.standard_normal((voters, 3))
    quality = [of_prompt[prompt, of[pair]] + taste[voter, of[pair]] for of in (first, second)]
    at = quality[0] - quality[1] + generator.standard_normal(len(pair))
    answer = 1 - (at > world.tie).astype(np.int64) + (at < -world.tie)
    return Table(["a", "b", "c"], first, second, pair, answer, prompt, np.unique(voter, return_inverse=True)[1])


def strengths_part(sets: int, generator: np.random.Generator, progress: "Progress") -> list[dict]:
    rows, worlds = [], [world for world in WORLDS if not world.busy and world.tie > 0]
    for world in worlds:
        true = fit(chances_of(world), np.array([0, 0, 1]), np.array([1, 2, 2])).strengths
        for prompts in PROMPTS:
            for voters in VOTERS:
                found = [strengths(draw_table(world, prompts, voters, generator)) for _ in range(sets)]
                of_model = [held(of, value) for of, value in zip(zip(*found, strict=True), true, strict=True)]
                rows.append(
                    {
                        "world": world.name,
                        "prompts": prompts,
                        "voters": voters,
                        "share": float(np.mean([of.share for of in of_model])),
                        "width": float(np.mean([of.width for of in of_model])),
                    }
                )
                progress.step(len(worlds) * len(PROMPTS) * len(VOTERS))
    return rows


def strengths_table(rows: Sequence[dict]) -> str:
    blocks = []
    for world in dict.fromkeys(row["world"] for row in rows):
        of = {(r["prompts"], r["voters"]): r for r in rows if r["world"] == world}
        lines = [[str(p), *(f"{of[p, v]['share']:.3f} ({of[p, v]['width']:.2f})" for v in VOTERS)] for p in PROMPTS]
        head = ("prompts", *(f"{voters} voters" for voters in VOTERS))
        blocks.append(f"{world[0].upper()}{world[1:]}, coverage (mean width):\n\n{table(head, lines)}")
    return "\n\n".join(blocks)


# ---- the command ---------------------------------------------------------------------------------------------------


class Progress:
    """A line on stderr, at most one a second."""

    def __init__(self, part: str) -> None:
        self.part, self.done, self.start, self.last = part, 0, time.monotonic(), 0.0

    def step(self, total: int) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last > 1 or self.done == total:
            self.last = now
            end = "\n" if self.done == total else ""
            print(
                f"\r{self.part}: {self.done} of {total}, {now - self.start:.0f} s", end=end, file=sys.stderr, flush=True
            )


PARTS = {
    "rates": (rates_part, rates_table, 1000),
    "methods": (methods_part, methods_table, 1000),
    "strengths": (strengths_part, strengths_table, 200),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--sets", type=int, help="simulated data sets of each kind; default: 1000, 200 of strengths")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if options.sets is not None and options.sets < 1:
        parser.error(f"--sets must be at least 1, not {options.sets}")
    results = {}
    for part in PARTS if options.part == "all" else [options.part]:
        run, shown, sets = PARTS[part]
        sets = options.sets or sets
        rows = run(sets, np.random.default_rng(0), Progress(part))
        results[part] = {"sets": sets, "rows": rows}
        print(f"{part}, {sets} data sets of each kind\n\n{shown(rows)}\n", flush=True)
    if options.json:
        with atomic_file(options.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
