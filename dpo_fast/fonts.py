"""Which font draws a text: Pillow's own, else installed ones, found through fontconfig or in the system's folders.

Pillow's own font has little more than ASCII. A character that no installed font has is left to the caller, and logged
once with the package to install.
"""

import logging
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

FONT_SIZE = 14  # pixels
BITMAP_SIZES = (109, 160, 136, 128, 96, 64, 32)  # of fonts that hold pictures of one size, as those of emoji do
NO_CHARACTER = "\U0010ffff"  # no font has it: it shows what a font draws for whatever it lacks
ENOUGH = 12  # fonts that are tried for a script, of those that fontconfig lists, the best first
PATIENCE = 30  # seconds for fontconfig, which may have to read every font first
FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/System/Library/Fonts/Supplemental", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"),
}
OTHER_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
# Beginnings of file names, the best first, without spaces; only where there is no fontconfig to ask.
PREFERRED = {
    "zh-cn": ("pingfang", "hiraginosansgb", "stheitilight", "msyh", "notosanscjk", "notosanssc", "simsun"),
    "ja": ("ヒラギノ角ゴシックw3", "hiraginosans", "yugoth", "meiryo", "msgothic", "notosanscjk", "notosansjp"),
    "ko": ("applesdgothicneo", "malgun", "notosanscjk", "notosanskr"),
    "emoji": ("applecoloremoji", "seguiemj", "notocoloremoji"),
    "": ("notosans-", "dejavusans.", "segoeui.", "arialunicode", "arial.", "nirmala.", "leelawui.", "geezapro"),
}
REGIONS = {"zh-cn": ("SC", "GB"), "ja": ("JP",), "ko": ("KR",)}  # at the end of the names of fonts in one file
STYLES = ("bold", "italic", "oblique", "mono", "serif", "light", "thin", "black", "medium", "condensed", "narrow")
UNREADABLE = ("lastresort", "adobeblank")  # their glyphs stand for any character
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")
JOINED = (  # beginnings of the names of characters whose glyphs depend on their neighbours
    *("ARABIC", "SYRIAC", "NKO", "MONGOLIAN", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL"),
    *("TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "TIBETAN", "MYANMAR", "KHMER"),
)
_logged: set[str] = set()  # what was logged by this process


@dataclass(frozen=True, eq=False)
class Face:
    """An opened font."""

    font: ImageFont.FreeTypeFont  # at FONT_SIZE, or at the size of its bitmaps

    @property
    def scale(self) -> float:
        return FONT_SIZE / self.font.size

    def has(self, text: str) -> bool:
        """Whether it has a glyph for every visible character."""
        return all(self._has(character) for character in text if not _unseen(character))

    def width(self, text: str, direction: str) -> float:  # ltr or rtl
        """The width of the text in pixels."""
        return self.font.getlength(*self._laid_out(text, direction)) * self.scale

    def draw(self, sheet: Image.Image, place: tuple[float, float], text: str, fill: str, direction: str) -> None:
        """Draw the text on an RGB sheet. place: the left end of its baseline."""
        text, direction = self._laid_out(text, direction)
        how = dict(fill=fill, font=self.font, anchor="ls", direction=direction, embedded_color=True)
        if self.scale == 1:
            ImageDraw.Draw(sheet).text(place, text, **how)
            return
        ascent, descent = self.font.getmetrics()
        drawn = Image.new("RGBA", (max(1, round(self.font.getlength(text, direction=direction))), ascent + descent))
        ImageDraw.Draw(drawn).text((0, ascent), text, **how)
        drawn = drawn.resize([max(1, round(side * self.scale)) for side in drawn.size], Image.Resampling.LANCZOS)
        sheet.paste(drawn, (round(place[0]), round(place[1] - ascent * self.scale)), drawn)

    def _laid_out(self, text: str, direction: str) -> tuple[str, str | None]:
        """The text and the direction to draw it with. Without Raqm, letters are neither joined nor reordered."""
        if self.font.layout_engine == ImageFont.Layout.RAQM:
            return text, direction
        text = "".join(character for character in text if character == " " or not _unseen(character))
        if any(unicodedata.name(character, "").startswith(JOINED) for character in text):
            _log_once(
                "this Pillow has no Raqm: letters of Arabic, Indic and other scripts that join are drawn apart in"
                " captions; install FriBiDi, on Debian or Ubuntu libfribidi0",
                key="raqm",
            )
        if direction == "rtl":
            backward = any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
            letters = text.rstrip(" ")
            text = text[::-1] if backward else " " * (len(text) - len(letters)) + letters
        return text, None

    @cache  # noqa: B019 (faces are kept for as long as the process lives)
    def _has(self, character: str) -> bool:
        glyph = self._glyph(character)
        return any(glyph) and glyph != self._lacking

    @cached_property
    def _lacking(self) -> bytes:
        return self._glyph(NO_CHARACTER)

    @cached_property
    def _one_by_one(self) -> ImageFont.FreeTypeFont:
        """The same font without shaping, which would add a dotted circle to a lone mark."""
        return self.font.font_variant(layout_engine=ImageFont.Layout.BASIC)

    def _glyph(self, character: str) -> bytes:
        """What is drawn for a character: how opaque each pixel is."""
        side = int(self.font.size)
        picture = Image.new("RGBA", (3 * side, 3 * side))
        ImageDraw.Draw(picture).text((side, side), character, font=self._one_by_one, embedded_color=True)
        return picture.getchannel("A").tobytes()


def faces_for(text: str) -> list[Face]:
    """Pillow's own font, then the installed ones that have what it lacks of a text, as far as there are any."""
    faces = [own()]
    for (script, language), characters in _lacking(text).items():
        fitting = list(_installed(characters, script, language))
        whole = [face for face in fitting if face.has(characters)][:1]
        faces += whole or [face for face in fitting if any(face.has(c) for c in characters)]
    return list(dict.fromkeys(faces))


@lru_cache
def own() -> Face:
    return Face(ImageFont.load_default(FONT_SIZE))


def is_emoji(character: str) -> bool:
    """Whether a character is usually drawn as a coloured picture, or makes one of the character before it."""
    return "\U0001f000" <= character < "\U00020000" or character in "\ufe0f\u200d\u20e3"


def log_missing(characters: str) -> None:
    """Log, once for each package, that no font has these characters, and which package has them."""
    for character in characters:
        script = _script(character)
        package = {"emoji": "fonts-noto-color-emoji", "CJK": "fonts-noto-cjk"}.get(script, "fonts-noto-core")
        remedy = f"; install a font that has them, on Debian or Ubuntu the package {package}"
        if script != "emoji" and unicodedata.category(character) in ("Co", "Cn"):  # private, or not assigned
            package, remedy = "none", ""
        _log_once(
            f"no installed font has U+{ord(character):04X} ({unicodedata.name(character, 'no name')}) of a caption:"
            f" such characters are drawn as their code points{remedy}",
            key=package,
        )


def _log_once(line: str, key: str) -> None:
    if key not in _logged:
        _logged.add(key)
        logger.warning(line)


def _unseen(character: str) -> bool:
    """Whether nothing is drawn for a character: spaces, joiners, variation selectors."""
    return (
        character.isspace()
        or unicodedata.category(character) == "Cf"
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )


def _script(character: str) -> str:
    """The script of a character, by its name; symbols of all kinds are one."""
    if is_emoji(character):
        return "emoji"
    if unicodedata.category(character).startswith("S"):
        return "symbol"
    first = unicodedata.name(character, "unnamed").split()[0]
    return "CJK" if first in EAST_ASIAN else first


def _lacking(text: str) -> dict[tuple[str, str], str]:
    """The characters that Pillow's own font lacks, by script and language."""
    names = {unicodedata.name(character, "").split(" ")[0] for character in text}
    language = "ko" if "HANGUL" in names else "ja" if names & {"HIRAGANA", "KATAKANA"} else "zh-cn"
    found: dict[tuple[str, str], str] = {}
    for character in dict.fromkeys(text):
        if not _unseen(character) and not own().has(character):
            script = "emoji" if f"{character}\ufe0f" in text else _script(character)
            key = script, language if script == "CJK" else ""
            found[key] = found.get(key, "") + character
    return found


@lru_cache(maxsize=256)
def _installed(characters: str, script: str, language: str) -> tuple[Face, ...]:
    """Installed fonts that may have the characters, the best first."""
    listed = _by_fontconfig(characters, script, language)
    if listed is not None:
        return tuple(face for file, index in listed[:ENOUGH] if (face := _open(file, index)) is not None)
    preferred = PREFERRED.get("emoji" if script == "emoji" else language, ()) + PREFERRED[""]
    faces = (face for file in _files(preferred) for face in _in_file(file, REGIONS.get(language, ())))
    fitting: list[Face] = []
    for face in faces:
        if face.has(characters):
            return (face,)
        if any(face.has(character) for character in characters) and len(fitting) < ENOUGH:
            fitting.append(face)
    return tuple(fitting)


def _by_fontconfig(characters: str, script: str, language: str) -> list[tuple[str, int]] | None:
    """Files and the index within them, best first, as fontconfig sorts them; None without fontconfig."""
    codes = " ".join(f"{ord(character):x}" for character in characters)
    family = "emoji" if script == "emoji" else "sans-serif"
    pattern = f"{family}{f':lang={language}' if language else ''}:charset={codes}"
    try:
        ran = subprocess.run(
            ["fc-match", "-s", "--format", r"%{file}\t%{index}\n", pattern],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=True,
        )
        rows = (line.rsplit("\t", 1) for line in ran.stdout.splitlines())
        # the upper half of an index names an instance of a variable font, which `_open` chooses
        return [(file, int(index) & 0xFFFF) for file, index in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


@lru_cache(maxsize=256)
def _open(file: str, index: int) -> Face | None:
    """Open a font; None for a file that Pillow cannot use."""
    for size in (FONT_SIZE, *BITMAP_SIZES):
        try:
            font = ImageFont.truetype(file, size, index=index)
        except OSError as error:
            if "pixel size" not in str(error):
                return None
            continue
        with suppress(OSError, ValueError, NotImplementedError):  # not variable, or has no such instance
            font.set_variation_by_name("Regular")  # by default some are thin
        return Face(font)
    return None


def _in_file(file: Path, regions: Sequence[str]) -> Iterator[Face]:
    """The font in a file; of several the one for a region, else the first."""
    number = 10 if file.suffix.lower() in (".ttc", ".otc") and regions else 1
    faces = [face for index in range(number) if (face := _open(str(file), index)) is not None]
    yield from [face for face in faces if (face.font.getname()[0] or "").endswith(tuple(regions))][:1] or faces[:1]


def _files(preferred: Sequence[str]) -> list[Path]:
    """The font files in the system's folders, those whose names begin as preferred first, upright before others."""

    def rank(file: Path) -> tuple[int, bool, str]:
        name = file.name.lower().replace(" ", "")
        place = next((k for k, beginning in enumerate(preferred) if name.startswith(beginning)), len(preferred))
        return place, any(style in name for style in STYLES), name

    files = []
    for folder in FOLDERS.get(sys.platform, OTHER_FOLDERS):
        for file in Path(os.path.expandvars(folder)).expanduser().rglob("*"):
            if file.suffix.lower() in (".ttf", ".otf", ".ttc", ".otc"):
                files.append(file)
    return sorted((file for file in files if not file.name.lower().startswith(UNREADABLE)), key=rank)
