"""Prompts to generate from: texts, files, and the published sets with their categories.

    partiprompts         the 1,632 PartiPrompts, category and challenge (hub: nateraw/parti-prompts)
    hps                  HPSv2's benchmark, 4 x 800, category = style (hub: zhwang/HPDv2)
    pickapic-validation  the validation prompts of Pick-a-Pic v2 (hub: yuvalkirstain/pickapic_v2): the 500 distinct
                         prompts of the split validation_unique or, in its absence, the distinct captions of the split
                         validation
    shapes               the captions of the built-in shapes world that occur in no pair

NAME=PATH reads a set from your own copy, with the same files as on the hub; pickapic-validation=OWNER/NAME reads
another repository on the hub, such as yuvalkirstain/pickapic_v1 or a copy without images.
"""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_fast.errors import BadInput, one_line
from dpo_fast.evaluation.image_names import composed
from dpo_fast.files import read_json, regular_file, user_path

PICKAPIC = "yuvalkirstain/pickapic_v2"
PICKAPIC_SPLITS = ("validation_unique", "validation")  # the first one present is read
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")

# In a set that does not label prompts about people, these are the prompts with one of these as a full word.
PEOPLE_WORDS = frozenset(
    "adult adults baby babies boy boys bride brother brothers child children couple crowd daughter face family father"
    " fathers friends gentleman gentlemen girl girls grandfather grandmother groom guy guys human humans husband kid"
    " kids king ladies lady man men mother mothers parents people person persons portrait prince princess queen sister"
    " sisters son soldier soldiers teenager teenagers toddler twins wife woman women".split()
)


class Prompt(NamedTuple):
    """One prompt, its source, and how its set labels it."""

    text: str
    source: str  # the set's or the file's name; "text" for one given literally
    category: str | None = None
    challenge: str | None = None


class Where(NamedTuple):
    """Where prompts are read from, and the flag that errors name."""

    cache_dir: str | None = None  # of the hub's downloads
    token: str | None = None
    flag: str = "--prompts"


def read_prompts(
    given: Sequence[str],  # a text of several words, a file, a set, NAME=PATH
    *,
    people: bool = False,
    most: int | None = None,  # keep this many, evenly spread over the list; None: all
    where: Where | None = None,
) -> list[Prompt]:
    """Return the prompts in the order given, those of a set in the set's own order.

    people: keep only prompts about people: those of the category People if a set has it, else those with a word of
    PEOPLE_WORDS. Raises BadInput, in one line, for a set or file that is unknown or unreadable, and if no prompt is
    left.
    """
    if not given:
        raise BadInput(f"no prompt is named: give --prompts a text, a file (one a line), or a set ({', '.join(SETS)})")
    parts = [_read(one, where or Where()) for one in given]
    return narrowed(parts, people=people, most=most)


