"""Turn folders into comparisons: which images belong together, of which prompts, seeds and models.

A *set* is what one group of comparisons is made of: its models, each with the images of its prompts. An evaluation and
a folder of dpo_fast.generate with several models are sets of their own. Any other folder of images is one model, named
after the folder: it joins every set there is, or they make one set together.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast import output_folder
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.findings import RECORD
from dpo_fast.evaluation.generation import LISTING
from dpo_fast.evaluation.image_names import PromptImage, composed, image_files, images_of, name_as_prompt
from dpo_fast.evaluation.pairing import UNCATEGORISED, pair_up
from dpo_fast.evaluation.prompts import Prompt
from dpo_fast.evaluation.protocol import PROTOCOL, groups_of
from dpo_fast.evaluation.reopened import IMAGES, OF_RUN
from dpo_fast.evaluation.scored import SCORES, read_scores
from dpo_fast.files import is_inside
from dpo_fast.votes.store import Comparison
from dpo_fast.voting.prompt_texts import prompt_image

Images = dict[str, list[PromptImage]]  # prompt -> its images


@dataclass
class ImageSet:
    """Models that are compared with each other."""

    name: str
    folder: str
    models: dict[str, Images]  # the base first, where it is known
    prompts: list[Prompt]
    seeds: dict[str, Sequence[int]] | None = None  # of each prompt, for the models of `own`; None: all images
    own: frozenset[str] | None = None  # models that are in the set by its folder; None: all
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Compared:
    """The comparisons of all folders."""

    comparisons: list[Comparison]
    folders: dict[str, str]  # group -> its folder
    remarks: list[str]


def read_folders(folders: Sequence[Path], *, against: str | None = None, most: int | None = None) -> Compared:
    """Return the comparisons of the folders; `most` of them, evenly spread, if it is given.

    Raises BadInput for folders that hold nothing to compare, and if no set has the model `against`.
    """
    sets: list[ImageSet] = []
    plain: list[Path] = []
    singles: list[ImageSet] = []
    for folder in _distinct(folders):
        found = _sets_in(folder)
        if not found:
            plain.append(folder)
        for one in found:
            (sets if len(one.models) > 1 else singles).append(one)
    if plain or singles:
        sets = _joined(sets, singles, plain)
    _name_apart(sets)
    if against is not None and not any(against in one.models for one in sets):
        names = ", ".join(dict.fromkeys(name for one in sets for name in one.models))
        raise BadInput(f"--against {against} is none of the models: {names}")
    comparisons = [one for images in sets for one in _comparisons(images, against)]
    if not comparisons:
        raise BadInput("there is nothing to compare: name an evaluation, or images of the same prompts by two models")
    if most is not None and most < len(comparisons):
        comparisons = [comparisons[k * len(comparisons) // most] for k in range(most)]
    remarks = [remark for one in sets for remark in one.remarks]
    used = {one.group for one in comparisons}
    return Compared(comparisons, {one.name: one.folder for one in sets if one.name in used}, remarks)


def is_own_set(folder: Path) -> bool:
    """Whether a folder is an evaluation, an evaluated run, a protocol, or a set of dpo_fast.generate."""
    return any((folder / name).is_file() for name in (RECORD, f"{OF_RUN}/{RECORD}", PROTOCOL, LISTING))


def _sets_in(folder: Path) -> list[ImageSet]:
    """The sets that a folder holds; none if it is a plain folder of images."""
    if (folder / RECORD).is_file():
        return [_evaluation(folder, folder / SCORES, folder.resolve().name, folder)]
    if (folder / OF_RUN / RECORD).is_file():
        return [_evaluation(folder / OF_RUN, folder / SCORES, folder.resolve().name, folder)]
    if (folder / PROTOCOL).is_file():
        return [_evaluation(of.folder, of.folder / SCORES, of.name, of.folder) for of in groups_of(folder)]
    if (folder / LISTING).is_file():
        return [_generation(folder)]
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and is_own_set(path)]
    return [one for path in inner for one in _sets_in(path)]


def _evaluation(home: Path, scores: Path, name: str, folder: Path) -> ImageSet:
    record = output_folder.read_record(home, RECORD)
    sides = [record.get(title) if isinstance(record, dict) else None for title in ("baseline", "policy")]
    if not all(isinstance(side, dict) and isinstance(side.get("name"), str) for side in sides):
        raise BadInput(f"{folder} compares no images (it was evaluated on pairs): name an evaluation of images")
    listing = _listing(home / IMAGES) if (home / IMAGES / LISTING).is_file() else None
    prompts, seeds = _prompts_of(scores, listing, folder)
    models = {}
    for side in sides:
        if listing is not None and side["name"] in {row["model"] for row in listing}:
            models[side["name"]] = _images_of(listing, home / IMAGES, side["name"])
            continue
        images = Path(str(side.get("of")))
        if not images.is_dir():
            raise BadInput(f"{folder}: the images of {side['name']} are not in {images} any more; put them back")
        models[side["name"]] = images_of(images, [prompt.text for prompt in prompts]).images
    return ImageSet(name, str(folder), models, prompts, None if record.get("seeds") == "all" else seeds)


def _generation(folder: Path) -> ImageSet:
    rows = _listing(folder)
    prompts, seeds = _prompts_of(None, rows, folder)
    models = {name: _images_of(rows, folder, name) for name in dict.fromkeys(row["model"] for row in rows)}
    return ImageSet(folder.resolve().name, str(folder), models, prompts, seeds)


def _listing(home: Path) -> list[dict[str, Any]]:
    """The rows of images.json, checked. Raises BadInput."""
    rows = (output_folder.read_record(home, LISTING, ["images", "complete"]) or {}).get("images")
    texts = {"model": str, "prompt": str, "file": str, "seed": int}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in texts.items()) for row in rows
    ):
        raise BadInput(f"{home / LISTING} lists no images: put it back from a copy")
    if outside := next((row["file"] for row in rows if not is_inside(row["file"])), None):
        raise BadInput(f"{home / LISTING} names {outside!r:.100}, which is not in its folder: put it back from a copy")
    return [row for row in rows if (home / row["file"]).is_file()]


def _images_of(rows: Sequence[Mapping[str, Any]], home: Path, model: str) -> Images:
    images: dict[str, dict[int, PromptImage]] = {}
    for row in rows:
        if row["model"] == model:
            images.setdefault(row["prompt"], {})[row["seed"]] = PromptImage(home / row["file"], row["seed"])
    return {prompt: [*of.values()] for prompt, of in images.items()}


def _prompts_of(
    scores: Path | None, rows: Sequence[Mapping[str, Any]] | None, folder: Path
) -> tuple[list[Prompt], dict[str, list[int]]]:
    """The prompts of a set and their seeds: those that were scored, else those of the listing."""
    found: dict[str, Prompt] = {}
    seeds: dict[str, dict[int, None]] = {}
    if scores is not None and scores.is_file():
        scored = read_scores(scores, unscored=True)
        categories = scored.categories or [""] * len(scored.prompts)
        triples = zip(scored.prompts, categories, scored.seeds, strict=True)
    elif rows:
        triples = ((row["prompt"], row.get("category"), row["seed"]) for row in rows)
    else:
        raise BadInput(f"{folder} has neither {SCORES} nor images of its own: let the evaluation finish")
    for text, category, seed in triples:
        label = category if isinstance(category, str) and category != UNCATEGORISED else None
        found.setdefault(text, Prompt(text, folder.name, label or None))
        seeds.setdefault(text, {})[seed] = None
    return list(found.values()), {text: list(of) for text, of in seeds.items()}


# ---- plain folders -----------------------------------------------------------------------------------------------


def _joined(sets: list[ImageSet], singles: list[ImageSet], plain: list[Path]) -> list[ImageSet]:
    """The sets with the single models and the plain folders among their models, or one set of these alone."""
    known = {prompt.text: prompt for one in (*sets, *singles) for prompt in one.prompts}
    read = _Plain(plain, known)
    models: dict[str, Images] = {}
    for one in singles:
        (name,) = one.models
        models[_free(name, models, one.name)] = one.models[name]
    for folder in plain:
        name = folder.resolve().name
        models[_free(name, models, f"{folder.resolve().parent.name}/{name}")] = read.images[folder]
    if sets:
        for one in sets:
            one.own = frozenset(one.models)
            for name, images in models.items():
                one.models[_free(name, one.models, f"{name} (images)")] = images
        return sets
    prompts = known | {text: Prompt(text, "images") for text in read.prompts if text not in known}
    folders = [one.folder for one in singles] + [str(folder) for folder in plain]
    return [ImageSet("images", ", ".join(folders), models, list(prompts.values()), None)]


class _Plain:
    """The images of plain folders, by prompt."""

    def __init__(self, folders: Sequence[Path], known: Mapping[str, Prompt]) -> None:
        self.images: dict[Path, Images] = {}
        written = {folder: {file: prompt_image(file) for file in image_files(folder)} for folder in folders}
        for folder, of in written.items():
            if not of:
                raise BadInput(f"{folder} holds neither an evaluation nor an image: name a folder that does")
        texts = dict.fromkeys(known)
        for of in written.values():
            texts |= dict.fromkeys(prompt for prompt, _ in filter(None, of.values()))
        by_text = {composed(text): text for text in texts}
        for folder, of in written.items():
            images: Images = {}
            named = images_of(folder, list(texts)).images
            prompt_of = {image.file: (prompt, image) for prompt, some in named.items() for image in some}
            for file, found in of.items():
                if found is not None:
                    prompt, seed = found
                    prompt, image = by_text[composed(prompt)], PromptImage(file, seed)
                elif file in prompt_of:
                    prompt, image = prompt_of[file]
                else:
                    prompt, image = name_as_prompt(file, folder), PromptImage(file)
                    prompt = by_text.setdefault(composed(prompt), prompt)
                    texts.setdefault(prompt)
                images.setdefault(prompt, []).append(image)
            self.images[folder] = images
        self.prompts = list(texts)


def _distinct(folders: Sequence[Path]) -> list[Path]:
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise BadInput(f"{folder} is named twice: name it once")
        seen[folder.resolve()] = folder
    return list(seen.values())


def _free(name: str, taken: Mapping[str, object], other: str) -> str:
    """`name`, or `other` if that is taken, or a number behind it."""
    candidates = itertools.chain([name, other], (f"{other} {number}" for number in itertools.count(2)))
    return next(one for one in candidates if one not in taken)


def _name_apart(sets: Sequence[ImageSet]) -> None:
    taken: dict[str, None] = {}
    for one in sets:
        parent = Path(one.folder).resolve().parent.name
        one.name = _free(one.name, taken, f"{parent}/{one.name}")
        taken[one.name] = None


def _comparisons(images: ImageSet, against: str | None) -> list[Comparison]:
    """Every two models of a set, or those with `against`, prompt by prompt."""
    names = list(images.models)
    pairs = [two for two in itertools.combinations(names, 2) if against is None or against in two]
    found: list[Comparison] = []
    for first, second in pairs:
        sides = images.models[first], images.models[second]
        if not sides[0].keys() & sides[1].keys():
            if len(pairs) > 1:
                images.remarks.append(f"{first} and {second} have no prompt in common and are not compared")
                continue
        own = images.own is None or {first, second} <= images.own
        paired = pair_up(images.prompts, images.seeds if own else None, *sides, (first, second))
        images.remarks += [remark for remark in paired.remarks if remark not in images.remarks]
        categories = paired.categories or [None] * len(paired.prompts)
        for k, prompt in enumerate(paired.prompts):
            category = None if categories[k] == UNCATEGORISED else categories[k]
            files = paired.base.paths[k], paired.policy.paths[k]
            found.append(Comparison(images.name, prompt, category, paired.seeds[k], (first, second), files))
    return list({(one.group, one.prompt, one.files): one for one in found}.values())
