"""Compare tokenizers by everything that determines a text's tokens."""

import hashlib
import json
from typing import Any


def tokenizer_digest(tokenizer) -> str:
    """Hash all that determines a text's tokens: rules, merges, vocabulary, special tokens, lengths, sides."""
    parts = [
        _rules(tokenizer),
        _special(tokenizer),
        tokenizer.model_max_length,
        tokenizer.pad_token_id,
        tokenizer.padding_side,
        tokenizer.truncation_side,
        getattr(tokenizer, "split_special_tokens", False),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def same_tokens(one, other) -> bool:
    """Whether two tokenizers turn every text into the same tokens, before padding and truncation. SDXL's two differ in
    how they pad, but may otherwise be the same."""

    def parts(tokenizer) -> list[Any]:
        special = [named for named in _special(tokenizer) if named[0] != "pad_token"]
        return [_rules(tokenizer), special, getattr(tokenizer, "split_special_tokens", False)]

    return parts(one) == parts(other)


def _rules(tokenizer) -> Any:
    """Return a tokenizer's cleaning, vocabulary, merges and added tokens."""
    whole = getattr(tokenizer, "backend_tokenizer", None)
    if whole is not None:
        rules = json.loads(whole.to_str())
        for passing in ("version", "truncation", "padding"):  # the last two are set anew by every call
            rules.pop(passing, None)
        return rules
    # implemented in Python: CLIP's before transformers 5, which cleans texts with ftfy if that is installed
    ranks = sorted(tokenizer.bpe_ranks.items(), key=lambda rank: rank[1])
    return [sorted(tokenizer.get_vocab().items()), ranks, getattr(tokenizer, "fix_text", None) is not None]


def _special(tokenizer) -> list[list[str]]:
    return [[name, str(token)] for name, token in sorted(tokenizer.special_tokens_map.items())]
