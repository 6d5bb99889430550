"""A published protocol as evaluations: which comparisons it has, where they are kept, and what of it is missing.

OUT/protocol.json      its groups, one a comparison: name, folder, kind, and the prompts about people
OUT/<group>/           the evaluation of a group, as of any two sides (`comparison`)
OUT/layouts.txt        the prompts of SDEdit, where the layouts' names are
OUT/votes.sqlite       people's votes on all groups (`python -m dpo_fast.vote OUT`)
OUT/summary.json  table.md  report.html        the table (`protocol_table`)

The paper is Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization (arXiv 2311.12908):
PartiPrompts and HPSv2's benchmark, the same seeds of base and policy, five votes a comparison and question, the
majority decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_fast import output_folder
from dpo_fast.checksums import Damaged, write_signed_json
from dpo_fast.config import TrainConfig
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.comparison import check_scorers
from dpo_fast.evaluation.evaluate_options import BY_PEOPLE, PROTOCOL_SETS, EvaluateConfig
from dpo_fast.evaluation.generation import read_layouts
from dpo_fast.evaluation.image_names import image_files, images_of, prompt_of
from dpo_fast.evaluation.prompts import Prompt, Where, read_prompts
from dpo_fast.evaluation.reopened import IMAGES, is_evaluation
from dpo_fast.evaluation.sides import Side, batch_size_of, scoring_of, sides_of
from dpo_fast.files import user_path, write_text
from dpo_fast.scorers import check_names, load_scorer
from dpo_fast.scorers.kept_scores import has_scores

PROTOCOL = "protocol.json"
LAYOUTS = "layouts.txt"
PAPERS_SCORERS = ("pickscore", "hpsv2", "clip", "aesthetic")
CLOSED = ("midjourney", "emu")  # the closed models of the protocol; anybody's images may be named beside them
BASE, CLOSED_MODEL, SDEDIT = "base", "closed", "sdedit"  # kinds of groups


class Group(NamedTuple):
    """One comparison of a protocol."""

    name: str
    folder: Path  # of its evaluation
    kind: str  # BASE, CLOSED_MODEL or SDEDIT
    people: tuple[str, ...] = ()  # those of its prompts that are about people


class Part(NamedTuple):
    """A group, and the flags of its evaluation."""

    group: Group
    config: EvaluateConfig


@dataclass(frozen=True)
class Plan:
    """What a protocol evaluates, in this order."""

    folder: Path
    parts: Sequence[Part]


def is_protocol(folder: Path) -> bool:
    """Whether a folder is that of a protocol."""
    return (folder / PROTOCOL).is_file()


def groups_of(folder: Path) -> list[Group]:
    """Return the groups of a protocol's folder that have been evaluated. Raises Damaged for a record that is none."""
    return [group for group in _recorded(_record(folder), folder) if is_evaluation(group.folder)]


def remarks_of(folder: Path) -> list[str]:
    """What a protocol lacks, one line each: what was found missing when it was evaluated, and parts without a group."""
    groups, lines = groups_of(folder), [*_record(folder)["remarks"]]
    names = {group.name for group in groups}
    for name in PROTOCOL_SETS:
        if f"{BASE}-{name}" not in names:
            lines.append(f"{name} is not evaluated: --prompts {name}, or leave --prompts out")
    of_closed = {group.name.rpartition("-")[0].lower() for group in groups if group.kind == CLOSED_MODEL}
    for name in CLOSED:
        if name not in of_closed:
            lines.append(f"no images of {name.capitalize()}: --closed {name}=FOLDER compares with those you have")
    if not any(group.kind == SDEDIT for group in groups):
        lines.append("no SDEdit: --layout FOLDER starts from the images in it, each named by its prompt")
    return lines


def begin(config: EvaluateConfig, run: TrainConfig | None) -> Plan:
    """Check all that the protocol `config` asks for, claim its folder, and return the evaluations that it takes.

    Raises BadInput for whatever cannot be read, before anything is generated.
    """
    _, (base, policy) = sides_of(config)
    if config.layout is not None and base.folder is not None:
        raise BadInput(f"--layout: both sides of SDEdit are generated, and --baseline {config.baseline} is images")
    out = config.output_dir or Path("protocols", policy.name)
    where = Where(config.cache_dir, config.hub_token)
    given = {text.partition("=")[0]: text for text in config.prompts or PROTOCOL_SETS}
    sets = {name: read_prompts([given[name]], most=config.max_prompts, where=where) for name in given}
    people = {name: _about_people(given[name], sets[name], where) for name in given}
    remarks = [f"no prompt of {name} is about people" for name in given if not people[name]]
    closed = {name: user_path(folder) for name, _, folder in (one.partition("=") for one in config.closed)}
    found = {name: _closed_sets(name, folder, sets) for name, folder in closed.items()}
    remarks += [f"{name} has no image of a prompt of {of}" for name in closed for of in sets if of not in found[name]]
    layouts = None if config.layout is None else _layout_prompts(user_path(config.layout))

    scoring = scoring_of(config, run)
    scorers = tuple(dict.fromkeys(config.scorers))
    if scorers == (BY_PEOPLE,):
        remarks.append("no scores, as --scorers people asked for votes alone")
    elif scorers:
        check_names(scorers)
        texts = [prompt.text for prompts in sets.values() for prompt in prompts] + (layouts[1] if layouts else [])
        check_scorers([name for name in scorers if not _has_scored(name, out)], scoring, texts)
    else:
        scorers, lacking = _scorers_there(scoring, out)
        remarks += lacking
    shared = replace(
        config,
        protocol=None,
        closed=(),
        layout=None,
        strength=None,
        scorers=scorers,
        scorer_models=scoring["where"],
        batch_size=batch_size_of(config, run),
    )
    parts = [
        _part(out, f"{BASE}-{name}", BASE, people[name], replace(shared, prompts=(given[name],))) for name in given
    ]
    if layouts is not None:
        start = {"prompts": (str(layouts[0] or out / LAYOUTS),), "layout": config.layout, "strength": config.strength}
        start["max_prompts"] = None  # layouts may go by the prompts' order
        parts.append(_part(out, f"{BASE}-{SDEDIT}", SDEDIT, (), replace(shared, **start)))
    parts += [
        _part(out, f"{name}-{of}", CLOSED_MODEL, people[of], _against(shared, out, policy, folder, given[of], of))
        for name, folder in closed.items()
        for of in found[name]
    ]
    with output_folder.hold(out):
        _claim(out, config.protocol, [part.group for part in parts], remarks)
        if layouts is not None and layouts[0] is None:
            write_text(out / LAYOUTS, "".join(f"{text}\n" for text in layouts[1]))
    return Plan(out, parts)


