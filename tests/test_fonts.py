"""Which font draws a text: Pillow's own, an installed one, or none, which is then said."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from dpo_fast import fonts
from dpo_fast.fonts import Face, faces_for, is_emoji, log_missing, own

SCRIPTS = {
    "Chinese": "一只红色的狐狸",
    "Japanese": "雪の中の赤いキツネ",
    "Korean": "눈 속의 붉은 여우",
    "Arabic": "ثعلب أحمر",
    "Devanagari": "लाल लोमड़ी क्ष",
    "Cyrillic": "рыжая лиса",
    "accents": "très café",
    "emoji": "🦊",
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Each test looks for fonts anew, and logs anew."""
    monkeypatch.setattr(fonts, "_logged", set())
    fonts._installed.cache_clear()
    yield
    fonts._installed.cache_clear()


@pytest.fixture
def no_fontconfig(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("fc-match")

    monkeypatch.setattr(subprocess, "run", missing)


@pytest.fixture
def no_fonts(monkeypatch, no_fontconfig):
    monkeypatch.setattr(fonts, "_files", lambda preferred: [])


def having(text: str) -> Face:
    """An installed font that has all of a text; the test is skipped where there is none."""
    face = next((face for face in faces_for(text) if face.has(text)), None)
    if face is None:
        pytest.skip(f"no installed font has {text}")
    return face


def ink(face: Face, text: str, direction: str = "ltr") -> Image.Image:
    sheet = Image.new("RGB", (400, 60), "white")
    face.draw(sheet, (10, 35), text, "black", direction)
    return sheet


def test_pillows_own_font_is_enough_for_plain_english(monkeypatch):
    monkeypatch.setattr(fonts, "_by_fontconfig", None)  # not asked
    assert faces_for("a red fox, 3D (small)") == [own()]
    assert own().has("a red fox") and not own().has("é") and not own().has("雪")
    assert own().has(" \u200d\ufe0f")  # nothing to draw


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_installed_font_is_found(script, request):
    text = SCRIPTS[script]
    face = having(text)
    first, *others = faces_for(text)
    assert first is own() and face in others
    assert ink(face, text).getbbox() and ink(face, text) != ink(face, fonts.NO_CHARACTER * len(text))
    assert 20 < face.width(text, "ltr") + 10 * (script == "emoji") < 200


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_folders_are_searched_where_there_is_no_fontconfig(script, no_fontconfig):
    face = having(SCRIPTS[script])
    assert Path(face.font.path).suffix.lower() in (".ttf", ".otf", ".ttc", ".otc")


@pytest.mark.skipif(not shutil.which("fc-match"), reason="fontconfig is not installed")
def test_fontconfig_that_never_answers_is_given_up(monkeypatch):
    def never(*_, timeout: float, **__):
        raise subprocess.TimeoutExpired("fc-match", timeout)

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(fonts, "_files", lambda preferred: [])
    assert faces_for("é") == [own()]


def test_a_file_that_is_no_font_is_left_out(no_fontconfig, monkeypatch, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "OTHER_FOLDERS", (str(tmp_path), str(tmp_path / "missing")))
    monkeypatch.setattr(fonts, "FOLDERS", {})
    assert faces_for("é") == [own()]


def test_fonts_of_the_wanted_language_and_upright_ones_come_first(monkeypatch, tmp_path):
    names = ["zz.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Bold.ttc", "NotoSansCJK-Regular.ttc", "PingFang.ttc"]
    names += ["an italic.otf", "LastResort.otf", "readme.txt"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(fonts, "OTHER_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(fonts, "FOLDERS", {})
    files = fonts._files(fonts.PREFERRED["zh-cn"] + fonts.PREFERRED[""])
    assert [file.name for file in files] == [
        *("PingFang.ttc", "NotoSansCJK-Regular.ttc", "NotoSansCJK-Bold.ttc", "NotoSans-Regular.ttf"),
        *("zz.ttf", "an italic.otf"),
    ]


def test_han_characters_have_the_forms_of_the_language():
    chinese, japanese = having("直接"), having("直の")
    if Path(chinese.font.path).suffix.lower() != ".ttc":
        pytest.skip("no installed font has the forms of several languages")
    assert ink(chinese, "直") != ink(japanese, "直")


def test_joined_letters_differ_from_lone_ones():
    face, word = having("بببب"), "بببب"
    if face.font.layout_engine != ImageFont.Layout.RAQM:
        pytest.skip("this Pillow has no Raqm")
    apart = sum(face.width(letter, "rtl") for letter in word)
    assert face.width(word, "rtl") < 0.9 * apart


def test_without_raqm_what_is_lost_is_said_once(caplog):
    face = having("שלום ب")
    plain = Face(face.font.font_variant(layout_engine=ImageFont.Layout.BASIC))
    assert ink(plain, "של", "rtl") == ink(plain, "לש")  # from right to left all the same
    assert not caplog.records
    for _ in range(2):
        assert ink(plain, "ب ", "rtl").getbbox()
    (record,) = caplog.records
    assert "libfribidi0" in record.message


def test_what_no_font_has_is_logged_once_with_its_package(no_fonts, caplog):
    assert faces_for("一只红🦊é") == [own()]
    for _ in range(2):
        log_missing("一只🦊é\ue000")
    lines = [record.message for record in caplog.records]
    assert len(lines) == 4 and all(record.levelno == logging.WARNING for record in caplog.records)
    assert "U+4E00 (CJK UNIFIED IDEOGRAPH-4E00)" in lines[0] and lines[0].endswith("the package fonts-noto-cjk")
    assert lines[1].endswith("fonts-noto-color-emoji") and lines[2].endswith("fonts-noto-core")
    assert "U+E000" in lines[3] and "package" not in lines[3]


def test_which_characters_are_pictures():
    assert all(map(is_emoji, "🦊🇯\ufe0f")) and not any(map(is_emoji, "a雪☃é"))