def narrowed(parts: Sequence[Sequence[Prompt]], *, people: bool, most: int | None) -> list[Prompt]:
    """Return the prompts of all parts that `read_prompts` keeps. Raises BadInput if none is left."""
    found = [prompt for part in parts for prompt in part if not people or _about_people(prompt, part)]
    if not found:
        raise BadInput("--slice people leaves no prompt: none has the category People or a word that names a person")
    if most is not None and most < len(found):
        found = [found[k * len(found) // most] for k in range(most)]
    return found


def is_set(given: str) -> bool:
    """Whether `given` names a published set, or NAME=PATH."""
    return given.partition("=")[0] in SETS


def read_lines(path: Path, flag: str) -> list[str]:
    """Return a text file's non-blank lines. Raises BadInput, naming the flag, if it is unreadable or has none."""
    try:
        lines = [line.strip() for line in regular_file(path, flag).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {path} cannot be read ({error}); name a text file, one prompt a line") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise BadInput(f"{flag} {path} holds no prompt; write one a line")
    return prompts


def _read(given: str, where: Where) -> list[Prompt]:
    name, equals, copy = given.partition("=")
    if name in SETS and (equals or given == name):
        return SETS[name](user_path(copy) if equals else None, where)
    path = user_path(given)
    if _is_file(path):
        if path.suffix == ".tsv":
            return _parti_table(path, path.name, where)
        return [Prompt(line, path.name) for line in read_lines(path, where.flag)]
    if len(given.split()) < 2 or path.suffix in (".txt", ".tsv"):
        raise BadInput(
            f"{where.flag} {given} is no set ({', '.join(SETS)}), no file and no text of several words; a prompt of one"
            " word goes into a file"
        )
    return [Prompt(given.strip(), "text")]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text too long for a file's name
        return False


def _about_people(prompt: Prompt, of_its_set: Sequence[Prompt]) -> bool:
    if any(other.category == "People" for other in of_its_set):
        return prompt.category == "People"
    return not PEOPLE_WORDS.isdisjoint(re.findall(r"[^\W\d_]+", composed(prompt.text).lower()))


# ---- the sets ----------------------------------------------------------------------------------------------------


def _partiprompts(copy: Path | None, where: Where) -> list[Prompt]:
    file = copy or _from_hub("partiprompts", "nateraw/parti-prompts", "PartiPrompts.tsv", where)
    return _parti_table(file, "partiprompts", where, f"partiprompts={file}")


def _parti_table(path: Path, source: str, where: Where, given: str | None = None) -> list[Prompt]:
    """Read the columns Prompt, Category and, if present, Challenge. Quotation marks have no special meaning."""
    try:
        with regular_file(path, where.flag).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{where.flag} {given or path} cannot be read ({error}); name a tab-separated table") from error
    if not rows or not {"Prompt", "Category"} <= set(rows[0]):
        raise BadInput(
            f"{where.flag} {given or path} is no table of prompts: its first line must name the columns Prompt,"
            " Category"
        )
    prompts = [
        Prompt(row["Prompt"].strip(), source, row["Category"] or None, row.get("Challenge") or None)
        for row in rows
        if row["Prompt"] and row["Prompt"].strip()
    ]
    if not prompts:
        raise BadInput(f"{where.flag} {given or path} holds no prompt; its column Prompt is empty")
    return prompts


def _hps(copy: Path | None, where: Where) -> list[Prompt]:
    """Read one JSON list of prompts per style, on the hub in the folder `benchmark`."""
    prompts = []
    for style in HPS_STYLES:
        if copy is None:
            file = _from_hub("hps", "zhwang/HPDv2", f"benchmark/{style}.json", where)
        else:
            file = next(
                (f for f in (copy / "benchmark" / f"{style}.json", copy / f"{style}.json") if f.is_file()), None
            )
        if file is None:
            raise BadInput(
                f"{where.flag} hps={copy} holds no {style}.json: name the folder with {', '.join(HPS_STYLES)}"
            )
        try:
            texts = read_json(file)
        except (OSError, ValueError) as error:
            raise BadInput(f"{where.flag} hps: {file} cannot be read ({error}); copy it again") from error
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise BadInput(f"{where.flag} hps: {file} is no list of texts; copy it again")
        prompts += [Prompt(text.strip(), "hps", style) for text in texts]
    return prompts


def _pickapic(copy: Path | None, where: Where) -> list[Prompt]:
    """Read the distinct texts of the column `caption` in the first split of PICKAPIC_SPLITS; no image is fetched.

    copy: a folder, a parquet file (read completely) or a repository on the hub. The prompts' source names the split if
    it is `validation`, and the repository if one is given.
    """
    import datasets

    from dpo_fast.data.pairs_source import split_names, stream_columns

    name, columns = PICKAPIC if copy is None else str(copy), ["caption"]
    local = copy is not None and copy.exists()
    if copy is not None and not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadInput(
            f"{where.flag} pickapic-validation={copy} does not exist: name the set's folder, parquet file or repository"
            " on the hub"
        )
    try:
        if local:
            splits = split_names(copy)
        else:
            options = {"cache_dir": where.cache_dir, "token": where.token}
            splits = datasets.load_dataset(name, streaming=True, columns=columns, **options)
        # a single file is the complete set, whatever split it comes from
        split = "train" if local and copy.is_file() else next((s for s in PICKAPIC_SPLITS if s in splits), None)
        rows = () if split is None else stream_columns(copy, columns, split=split) if local else splits[split]
        captions = [row["caption"] for row in rows]
        if not all(text is None or isinstance(text, str) for text in captions):
            raise ValueError("its column caption holds no texts")
    except Exception as error:  # network and file-format libraries raise nearly anything
        raise _unreachable("pickapic-validation", error, where) from error
    if split is None:
        raise BadInput(
            f"{where.flag} pickapic-validation: {name} has no split {' or '.join(PICKAPIC_SPLITS)}, only"
            f" {', '.join(splits)}: name another repository, or one parquet file, {where.flag} pickapic-validation=PATH"
        )
    texts = list(dict.fromkeys(text.strip() for text in captions if text and text.strip()))
    if not texts:
        raise BadInput(f"{where.flag} pickapic-validation: the column caption of {name} is empty; copy it again")
    source = "pickapic-validation" if split != PICKAPIC_SPLITS[1] else f"pickapic-validation (split {split})"
    if copy is not None and not local:  # another repository on the hub
        source = f"{source} of {name}"
    return [Prompt(text, source) for text in texts]


def _shapes(copy: Path | None, where: Where) -> list[Prompt]:
    if copy is not None:
        raise BadInput(f"{where.flag} shapes={copy}: this set is built in; give {where.flag} shapes, or {copy} alone")
    file = Path(__file__).parents[1] / "shapes" / "held_out.txt"
    return [Prompt(line, "shapes") for line in read_lines(file, where.flag)]


SETS: dict[str, Callable[[Path | None, Where], list[Prompt]]] = {
    "partiprompts": _partiprompts,
    "hps": _hps,
    "pickapic-validation": _pickapic,
    "shapes": _shapes,
}


def _from_hub(name: str, repository: str, file: str, where: Where) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(repository, file, repo_type="dataset", cache_dir=where.cache_dir, token=where.token)
        )
    except Exception as error:  # the HTTP library under the hub's client raises its own errors
        raise _unreachable(name, error, where) from error


def _unreachable(name: str, error: Exception, where: Where) -> BadInput:
    flag = where.flag
    return BadInput(f"{flag} {name} cannot be read ({one_line(error, 200)}); name a copy of yours, {flag} {name}=PATH")
