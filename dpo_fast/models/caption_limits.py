"""How many tokens of a caption are encoded, and which captions have more."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dpo_fast.models.text_chunks import CHUNK
from dpo_fast.models.tokenizers import same_tokens

MANY_PROMPTS = 100_000  # counting their tokens takes some ten seconds, so a progress bar is shown
A_CALL = 4096  # prompts


class Limit(NamedTuple):
    """A tokenizer, and how many tokens of a caption its text encoder is given, without the start and the end."""

    tokenizer: Any
    tokens: int

    @classmethod
    def of(cls, tokenizer: Any, positions: int | None, max_token_length: int) -> "Limit":
        """positions: those of the text encoder; None: not known."""
        if max_token_length != CHUNK:
            return cls(tokenizer, max_token_length)
        return cls(tokenizer, min(tokenizer.model_max_length, positions or tokenizer.model_max_length) - 2)


def cut_off(limits: Sequence[Limit], prompts: Sequence[str]) -> tuple[list[bool], int]:
    """Return whether each prompt has more tokens than a limit (the rest are dropped), and the lowest limit."""
    different: list[Limit] = []
    for one in limits:
        if not any(one.tokens == other.tokens and same_tokens(one.tokenizer, other.tokenizer) for other in different):
            different.append(one)
    cut = [False] * len(prompts)
    total = len(prompts) * len(different)
    with tqdm(total=total, desc="Counting tokens", unit=" captions", disable=len(prompts) < MANY_PROMPTS) as bar:
        for tokenizer, takes in different:
            for first in range(0, len(prompts), A_CALL):
                some = list(prompts[first : first + A_CALL])
                for place, ids in enumerate(tokenizer(some, verbose=False)["input_ids"], start=first):
                    cut[place] |= len(ids) - 2 > takes
                bar.update(len(some))
    return cut, min((one.tokens for one in different), default=0)
