"""Captions of pictures: any text in any script, wrapped into a few lines of a given width."""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from PIL import Image

from dpo_fast.errors import printable
from dpo_fast.fonts import FONT_SIZE, Face, faces_for, is_emoji, log_missing, own

LINE = FONT_SIZE + 4  # pixels from one baseline to the next
BASELINE = FONT_SIZE - 1  # of the first line, below the top
MORE = " ..."
LONGEST = 2000  # characters that are looked at


class _Piece(NamedTuple):
    """What stays together: a letter with its marks, an emoji with its parts, an escaped character."""

    text: str
    face: Face
    breaks: bool  # a line may begin with it, though no space is before it

    @property
    def is_space(self) -> bool:
        return self.text.isspace()


def caption(text: str, width: int, lines: int, fill: str = "black") -> Image.Image:
    """Draw a text on white, RGB, `width` pixels wide and `lines` lines high. What finds no room ends in dots.

    A text that begins in a script from right to left is aligned at the right. A character that no font has is drawn as
    its code point, such as [U+4E2D], and logged.
    """
    panel = Image.new("RGB", (width, lines * LINE), "white")
    text = " ".join(printable(text, keep="\t\n").split())[:LONGEST]
    direction = next((d for d in map(_direction, text) if d), "ltr")
    for number, line in enumerate(_wrapped(_pieces(text), width, lines, direction)):
        x = width - _width(line, direction) if direction == "rtl" else 0.0
        for face, run in _in_order(_runs(line), direction):
            face.draw(panel, (x, BASELINE + number * LINE), run, fill, direction)
            x += face.width(run, direction)
    return panel


def _pieces(text: str) -> list[_Piece]:
    """Choose the fonts: one for the whole text if one has it all (but for emoji), else for each word, else letter."""
    faces = faces_for(text)
    letters = "".join(cluster for cluster in _clusters(text) if not _is_picture(cluster))
    whole = _first(faces, letters)
    pieces: list[_Piece] = []
    missing = ""
    for word in text.split(" "):
        if pieces:
            letter = next((piece.face for piece in reversed(pieces) if not _is_picture(piece.text)), own())
            pieces.append(_Piece(" ", whole or letter, False))
        in_word = whole or _first(faces, word)
        before = ""
        for cluster in _clusters(word):
            breaks = bool(before) and _may_break(before, cluster)
            in_colour = reversed(faces) if _is_picture(cluster) else faces
            face = in_word if in_word and not _is_picture(cluster) else _first(in_colour, cluster)
            if face is None:
                missing += cluster
                escaped = " ".join(f"U+{ord(character):04X}" for character in cluster)
                pieces.append(_Piece(f"[{escaped}]", own(), bool(before)))
            else:
                pieces.append(_Piece(cluster, face, breaks))
            before = cluster
    log_missing("".join(c for c in dict.fromkeys(missing) if not any(face.has(c) for face in faces)))
    return pieces


def _first(faces: Iterator[Face] | Sequence[Face], text: str) -> Face | None:
    return next((face for face in faces if face.has(text)), None)


def _clusters(text: str) -> list[str]:
    """Split a text between characters that a reader takes for separate: marks, joiners and parts of emoji stay."""
    clusters: list[str] = []
    for character in text:
        before = clusters[-1] if clusters else ""
        joins = (
            unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
            or "\U0001f3fb" <= character <= "\U0001f3ff"  # colours of skin
            or before.endswith("\u200d")
            or (len(before) == 1 and _is_regional(before) and _is_regional(character))  # two of them are a flag
        )
        if before and joins:
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _is_regional(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_picture(cluster: str) -> bool:
    return is_emoji(cluster[0]) or "\ufe0f" in cluster


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two clusters of a word: beside East Asian letters and emoji, not before a mark of
    punctuation and not after an opening one. Korean breaks at spaces."""
    if unicodedata.category(after[0]) in ("Pe", "Pf", "Po") or unicodedata.category(before[0]) in ("Ps", "Pi"):
        return False
    return any(
        unicodedata.east_asian_width(one[0]) in "WF" and not unicodedata.name(one[0], "").startswith("HANGUL")
        for one in (before, after)
    )


def _wrapped(pieces: list[_Piece], width: int, most: int, direction: str) -> list[list[_Piece]]:
    """Break into at most `most` lines. A word that is longer than a line is broken anywhere."""
    lines: list[list[_Piece]] = [[]]
    for word in _words(pieces):
        if lines[-1] and _width([*lines[-1], *word], direction) > width:
            lines.append([])
        if not lines[-1] and word[0].is_space:
            word = word[1:]
        for piece in word:
            if lines[-1] and _width([*lines[-1], piece], direction) > width and not piece.is_space:
                lines.append([])
            lines[-1].append(piece)
        if len(lines) > most:
            break
    if len(lines) > most:
        last = lines[most - 1]
        dots = [_Piece(MORE, own(), False)]
        while last and (last[-1].is_space or _width([*last, *dots], direction) > width):
            last.pop()
        lines = [*lines[: most - 1], last + dots]
    return lines


def _words(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """What may not be broken, each with the space before it."""
    word: list[_Piece] = []
    for piece in pieces:
        if word and (piece.is_space or piece.breaks) and not (len(word) == 1 and word[0].is_space):
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _width(line: Sequence[_Piece], direction: str) -> float:
    return sum(face.width(run, direction) for face, run in _runs(line))


def _runs(line: Sequence[_Piece]) -> list[tuple[Face, str]]:
    """The pieces of one font after another, joined."""
    return [(face, "".join(p.text for p in run)) for face, run in groupby(line, key=lambda piece: piece.face)]


def _in_order(runs: list[tuple[Face, str]], direction: str) -> list[tuple[Face, str]]:
    """Order the runs from left to right as they stand: those against the direction of the text keep theirs."""
    if direction == "rtl":
        runs = runs[::-1]
    ordered: list[tuple[Face, str]] = []
    for against, group in groupby(runs, key=lambda run: _of_run(run[1]) not in ("", direction)):
        group = list(group)
        ordered += group[::-1] if against else group
    return ordered


def _of_run(run: str) -> str:
    return next((d for d in map(_direction, run) if d), "")


def _direction(character: str) -> str:
    """ltr, rtl, or nothing for a character that has none of its own."""
    return {"L": "ltr", "R": "rtl", "AL": "rtl"}.get(unicodedata.bidirectional(character), "")
