"""What people voted on the images of an evaluation, beside what its scorers say. Who voted what is not shown."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from dpo_fast.evaluation.scored import Scored
from dpo_fast.statistics import Bootstrap, Interval
from dpo_fast.votes.records import Vote
from dpo_fast.votes.tally import majority_of, summary_of

LEADS = "general"  # the question that decides, where it was asked; else the first
ENOUGH = 20  # prompts with all their votes, from which on people decide
VOTERS = 2  # at least, or the interval says nothing of other people
ENOUGH_RULE = f"people decide once {ENOUGH} prompts have all the votes that were asked for, by {VOTERS} voters or more"


class Opinion(NamedTuple):
    """People's answer to one question about two models."""

    question: str
    win_rate: Interval  # of the policy, by majority, ties half
    by_votes: Interval  # the share of all votes, ties half
    comparisons: int  # with at least one vote
    undecided: int  # of these, with fewer votes than asked for
    votes: int
    prompts: int  # with all votes that were asked for, on every comparison
    voters: int
    note: str | None  # what the intervals do not say

    @property
    def interval(self) -> Interval:
        return self.win_rate

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0.5."""
        return not self.win_rate.low <= 0.5 <= self.win_rate.high


class Agreement(NamedTuple):
    """How often a scorer prefers the image that most people prefer; ties of either are left aside."""

    share: Interval | None  # with its interval over prompts; None: both decide on no pair
    pairs: int  # that both decide on
    tied: int  # by people or by the scorer


@dataclass(frozen=True)
class People:
    """Votes on the pairs of an evaluation, without those of excluded voters."""

    votes: Sequence[Vote]  # the baseline's image first
    row_of: Mapping[int, int]  # comparison -> row of the pairs
    questions: Mapping[str, str]  # all that were asked, id -> text
    wanted: int  # votes of a comparison and question
    asked: Mapping[int, str]  # comparison -> its prompt, of all that voters are shown or have voted on

    @property
    def voters(self) -> int:
        return len({vote.voter for vote in self.votes})

    @property
    def notes(self) -> list[str]:
        """What the intervals do not say, one line for each question of which that is so."""
        return [f"people on {name}: {of.note}" for name, of in self.opinions.items() if of.note]

    @property
    def leading(self) -> str:
        """The question that decides."""
        return LEADS if LEADS in self.questions else next(iter(self.questions))

    def of(self, prompts: Collection[str]) -> "People":
        """The votes on some of the prompts alone."""
        return replace(
            self,
            votes=[vote for vote in self.votes if vote.prompt in prompts],
            asked={comparison: prompt for comparison, prompt in self.asked.items() if prompt in prompts},
        )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`tally.summary_of` these votes, without the voters."""
        settings = {"questions": self.questions, "votes": self.wanted, "comparisons": len(self.asked)}
        found = summary_of(self.votes, [], settings)
        del found["by_voter"]
        return found

    @cached_property
    def opinions(self) -> dict[str, Opinion]:
        """Question -> what people answered; only questions with votes."""
        return {name: self._opinion(name) for name in self.questions if self.summary["questions"][name]["pairs"]}

    def _opinion(self, question: str) -> Opinion:
        (pair,) = self.summary["questions"][question]["pairs"]
        number = Counter(vote.comparison for vote in self.votes if vote.question == question)
        lacking = {prompt for comparison, prompt in self.asked.items() if number[comparison] < self.wanted}
        return Opinion(
            question,
            Interval(pair["win_rate"], *pair["ci95"]),
            Interval(pair["by_votes"], *pair["by_votes_ci95"]),
            pair["comparisons"],
            pair["undecided"],
            pair["votes"],
            len({*self.asked.values()} - lacking),
            len({vote.voter for vote in self.votes if vote.question == question}),
            pair["note"],
        )

    @property
    def verdict(self) -> Opinion | None:
        """The answer that decides the evaluation; None: too few prompts have all their votes, or one person voted."""
        found = self.opinions.get(self.leading)
        enough = found is not None and found.prompts >= ENOUGH and found.voters >= VOTERS
        return found if enough else None

    def agreement(self, scored: Scored, scorer: str, question: str) -> Agreement:
        """How far a scorer and the majority of people prefer the same images. scored: of the pairs of `row_of`."""
        gain = scored.gain(scorer)
        majority = majority_of(vote for vote in self.votes if vote.question == question)
        rows = {self.row_of[comparison]: outcome for comparison, outcome in majority.items()}
        both = [row for row, outcome in rows.items() if outcome != 0.5 and gain[row] != 0]
        if not both:
            return Agreement(None, 0, len(rows))
        same = torch.tensor([(rows[row] == 0) == bool(gain[row] > 0) for row in both], dtype=torch.float64)
        share = Bootstrap([scored.prompts[row] for row in both]).share(same)
        return Agreement(share, len(both), len(rows) - len(both))
