"""Prompts as CLIP's authors clean them, with ftfy and without, and what is said without."""

import html
import importlib.util
import re

import pytest

from dpo_fast.scorers import cleaning, facts, provenance
from dpo_fast.scorers.cleaning import cleaned, may_differ

INSTALLED = importlib.util.find_spec("ftfy") is not None
PROMPTS = [  # text, cleaned by their code, whether ftfy is needed for that
    ("A Dog, in the RAIN!", "a dog, in the rain!", False),
    ("It\u2019s \u201cquoted\u201d  \n\t spaced ", 'it\'s "quoted" spaced', False),
    ("a &amp;amp; b &lt;c&gt; caf\u00e9", "a & b <c> caf\u00e9", False),
    ("\uff21 \uff0c \uff11\uff12\u3000full width", "a , 12 full width", True),
    ("\ufb01sh \ufb02ower", "fish flower", True),
    ("caf\u00c3\u00a9 of a broken encoding", "caf\u00e9 of a broken encoding", True),
    ("cafe\u0301 decomposed", "caf\u00e9 decomposed", True),
    ("bell\x07 and \x1b[31mred\x1b[0m", "bell and red", True),
]


@pytest.fixture
def without_ftfy(monkeypatch):
    monkeypatch.setattr(cleaning, "_ftfy", lambda: None)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(cleaning, "_say", cleaning.cache(lines.append))
    return lines


@pytest.mark.skipif(not INSTALLED, reason="ftfy is not installed")
@pytest.mark.parametrize(("prompt", "expected", "_"), PROMPTS)
def test_with_ftfy_prompts_are_cleaned_as_by_the_authors(prompt, expected, _):
    import ftfy

    basic = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()  # basic_clean, then whitespace_clean, lower
    assert cleaned(prompt) == re.sub(r"\s+", " ", basic).strip().lower() == expected


@pytest.mark.parametrize(("prompt", "expected", "needed"), PROMPTS)
def test_without_ftfy_quotes_and_entities_are_done(without_ftfy, prompt, expected, needed):
    assert (cleaned(prompt) != expected) == needed
    assert may_differ(prompt) or not needed


def test_without_ftfy_it_is_said_once(without_ftfy, said):
    cleaning.check([prompt for prompt, _, needed in PROMPTS if not needed][:2])
    assert said == []
    for _ in range(2):  # clip and hpsv2 both ask
        cleaning.check([prompt for prompt, *_ in PROMPTS])
    (line,) = said
    assert "6 of 8 prompts" in line and "pip install ftfy" in line and "\n" not in line


def test_kept_scores_and_results_tell_whether_ftfy_was_used(monkeypatch):
    with_it = facts("clip")["text"] if INSTALLED else None
    assert with_it is None or re.fullmatch(r"ftfy \d+\.\d+.*", with_it)
    monkeypatch.setattr(cleaning, "_ftfy", lambda: None)
    for name in ("clip", "hpsv2", "hpsv2.1"):
        assert facts(name)["text"] == provenance(name)["text"] == "without ftfy" != with_it
    assert "text" not in facts("pickscore") and "text" not in facts("appeal")


@pytest.mark.skipif(not INSTALLED, reason="ftfy is not installed")
def test_with_ftfy_nothing_is_said(said):
    cleaning.check([prompt for prompt, *_ in PROMPTS])
    assert said == []
