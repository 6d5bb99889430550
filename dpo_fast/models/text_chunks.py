"""Captions of more than 75 tokens: encoded in chunks of 75, as kohya's sd-scripts does with its --max_token_length.

A CLIP text encoder has 77 positions: a start token, 75 tokens of the caption, an end token. For longer captions, 150 or
225 tokens of each are kept, padded and cut into chunks of 75. Each chunk gets a start and an end and is encoded on its
own. Of the hidden states these are kept, in this order: the start of the first chunk, the 75 tokens of each chunk, and
the last position of the last chunk.

The rule is that of sd-scripts' `_get_input_ids` (library/strategy_base.py), `SdTextEncodingStrategy.encode_tokens`
(library/strategy_sd.py) and `_get_hidden_states_sdxl` (library/strategy_sdxl.py). What `encode_tokens` means to do with
the empty chunks of Stable Diffusion 2.x, to copy a padding's state over that of the end token, never happens there: it
compares a token's number with its text. Nor is it done here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_fast.config import TOKEN_LENGTHS
from dpo_fast.errors import BadInput

CHUNK = TOKEN_LENGTHS[0]
POSITIONS = CHUNK + 2  # of a text encoder


def positions_of(max_token_length: int, text_encoder: Mapping[str, Any]) -> int:
    """Return how many positions a caption's hidden states have; text_encoder: its configuration."""
    if max_token_length == CHUNK:
        return text_encoder.get("max_position_embeddings", POSITIONS)
    return max_token_length + 2


def check_chunks(max_token_length: int, text_encoders: Iterable[Mapping[str, Any]], model: str) -> None:
    """Raise BadInput if text encoders of these configurations, of `model`, cannot encode that many tokens."""
    if max_token_length == CHUNK:
        return
    for config in text_encoders:
        positions = config.get("max_position_embeddings", POSITIONS)
        if positions != POSITIONS:
            raise BadInput(
                f"--max_token_length ({max_token_length}) needs text encoders of {POSITIONS} positions, as SD1.x, SD2.x"
                f" and SDXL have them; one of {model} has {positions}: leave it out"
            )


def chunk_ids(
    tokenizer: Any,
    prompts: Sequence[str],
    max_token_length: int,  # tokens of a prompt that are kept, a multiple of 75
) -> Tensor:
    """Return the tokens of N prompts in n chunks, int64 [N,n,77] on the CPU.

    The last token of a chunk is that of the whole padded sequence: the end token, or padding. Where padding is not the
    end token (SD2.x, SDXL's second tokenizer), a chunk with 75 tokens of the caption still ends with the end token, and
    a chunk that begins with padding has the end token there.
    """
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=max_token_length + 2, return_tensors="pt"
    ).input_ids
    body = ids[:, 1:-1].unflatten(1, (-1, CHUNK))
    start, last = (ids[:, side, None, None].expand(*body.shape[:2], 1) for side in (0, -1))
    chunks = torch.cat((start, body, last), 2)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if padding != end:
        before_last, first = chunks[..., -2], chunks[..., 1]
        chunks[..., -1].masked_fill_((before_last != end) & (before_last != padding), end)
        first.masked_fill_(first == padding, end)
    return chunks


def joined(states: Tensor) -> Tensor:
    """Join the hidden states [N,n,77,D] of n chunks to [N,75n+2,D]."""
    return torch.cat((states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]), 1)
