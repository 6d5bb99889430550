"""Clean prompts as OpenAI's CLIP and open_clip do before tokenization: ftfy, HTML entities, lower case.

    https://github.com/openai/CLIP, clip/simple_tokenizer.py; open_clip's tokenizer.py and HPSv2's copy do the same

transformers' tokenizers leave out the first two. ftfy straightens curly quotes, narrows full-width letters, and fixes
ligatures, broken encodings and control characters. It is an optional package (pip install 'dpo_fast[eval]'); without
it, quotes and entities are still handled here, but the rest is not.
"""

import html
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from types import ModuleType

from dpo_fast.cli import say


def cleaned(prompt: str) -> str:
    """Return the text that the authors' code would tokenize: exactly with ftfy, nearly without it."""
    ftfy = _ftfy()
    text = html.unescape(html.unescape(ftfy.fix_text(prompt) if ftfy else prompt))
    if not ftfy:
        text = re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", text))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def check(prompts: Sequence[str]) -> None:
    """Print a line, once, if ftfy is missing and could change some of these prompts. No prompt is refused."""
    if _ftfy() is None and (others := [prompt for prompt in prompts if may_differ(prompt)]):
        _say(
            f"ftfy is not installed: the scorers clip and hpsv2 may read {len(others)} of {len(prompts)} prompts"
            f" otherwise than their authors' code, the first {others[0][:60]!r}; pip install ftfy"
        )


def may_differ(prompt: str) -> bool:
    """Whether ftfy could change the prompt: without it, the cleaned text still holds more than ASCII, or entities."""
    left = cleaned(prompt)
    return not (left.isascii() and left.isprintable()) or html.unescape(left) != left


def more_facts() -> dict[str, str]:
    """Return what kept scores depend on besides files and dtype: the version of ftfy, if any."""
    return {"text": f"ftfy {version('ftfy')}" if _ftfy() else "without ftfy"}


@cache
def _ftfy() -> ModuleType | None:
    try:
        import ftfy
    except ImportError:
        return None
    return ftfy


_say = cache(say)  # printed once, however many scorers check