def _part(out: Path, name: str, kind: str, people: Sequence[str], config: EvaluateConfig) -> Part:
    return Part(Group(name, out / name, kind, tuple(people)), replace(config, output_dir=out / name))


def _against(shared: EvaluateConfig, out: Path, policy: Side, folder: Path, given: str, name: str) -> EvaluateConfig:
    """The flags that compare the policy's images, which the comparison with the base has made, with others' images."""
    images = policy.folder or out / f"{BASE}-{name}" / IMAGES / policy.name
    return replace(
        shared,
        policy=str(images),
        baseline=str(folder),
        prompts=(given,),
        seeds=None,
        is_turbo=False,
        sampling_steps=None,
        sampling_guidance=None,
        resolution=None,
        max_token_length=None,
        mixed_precision=None,
    )


def _about_people(given: str, used: Sequence[Prompt], where: Where) -> tuple[str, ...]:
    """Which of the prompts in use are in the people slice of their set."""
    try:
        about = {prompt.text for prompt in read_prompts([given], people=True, where=where)}
    except BadInput:  # the set itself was read before
        return ()
    return tuple(dict.fromkeys(prompt.text for prompt in used if prompt.text in about))


def _closed_sets(name: str, folder: Path, sets: dict[str, list[Prompt]]) -> list[str]:
    """The sets of which a folder has images."""
    if not folder.is_dir():
        raise BadInput(f"--closed {name}={folder} is no folder: name the one that holds its images")
    found = [of for of, prompts in sets.items() if images_of(folder, [prompt.text for prompt in prompts]).images]
    if not found:
        raise BadInput(
            f"--closed {name}={folder} holds no image of a prompt of {' or '.join(sets)}: images are found by their"
            " names, which must be the prompts (letters and digits count)"
        )
    return found


def _layout_prompts(path: Path) -> tuple[Path | None, list[str]]:
    """The prompts of SDEdit: the file prompts.txt beside the layouts, else the texts that the layouts are named by."""
    file = path / "prompts.txt"
    if file.is_file():
        prompts = read_prompts([str(file)])
        read_layouts(path, prompts)
        return file, [prompt.text for prompt in prompts]
    if not path.exists():
        raise BadInput(f"--layout {path} does not exist; name an image or a folder of images")
    texts = list(dict.fromkeys(prompt_of(image, path) for image in (image_files(path) if path.is_dir() else [path])))
    read_layouts(path, [Prompt(text, LAYOUTS) for text in texts])
    return None, texts


def _scorers_there(scoring: dict[str, object], out: Path) -> tuple[tuple[str, ...], list[str]]:
    """The paper's scorers whose files are there, or `people`; and a line on each of the others."""
    there, lacking = [], []
    for name in PAPERS_SCORERS:
        if not _has_scored(name, out):
            try:
                load_scorer(name, torch.device("cpu"), **scoring)
            except BadInput as error:
                lacking.append(f"not scored by {name}: {error}")
                continue
        there.append(name)
    return tuple(there) or (BY_PEOPLE,), lacking


def _has_scored(name: str, out: Path) -> bool:
    return any(has_scores(folder, name) for folder in out.glob("*/scores"))


def _claim(out: Path, protocol: str, groups: Sequence[Group], remarks: Sequence[str]) -> None:
    """Claim the protocol's folder, which is held. Groups that were evaluated before stay in it."""
    names = {group.name for group in groups}
    before = _record(out) if is_protocol(out) else {"groups": []}
    groups = [*groups, *(group for group in _recorded(before, out) if group.name not in names)]
    record = {
        "protocol": protocol,
        "groups": [
            {"name": group.name, "folder": group.folder.name, "kind": group.kind, "people": list(group.people)}
            for group in groups
        ],
        "remarks": list(remarks),
    }
    output_folder.claim(out, PROTOCOL, record, what="a protocol", key="protocol")
    write_signed_json(out / PROTOCOL, record)


def _record(folder: Path) -> dict:
    record = output_folder.read_record(folder, PROTOCOL, ("protocol", "groups", "remarks"))
    if record is None:
        raise BadInput(f"{folder} holds no {PROTOCOL}: it is not the folder of a protocol")
    return record


def _recorded(record: dict, folder: Path) -> list[Group]:
    try:
        found = [
            Group(of["name"], folder / Path(of["folder"]).name, of["kind"], tuple(of["people"]))
            for of in record["groups"]
        ]
    except (TypeError, LookupError) as error:
        raise Damaged(f"{folder / PROTOCOL} is damaged ({error}): the command that wrote it writes it again") from error
    return found
