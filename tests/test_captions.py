"""Captions: any script, wrapped by its width on the sheet; never an empty box for a character without a glyph."""

import numpy as np
import pytest
from PIL import Image

from dpo_fast import captions, fonts
from dpo_fast.captions import LINE, MORE, _clusters, _in_order, _pieces, _width, _wrapped, caption
from dpo_fast.fonts import own
from tests.test_fonts import SCRIPTS, having


@pytest.fixture
def no_fonts(monkeypatch):
    """As on a machine without a font that has more than ASCII."""
    monkeypatch.setattr(captions, "faces_for", lambda text: [own()])
    monkeypatch.setattr(fonts, "_logged", set())


def lines(text: str, width: int = 160, most: int = 3, direction: str = "ltr") -> list[str]:
    return ["".join(piece.text for piece in line) for line in _wrapped(_pieces(text), width, most, direction)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_captions_in_any_script_have_no_empty_boxes(script, caplog):
    having(SCRIPTS[script])
    drawn = caption(SCRIPTS[script], 300, 1)
    boxes = Image.new("RGB", drawn.size, "white")
    own().draw(boxes, (0, captions.BASELINE), fonts.NO_CHARACTER * len(SCRIPTS[script]), "black", "ltr")
    assert np.asarray(drawn).min() < 128 and drawn != boxes
    pieces = _pieces(SCRIPTS[script])
    assert all(piece.face.has(piece.text) for piece in pieces) and not caplog.records
    assert len({piece.face for piece in pieces if not piece.is_space}) == 1  # of one font


def test_a_character_that_no_font_has_is_shown_by_its_code_point(no_fonts, caplog):
    assert lines("a 中文 fox", 400) == ["a [U+4E2D][U+6587] fox"]
    assert lines("cafe\u0301 3", 400) == ["caf[U+0065 U+0301] 3"]  # a letter stays with its marks
    assert ["U+4E2D" in record.message for record in caplog.records] == [True, False]
    assert "fonts-noto-cjk" in caplog.records[0].message and "fonts-noto-core" in caplog.records[1].message
    assert _width(_pieces("[U+4E2D]"), "ltr") == _width(_pieces("中"), "ltr")


def test_lines_end_at_spaces_and_words_that_are_too_long_anywhere():
    assert lines("a red fox in the white snow", 100) == ["a red fox in the", "white snow"]
    broken = lines("W" * 30, 100, 9)
    assert "".join(broken) == "W" * 30 and len({len(line) for line in broken[:-1]}) == 1
    for line in _wrapped(_pieces("a fox " + "W" * 30), 100, 9, "ltr"):
        assert _width(line, "ltr") <= 100
    assert caption("  a\n\tfox ", 100, 1) == caption("a fox", 100, 1)
    assert lines("", 100) == [""]


def test_a_long_caption_ends_in_dots():
    shown = lines("word " * 200)
    assert len(shown) == 3 and shown[-1].endswith("word" + MORE) and all(line.startswith("word") for line in shown)
    assert _width(_wrapped(_pieces("W" * 500), 160, 3, "ltr")[-1], "ltr") <= 160
    assert lines("W" * 500)[-1].endswith("W" + MORE)
    assert not any(MORE in line for line in lines("a few words"))


def test_chinese_and_japanese_are_broken_between_characters_but_not_before_a_full_stop():
    having(SCRIPTS["Japanese"])
    text = "雪の中の赤いキツネ、青い空。" * 3
    shown = lines(text, 150, 9)
    assert "".join(shown) == text and len(shown) > 2
    assert not any(line[0] in "、。" for line in shown)
    widths = [_width(_pieces(line), "ltr") for line in shown]
    assert all(width <= 150 for width in widths) and all(width > 150 - 2 * 14 for width in widths[:-1])


def test_korean_is_broken_at_spaces():
    having(SCRIPTS["Korean"])
    assert lines("붉은여우가 눈밭에", 100) == ["붉은여우가", "눈밭에"]


def test_what_a_reader_takes_for_one_sign_stays_together():
    assert _clusters("e\u0301x") == ["e\u0301", "x"]
    assert _clusters("👩\u200d🚀👍🏽❤\ufe0f🇯🇵🇰🇷") == ["👩\u200d🚀", "👍🏽", "❤\ufe0f", "🇯🇵", "🇰🇷"]
    assert _clusters("क्ष") == ["क्", "ष"] and _clusters("") == []


def test_emoji_are_drawn_in_colour_and_spaces_beside_them_are_narrow():
    having("🦊")
    drawn = np.asarray(caption("a 🦊 b", 160, 1)).astype(int)
    assert np.ptp(drawn, 2).max() > 100
    assert np.ptp(np.asarray(caption("a b", 160, 1)).astype(int), 2).max() == 0
    assert _width(_pieces("a 🦊 b"), "ltr") < _width(_pieces("a b"), "ltr") + 2 * 14


def test_a_text_from_right_to_left_is_aligned_at_the_right():
    having(SCRIPTS["Arabic"])
    columns = np.where((np.asarray(caption(SCRIPTS["Arabic"] + " 3D", 300, 1)) < 128).any((0, 2)))[0]
    assert columns.min() > 150 and columns.max() >= 296
    columns = np.where((np.asarray(caption("3D fox " + SCRIPTS["Arabic"], 300, 1)) < 128).any((0, 2)))[0]
    assert columns.min() < 4


def test_runs_stand_in_the_order_of_their_direction():
    of = [("face", run) for run in ("שלום", "abc", "def", " 3", "עולם")]
    assert [run for _, run in _in_order(of, "rtl")] == ["עולם", " 3", "abc", "def", "שלום"]
    assert [run for _, run in _in_order([of[1], of[0], of[4], of[2]], "ltr")] == ["abc", "עולם", "שלום", "def"]


def test_control_characters_are_shown_as_escapes():
    assert caption("a\x1bb\u202ec", 300, 1) == caption("a\\x1bb\\u202ec", 300, 1)
    assert caption("a\x1b[31mb", 100, 1) == caption("ab", 100, 1)


def test_a_panel_has_its_lines():
    panel = caption("word " * 50, 100, 4, fill="gray")
    assert panel.size == (100, 4 * LINE) and panel.mode == "RGB"
    dark = (np.asarray(panel) < 200).any((1, 2))
    assert all(dark[k * LINE : (k + 1) * LINE].any() for k in range(4)) and np.asarray(panel).min() >= 128
