"""Turn prompts into file names, and find the prompt that each image of a folder belongs to.

The same letters may be composed (NFC, as most people type them) or decomposed (NFD, as macOS disks and archives store
them): texts are compared in composed form. The compatibility form NFKC is avoided, since it turns "x\u00b2" into "x2".
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
LEAST_CUT = 40  # characters: a name at least this long may be only the start of a prompt, as many tools cut names
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff")


class PromptImage(NamedTuple):
    """An image of a prompt."""

    file: Path
    seed: int | None = None  # seed of its initial noise; None: not known


class Found(NamedTuple):
    """The images that a folder holds of some prompts."""

    images: dict[str, list[PromptImage]]  # prompt -> its images, in order of their numbers; only prompts that have any
    unused: int  # images that belong to none of the prompts


def composed(text: str) -> str:
    """Return the text in Unicode form NFC."""
    return unicodedata.normalize("NFC", text)


def plain(text: str) -> str:
    """Return the letters and digits (any script), composed, in lower case, with one dash for anything between them."""
    return re.sub(r"[\W_]+", "-", composed(text).lower()).strip("-")


def file_stem(prompt: str) -> str:
    """Return the start of a prompt's file name: its words in a-z and 0-9, plus a digest if they are not all of it.

    The text is not normalised first: composed and decomposed, a prompt has two names, and `images_of` knows both.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:LONGEST_NAME].strip("-")
    if words.replace("-", " ") == prompt:
        return words
    return f"{words or 'prompt'}-{hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest()}"


def image_files(folder: Path) -> list[Path]:
    """Return all image files in a folder and its subfolders, by name, without hidden ones."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_FILES and _is_shown(file, folder))


def images_of(folder: Path, prompts: Sequence[str]) -> Found:
    """Find the images of each prompt in a folder.

    An image belongs to the prompt in its PNG text `prompt`; else, if its name is only a number, to the prompt that its
    folder is named after (`a red fox/0002.png`); else to the prompt that it is named after, with or without a number at
    the end (`a red fox-2.png`, `A red fox (2).jpg`). Only letters and digits are compared; a name of LEAST_CUT
    characters or more may be only the start of the prompt. The seed is known for images that dpo_fast.generate wrote.
    Among prompts that differ only in how their letters are composed, an image belongs to the one that equals its text,
    else to the composed one or the first. Raises BadInput if a name fits several prompts.
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


def name_as_prompt(file: Path, folder: Path) -> str:
    """Return the prompt that a file's name stands for: its words without a number at the end, or its folder's."""
    stem, _ = _without_number(file.stem)
    if not plain(stem):
        stem = file.parent.name if file.parent != folder else file.stem
    words = re.sub(r"[_\-]+", " ", stem) if " " not in stem else stem
    return " ".join(words.split()) or file.stem


def prompt_of(file: Path, folder: Path) -> str:
    """Return the prompt that an image in `folder` states: its PNG text `prompt`, else what its name stands for."""
    return _texts_in(file).get("prompt", "").strip() or name_as_prompt(file, folder)


def _is_shown(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _without_number(stem: str) -> tuple[str, int]:
    """Split `a fox-2`, `a fox (2)`, `a fox_#2` or `2` into the part before the number, and the number (0: none)."""
    match = re.fullmatch(r"(.*?)[\s_\-#(\[]*(\d{1,18})[)\]]?", stem)
    return (match[1].rstrip(" _-#(["), int(match[2])) if match else (stem, 0)


def _texts_in(file: Path) -> dict[str, str]:
    """The texts of a PNG, which other tools may have filled with anything; empty for other files."""
    if file.suffix.lower() != ".png":
        return {}
    try:
        with open(file, "rb") as opened:
            return texts_of(opened)
    except Exception:  # a broken file raises nearly anything; reading its pixels reports what is wrong
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
