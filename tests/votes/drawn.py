"""Votes for tests: one at a time, and drawn at random."""

import numpy as np

from dpo_fast.votes.records import Vote


def vote(
    comparison: int,
    voter: str,
    outcome: float,
    prompt: str | None = None,
    models: tuple[str, str] = ("base", "policy"),
    question: str = "general",
    category: str | None = None,
    group: str = "run",
    first_left: bool = True,
    seconds: float = 3.0,
) -> Vote:
    """A vote; each comparison is of a prompt of its own unless one is given."""
    prompt = f"prompt {comparison}" if prompt is None else prompt
    return Vote(group, question, comparison, prompt, category, 0, models, outcome, voter, first_left, seconds, 0.0)


def drawn(
    models: int, prompts: int, voters: int, votes: int, generator: np.random.Generator, seeds: int = 1
) -> list[Vote]:
    """Votes on all pairs of models on each prompt, by drawn voters: a model is better the higher its number."""
    rows, comparison = [], 0
    taste = generator.normal(size=(voters, models)) * 0.5
    for prompt in range(prompts):
        quality = np.arange(models) * 0.4 + generator.normal(size=models) * 0.5
        for _ in range(seeds):
            for first in range(models):
                for second in range(first + 1, models):
                    for voter in generator.permutation(voters)[:votes]:
                        gap = quality[first] - quality[second] + taste[voter, first] - taste[voter, second]
                        gap += generator.normal()
                        outcome = 1.0 if gap > 0.4 else 0.0 if gap < -0.4 else 0.5
                        names = (f"model {first}", f"model {second}")
                        rows.append(vote(comparison, f"voter {voter}", outcome, f"prompt {prompt}", names))
                    comparison += 1
    return rows
