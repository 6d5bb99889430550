"""Compare a policy with a baseline, from prompts to the report: generate, pair up, score, judge, write.

OUT/evaluation.json   what is compared
OUT/images/           generated images (`generation`)
OUT/scores/           scores of single images (`scorers.kept_scores`)
OUT/scores.parquet    OUT/summary.json    OUT/report.html
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.data.image_files import Files
from dpo_fast.data.images import texts_of
from dpo_fast.evaluation.findings import REPORT, SAMPLING, SUMMARY, About, Findings, judge
from dpo_fast.evaluation.generation import generate_images, is_complete
from dpo_fast.evaluation.image_names import PromptImage, images_of
from dpo_fast.evaluation.pairing import ImagePairs, pair_up
from dpo_fast.evaluation.report.page import page
from dpo_fast.evaluation.scored import SCORES, Scored, write_scores
from dpo_fast.evaluation.sides import Comparison
from dpo_fast.evaluation.signals import measure
from dpo_fast.files import write_text
from dpo_fast.models.load import revisions
from dpo_fast.parallel import Ranks
from dpo_fast.scorers import Scorer, default_dtype, facts, load_scorer, provenance
from dpo_fast.scorers.kept_scores import has_scores, score_images

if TYPE_CHECKING:
    from dpo_fast.evaluation.implicit import ImplicitAccuracy

SHOWN = ("family", "weights", "sampler", "steps", "guidance", "resolution", "layout", "strength", "dtype", "versions")


def check_scorers(names: Sequence[str], scoring: Mapping[str, object], texts: Sequence[str]) -> None:
    """Load every scorer on the CPU and release it. scoring: keywords of `load_scorer`.

    Raises BadInput for a scorer that lacks its files or cannot judge `texts`.
    """
    for name in dict.fromkeys(names):
        load_scorer(name, torch.device("cpu"), **scoring).check(texts)


def unscored(comparison: Comparison, out: Path) -> list[str]:
    """The scorers that have not scored anything yet, or have more to score once images are there."""
    whole = _is_whole(comparison, out)
    return [name for name in comparison.scorers if not (whole and has_scores(out / "scores", name))]


def find_pairs(comparison: Comparison, out: Path, ranks: Ranks) -> tuple[Comparison, ImagePairs]:
    """Return the comparison restricted to prompts that have pairs, and those pairs, before generating anything.

    Raises BadInput, on every rank, for whatever would be refused later: a folder without an image of any prompt, an
    image that does not open.
    """

    def work() -> tuple[Comparison, ImagePairs]:
        pairs, wanted, whole = _pairs(comparison, out), comparison.wanted, _is_whole(comparison, out)
        for side, files in ((comparison.base, pairs.base), (comparison.policy, pairs.policy)):
            if side.folder is not None and not whole:
                files.check(f"opening, {side.name}")
        kept = set(pairs.prompts)
        wanted = replace(wanted, prompts=[prompt for prompt in wanted.prompts if prompt.text in kept])
        return replace(comparison, wanted=wanted), pairs

    return ranks.from_main(work)


def compare(
    comparison: Comparison, pairs: ImagePairs, out: Path, ranks: Ranks, batch_size: int
) -> tuple[Findings, Scored] | None:
    """Generate and score what is missing, then judge. The main rank returns findings and scores, the others None.

    Without scorers (`Comparison.scorers`) all return None: call `leave_unscored` then.
    """
    if comparison.wanted.models:
        generate_images(comparison.wanted, out / "images", ranks)
    if not comparison.scorers:
        return None
    number, both = len(pairs.prompts), Files([*pairs.base.paths, *pairs.policy.paths])
    files = {key: comparison.scoring[key] for key in ("where", "cache_dir")}
    scorers = scorers_by_name(comparison.scorers, comparison.scoring, ranks.device)
    scores = score_images(both, pairs.prompts * 2, scorers, out / "scores", ranks, batch_size=batch_size)
    if not ranks.is_main:
        return None
    scored = Scored(
        pairs.prompts,
        pairs.seeds,
        {name: of[:number] for name, of in scores.items()},
        {name: of[number:] for name, of in scores.items()},
        pairs.categories,
    )
    sources = pairs.base.paths, pairs.policy.paths
    signals = measure(pairs.base, pairs.policy, pairs.prompts, sources=sources, show=True)
    settings, remarks = _settings(comparison, pairs, ranks.device)
    settings |= comparison.training
    about = About(
        comparison.base.name,
        comparison.policy.name,
        comparison.prompt_set,
        date.today().isoformat(),
        settings,
        [*pairs.remarks, *remarks],
        trained_towards_the_first=comparison.trained_towards_the_first,
        models=models_of_sides(comparison),
        scorers={name: provenance(name, ranks.device, **files) for name in comparison.scorers},
    )
    return judge(scored, signals, about, compare_medians=comparison.compare_medians), scored


def models_of_sides(comparison: Comparison) -> dict[str, dict[str, str]]:
    """base and policy, where they were generated -> path or repository -> its revision."""
    return {
        title: revisions(comparison.wanted.models[side.name])
        for title, side in (("base", comparison.base), ("policy", comparison.policy))
        if side.folder is None
    }


def leave_unscored(comparison: Comparison, pairs: ImagePairs, out: Path, more: Mapping[str, object]) -> None:
    """Write which pairs there are into scores.parquet and summary.json, unless they have been scored.

    more: what else summary.json says, beside what it says already. Raises Damaged for a summary that cannot be read.
    """
    if (out / SCORES).is_file() and (out / SUMMARY).is_file():
        said = read_signed_json(out / SUMMARY, "evaluate again, with scorers")
    else:
        write_scores(out / SCORES, Scored(pairs.prompts, pairs.seeds, {}, {}, pairs.categories))
        said = {"prompts": len(set(pairs.prompts)), "images": len(pairs.prompts), "notes": pairs.remarks}
        said |= {"models": models_of_sides(comparison)}
    write_signed_json(out / SUMMARY, said | more)


def scorers_by_name(
    names: Sequence[str], scoring: Mapping[str, object], device: torch.device
) -> dict[str, tuple[Callable[[], dict[str, str]], Callable[[], Scorer]]]:
    """Return scorer -> (its facts, load), as `score_images` takes them."""
    files = {key: scoring[key] for key in ("where", "cache_dir")}
    return {
        name: (partial(facts, name, device, **files), partial(load_scorer, name, device, **scoring)) for name in names
    }


def write_report(
    out: Path, findings: Findings, scored: Scored, pairs: ImagePairs, implicit: "ImplicitAccuracy | None" = None
) -> None:
    """Write scores.parquet and report.html, each atomically."""
    write_scores(out / SCORES, scored)
    write_text(out / REPORT, page(findings, scored, pairs.base, pairs.policy, implicit=implicit))


def _is_whole(comparison: Comparison, out: Path) -> bool:
    """Whether all images are there."""
    return not comparison.wanted.models or is_complete(out / "images")


def _pairs(comparison: Comparison, out: Path) -> ImagePairs:
    wanted, sides = comparison.wanted, (comparison.base, comparison.policy)
    texts = [prompt.text for prompt in wanted.prompts]
    images, remarks = [], []
    for side in sides:
        if side.folder is not None:
            found = images_of(side.folder, texts)
            images.append(found.images)
            if found.unused:
                remarks.append(f"{found.unused} images in {side.name} are of none of these prompts")
            continue
        rows: dict[str, dict[int, PromptImage]] = {}
        for row in wanted.rows():
            if row.model == side.name:
                rows.setdefault(row.prompt, {})[row.seed] = PromptImage(out / "images" / row.file, row.seed)
        images.append({prompt: [*of_seed.values()] for prompt, of_seed in rows.items()})
    seeds = None if comparison.all_images else {text: wanted.seeds_of(text) for text in texts}
    paired = pair_up(wanted.prompts, seeds, *images, (sides[0].name, sides[1].name))
    paired.remarks.extend(remarks)
    return paired


def _settings(comparison: Comparison, pairs: ImagePairs, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Return how the images were made, by their PNG texts, and remarks if that is unknown or differs between sides."""
    texts = [_texts(files.paths[0]) for files in (pairs.base, pairs.policy)]
    settings = {"Seeds": ", ".join(map(str, dict.fromkeys(pairs.seeds)))} if not comparison.all_images else {}
    for name in SHOWN:
        base, policy = (of.get(name) for of in texts)
        if base or policy:
            both = base if base == policy else f"{base or 'not known'} (base), {policy or 'not known'} (policy)"
            settings[name.capitalize()] = both
    settings["Scored in"] = f"{_dtype(device)} on {device.type}"
    unknown = [s.name for s, of in zip((comparison.base, comparison.policy), texts, strict=True) if not of]
    if unknown:
        return settings, [f"how the images of {name} were made is not known" for name in unknown]
    differing = [name for name in SAMPLING if texts[0].get(name) != texts[1].get(name)]
    remarks = [f"the two were not made alike ({', '.join(differing)}): not only weights are compared"] * bool(differing)
    return settings, remarks


def _dtype(device: torch.device) -> str:
    return str(default_dtype(device)).removeprefix("torch.")


def _texts(file: Path) -> dict[str, str]:
    """The settings that dpo_fast.generate noted in an image; empty for any other image."""
    with open(file, "rb") as opened:
        found = texts_of(opened)
    return {name: found[name] for name in SHOWN if isinstance(found.get(name), str)} if "noise_seed" in found else {}
