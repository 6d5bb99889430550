"""Prompts as names of files, and back: which image of a folder is of which prompt.

The same letters may be composed (NFC, as most people type them) or decomposed (NFD, as a Mac's disk and its archives
have them): texts are compared in composed form. Not in a compatibility form (NFKC), in which "x\u00b2" is "x2".
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_fast.data.images import texts_of
from dpo_fast.errors import BadInput

LONGEST_NAME = 80  # characters of a prompt in a file's name
LEAST_CUT = 40  # characters from which on the start of a prompt may stand for it: many tools cut names
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff")


class PromptImage(NamedTuple):
    """An image of a prompt."""

    file: Path
    seed: int | None = None  # which of the prompt's noises it comes from; None: not known


class Found(NamedTuple):
    """What a folder holds of some prompts."""

    images: dict[str, list[PromptImage]]  # prompt -> its images, by their numbers; prompts without any left out
    unused: int  # images of no prompt


def composed(text: str) -> str:
    """The text in Unicode's form NFC."""
    return unicodedata.normalize("NFC", text)


def plain(text: str) -> str:
    """Letters and digits of any script, composed, in lower case, with one dash for whatever stands between them."""
    return re.sub(r"[\W_]+", "-", composed(text).lower()).strip("-")


def file_stem(prompt: str) -> str:
    """The prompt as the start of a file's name: its words in plain letters, and a digest where these are not all.

    Of the text as it is: composed and decomposed, a prompt has two names, both of which `images_of` knows.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:LONGEST_NAME].strip("-")
    if words.replace("-", " ") == prompt:
        return words
    return f"{words or 'prompt'}-{hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest()}"


def image_files(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, by name."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_FILES and _is_shown(file, folder))


def images_of(folder: Path, prompts: Sequence[str]) -> Found:
    """The images of a folder by their prompts.

    An image is of the prompt that its PNG text `prompt` is; else, where its name is only a number, of the one that its
    folder's name is (`a red fox/0002.png`); else of the one that its name is, or the name without a number at its end
    (`a red fox-2.png`, `A red fox (2).jpg`). Only letters and digits are compared; a name of LEAST_CUT
    characters or more may be only the start of the prompt. What dpo_fast.generate wrote tells its seed. Of prompts that
    differ only in how their letters are composed, an image is of the one that its text is, else of the composed one or
    the first. Raises BadInput where that leaves several prompts.
    """
    texts_of = {prompt: prompt for prompt in prompts}  # a text -> its prompt
    for prompt in prompts:
        texts_of.setdefault(composed(prompt), prompt)
    names: dict[str, list[str]] = {}
    for prompt in dict.fromkeys(texts_of[composed(prompt)] for prompt in prompts):
        decomposed = unicodedata.normalize("NFD", prompt)
        stems = {file_stem(text) for text in (prompt, composed(prompt), decomposed)}
        for name in {plain(text) for text in (prompt, *stems)} - {""}:
            names.setdefault(name, []).append(prompt)
    found: dict[str, list[tuple[int, str, PromptImage]]] = {}
    unused = 0
    for file in image_files(folder):
        bare, number = _without_number(file.stem)
        texts = _texts_in(file)
        text, seed = texts.get("prompt", ""), texts.get("seed") if "noise_seed" in texts else None
        prompt = texts_of.get(text) or texts_of.get(composed(text))
        if prompt is None:
            above = file.parent.name if file.parent != folder else ""
            candidates = [file.stem, bare] if plain(bare) else [above, file.stem]
            prompt = next((p for name in candidates if (p := _prompt_named(name, names, file)) is not None), None)
        if prompt is None:
            unused += 1
        else:
            image = PromptImage(file, int(seed) if seed and seed.isdecimal() else None)
            found.setdefault(prompt, []).append((number, file.name, image))
    there = [prompt for prompt in dict.fromkeys(prompts) if prompt in found]
    return Found({prompt: [image for *_, image in sorted(found[prompt])] for prompt in there}, unused)


def _is_shown(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _without_number(stem: str) -> tuple[str, int]:
    """`a fox-2`, `a fox (2)`, `a fox_#2` or `2` -> what stands before the number, and the number (0: none)."""
    match = re.fullmatch(r"(.*?)[\s_\-#(\[]*(\d{1,18})[)\]]?", stem)
    return (match[1].rstrip(" _-#(["), int(match[2])) if match else (stem, 0)


def _texts_in(file: Path) -> dict[str, str]:
    """The texts of a PNG, which other tools fill with what they like."""
    if file.suffix.lower() != ".png":
        return {}
    try:
        with open(file, "rb") as opened:
            return texts_of(opened)
    except Exception:  # a broken file raises nearly anything; whoever reads its pixels says what is wrong
        return {}


def _prompt_named(name: str, names: dict[str, list[str]], file: Path) -> str | None:
    words = plain(name)
    prompts = names.get(words, [])
    if not prompts and len(words) >= LEAST_CUT:
        prompts = list(dict.fromkeys(p for known, of in names.items() if known.startswith(words) for p in of))
    if len(prompts) > 1:
        raise BadInput(
            f"{file} could be of {prompts[0]!r} or of {prompts[1]!r}: name it {file_stem(prompts[0])} or"
            f" {file_stem(prompts[1])}"
        )
    return prompts[0] if prompts else None
