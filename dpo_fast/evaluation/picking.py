"""Pick a checkpoint of a run and a strength: halve the grid on some prompts, judge on the others, write the result.

OUT/rounds/N/          images of round N
OUT/scores/            scores of the rounds' images
OUT/judged/            images and scores of the pick, the base and the run's result, on prompts that no round has
OUT/pick.json          the points with their intervals, the pick and why, what it cost
OUT/surface.png        gain over checkpoint and strength
OUT/report.html  scores.parquet     the pick against the base
and the result with config.yaml and summary.json, so that dpo_fast.evaluate takes OUT for a run
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast import output_folder
from dpo_fast.checksums import write_signed_json
from dpo_fast.config import TrainConfig
from dpo_fast.data.image_files import Files
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.comparison import check_scorers, compare, find_pairs, scorers_by_name, write_report
from dpo_fast.evaluation.findings import Findings
from dpo_fast.evaluation.formats import difference
from dpo_fast.evaluation.generation import ImageRequest, generate_images
from dpo_fast.evaluation.halving import Race, Share, in_two, kept_of, shares
from dpo_fast.evaluation.pairing import ImagePairs
from dpo_fast.evaluation.pick_options import PickConfig
from dpo_fast.evaluation.prompts import Prompt, Where, read_prompts
from dpo_fast.evaluation.scored import Scored
from dpo_fast.evaluation.sides import Comparison, Point, Side, point_of, prompts_of_run, read_run, seeds_in_training
from dpo_fast.evaluation.surface import surface
from dpo_fast.files import read_text, user_path, write_text
from dpo_fast.models.opened import OneAtATime, settled
from dpo_fast.models.source import ModelSource, base_of
from dpo_fast.models.trained import read_trained
from dpo_fast.parallel import Ranks
from dpo_fast.pictures import save_png
from dpo_fast.scorers import MODULE_OF, check_names
from dpo_fast.scorers.kept_scores import score_images
from dpo_fast.statistics import Bootstrap, Interval, WinRate, win_rate
from dpo_fast.training import checkpoint
from dpo_fast.training.exports import base_sha256, write_result
from dpo_fast.training.run_folder import SUMMARY, publish

FOLDER = "pick"  # in a run's folder
RECORD, RESULT, PICTURE = "plan.json", "pick.json", "surface.png"
BASE, PICK, TRAINED = "base", "pick", "as-trained"
MOST_CHECKPOINTS = 8  # that are tried if none is named
LEAST_PROMPTS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be made, settled before anything is generated."""

    run: TrainConfig
    folder: Path  # of the run
    result: Point  # the run's own result: its last checkpoint, or the one that it was ended with
    out: Path
    base: ModelSource
    points: list[Point]
    prompts: dict[str, Prompt]  # by text
    rounds: list[Share]  # of prompts to pick by
    judging: list[Prompt]
    scorers: tuple[str, ...]
    scoring: Mapping[str, object]
    config: PickConfig
    batch_size: int

    def source(self, point: Point) -> ModelSource:
        """The model at a point."""
        return replace(self.base, trained=str(checkpoint.folder_of(self.folder, point.step)), strength=point.strength)

    def images_to_pick(self) -> int:
        """How many images the rounds take, of points and of the base."""
        alive, total = len(self.points), 0
        for share in self.rounds:
            total += (alive + 1) * share.images
            alive = kept_of(alive)
        return total

    def images_of_grid(self) -> int:
        """How many images the whole grid would take, with as many of each point as of the last that are left."""
        return (len(self.points) + 1) * sum(share.images for share in self.rounds)

    def record(self) -> dict[str, object]:
        """What identifies the folder's content."""
        config = asdict(self.config)
        for name in ("output_dir", "cache_dir", "hub_token", "batch_size", "scorer_models"):
            del config[name]
        return {
            **{name: str(value) if isinstance(value, Path) else value for name, value in config.items()},
            "points": [point.name for point in self.points],
            "rounds": [[share.prompts, [*share.seeds]] for share in self.rounds],
            "judged on": [prompt.text for prompt in self.judging],
        }


@dataclass(frozen=True)
class Row:
    """What is known of one point."""

    point: Point
    images: int
    gain: Interval
    win_rate: WinRate
    dropped_in: int | None  # round; None: it was left in the last


@dataclass(frozen=True)
class Picked:
    """The pick and what it rests on."""

    rows: list[Row]  # of all points, by checkpoint and strength
    pick: Point
    findings: Findings  # of the pick against the base, on prompts that no round has
    result: tuple[WinRate, Interval] | None  # win rate and gain of the run's own result, there; None: it is the pick
    lead: Interval | None  # mean score of the pick minus that of the run's own result, there
    images: int  # made to pick
    images_of_grid: int
    images_to_judge: int

    def __str__(self) -> str:
        """The table, the pick, and how it does on prompts that did not pick."""
        lines = [f"{'checkpoint':>10}  {'strength':>8}  {'images':>6}  {'gain [95%]':>30}  win rate [95%]"]
        for row in self.rows:
            mark = "*" if row.point == self.pick else " "
            lines.append(
                f"{mark}{row.point.step:>9}  {row.point.strength:>8g}  {row.images:>6}  {difference(row.gain):>30}"
                f"  {row.win_rate}"
            )
        first = self.findings.overall[0]
        lines += ["", self.why(), f"on {first.prompts} prompts that did not pick ({self.findings.images} images):"]
        shown = {"the pick": (first.win_rate, first.gain)}
        if self.result is not None:
            shown["the run's own result"] = self.result
        for name, (rate, gain) in shown.items():
            lines.append(f"  {name}: win rate {rate}, gain {difference(gain)}")
        if not first.decided or first.win_rate.rate < 0.5:
            lines.append("  that shows no gain over the base: train longer, or on more pairs, rather than use this")
        share = self.images / self.images_of_grid
        return "\n".join([*lines, f"{self.images} images to pick, {share:.0%} of the whole grid's"])

    def row(self, point: Point) -> Row:
        return next(row for row in self.rows if row.point == point)

    def why(self) -> str:
        """Why this point, in a sentence."""
        row, number = self.row(self.pick), len(self.rows)
        return (
            f"step {self.pick.step} at strength {self.pick.strength:g} is best of {number} points: gain"
            f" {difference(row.gain)}, win rate {row.win_rate} over {row.images} images"
        )


def plan(config: PickConfig) -> Plan:
    """Settle what will be made. Raises BadInput for whatever can be refused before anything is generated."""
    folder = user_path(config.run)
    run = read_run(str(folder))
    found = {checkpoint.step_of(one): one for one in checkpoint.all_of(folder)}
    if not found:
        raise BadInput(f"{folder} holds no checkpoint: train with --checkpointing_steps, and keep them")
    if lacking := [str(step) for step in config.checkpoints if step not in found]:
        there = ", ".join(map(str, found))
        raise BadInput(f"--checkpoints {' '.join(lacking)}: {folder} holds those of steps {there}")
    steps = sorted(config.checkpoints) or _spread(sorted(found), MOST_CHECKPOINTS)
    where = Where(config.cache_dir, config.hub_token)
    if config.prompts or run.eval_prompts is None:
        prompts = read_prompts(config.prompts, people=False, most=None, where=where)
    else:
        prompts = prompts_of_run(run, where)
    by_text = {prompt.text: prompt for prompt in reversed(prompts)}
    picking, judging = in_two([*by_text])
    if len(picking) + len(judging) < LEAST_PROMPTS:
        raise BadInput(
            f"{len(by_text)} prompts are too few: half of them pick and half of them judge, and each half needs at"
            f" least {LEAST_PROMPTS // 2}; give more --prompts"
        )
    scorers = tuple(dict.fromkeys(config.scorers)) or tuple(run.eval_scorers)
    if not scorers:
        raise BadInput(f"no scorer is named: give --scorers, the one that decides first, of {', '.join(MODULE_OF)}")
    check_names(scorers)
    given = {"steps": config.sampling_steps, "guidance": config.sampling_guidance}
    given |= {"cache_dir": config.cache_dir, "token": config.hub_token}
    base = replace(base_of(run), **{name: value for name, value in given.items() if value is not None})
    files = config.scorer_models or run.scorer_models
    return Plan(
        run,
        folder,
        Point(_step_of_result(folder, sorted(found)), 1.0),
        folder / FOLDER if config.output_dir is None else user_path(config.output_dir),
        settled(base),
        [Point(step, strength) for step in steps for strength in sorted(config.strengths)],
        by_text,
        shares(picking, config.images),
        [by_text[text] for text in judging],
        scorers,
        {"where": files and user_path(files), "cache_dir": config.cache_dir, "token": config.hub_token},
        config,
        config.batch_size or run.eval_batch_size,
    )


def _step_of_result(folder: Path, steps: Sequence[int]) -> int:
    """The step of the checkpoint whose weights are the run's result: the last, if `--stop_when_worse` took no other."""
    point = point_of(str(folder))
    return point.step if point is not None and point.step in steps else steps[-1]


def pick(plan: Plan, ranks: Ranks) -> Picked | None:
    """Do what is planned, in the folder `plan.out`, which the main rank holds. The main rank returns the pick.

    Images and scores that are there already are kept. Every rank calls this.
    """
    ranks.on_main(lambda: output_folder.claim(plan.out, RECORD, plan.record(), what="a pick"))
    ranks.on_main(lambda: check_scorers(plan.scorers, plan.scoring, [*plan.prompts]))
    race, dropped_in = _race(plan, ranks)
    chosen = {point.name: point for point in plan.points}[race.best()]
    judged = _judge(plan, chosen, ranks)
    return ranks.on_main(lambda: _written(plan, race, dropped_in, chosen, judged))


def _written(plan: Plan, race: Race, dropped_in: Mapping[str, int | None], chosen: Point, judged: "_Judged") -> Picked:
    """Put together what was found, and write all of it."""
    rows = [
        Row(
            point,
            len(race.scores[point.name]),
            race.gain(point.name),
            race.win_rate(point.name),
            dropped_in[point.name],
        )
        for point in plan.points
    ]
    findings, scored, pairs, result, lead = judged
    images = (2 + (result is not None)) * len(scored.prompts)
    picked = Picked(rows, chosen, findings, result, lead, plan.images_to_pick(), plan.images_of_grid(), images)
    write_report(plan.out, findings, scored, pairs)
    _write(plan, picked)
    return picked


def _race(plan: Plan, ranks: Ranks) -> tuple[Race, dict[str, int | None]]:
    """Run the rounds. Returns the scores, and the round in which each point was dropped."""
    race = Race([point.name for point in plan.points], plan.config.by)
    dropped: dict[str, int | None] = dict.fromkeys(race.candidates)
    points = {point.name: point for point in plan.points}
    for number, share in enumerate(plan.rounds, start=1):
        models = {BASE: Point(plan.points[0].step, 0.0)} | {name: points[name] for name in race.alive}
        prompts = [plan.prompts[text] for text in share.prompts]
        request = ImageRequest(
            {name: plan.source(point) for name, point in models.items()},
            prompts,
            tuple(share.seeds),
            batch_size=plan.batch_size,
        )
        texts, scores = scores_of(plan, request, plan.out / "rounds" / str(number), plan.scorers[:1], ranks)
        of_first = scores[plan.scorers[0]]
        race.add(texts, of_first[BASE], of_first)
        if number < len(plan.rounds):
            before = race.alive
            race.drop_the_worse_half()
            dropped |= {name: number for name in before if name not in race.alive}
        best = race.best()
        logger.info(
            "round %d of %d: %d images of each of %d points; best %s, %+.4g in %s; %d left",
            *(number, len(plan.rounds), share.images, len(models) - 1, best, race.gains(best).mean(), plan.scorers[0]),
            len(race.alive),
        )
    return race, dropped


def scores_of(
    plan: Plan, request: ImageRequest, out: Path, names: Sequence[str], ranks: Ranks
) -> tuple[list[str], dict[str, dict[str, Tensor]]]:
    """Generate and score. Returns the prompt of each image of a model, and scorer -> model -> fp64 [images]."""
    generate_images(request, out, ranks)
    rows = request.rows()
    scorers = scorers_by_name(names, plan.scoring, ranks.device)
    files = Files([out / row.file for row in rows])
    scores = score_images(
        files, [row.prompt for row in rows], scorers, plan.out / "scores", ranks, batch_size=plan.batch_size
    )
    which = {name: torch.tensor([row.model == name for row in rows]) for name in request.models}
    texts = [row.prompt for row in rows if row.model == next(iter(request.models))]
    return texts, {scorer: {name: of[rows_of] for name, rows_of in which.items()} for scorer, of in scores.items()}


class _Judged(NamedTuple):
    """The pick against the base and the run's own result, on prompts that no round has."""

    findings: Findings
    scored: Scored
    pairs: ImagePairs
    result: tuple[WinRate, Interval] | None  # as in `Picked`
    lead: Interval | None


def _judge(plan: Plan, chosen: Point, ranks: Ranks) -> _Judged | None:
    """Compare the pick with the base and with the run's result. Returns the findings on the main rank."""
    out, images = plan.out / "judged", plan.config.judge_images
    asked, seeds, without_last = seeds_in_training(plan.judging, images)
    prompts = [prompt for prompt in plan.judging if prompt.text in asked]
    models = {BASE: plan.source(Point(chosen.step, 0.0)), PICK: plan.source(chosen)}
    wanted = ImageRequest(models, prompts, seeds, without_last, batch_size=plan.batch_size)
    comparison = Comparison(
        Side(BASE),
        Side(PICK),
        wanted,
        all_images=False,
        prompt_set=f"{', '.join(dict.fromkeys(prompt.source for prompt in prompts))}, those that did not pick",
        scorers=plan.scorers,
        scoring=plan.scoring,
        compare_medians=False,
        training={"Picked": f"step {chosen.step} at strength {chosen.strength:g}"},
        trained_towards_the_first=plan.scorers[:1] == tuple(plan.run.eval_scorers[:1]),
    )
    comparison, pairs = find_pairs(comparison, out, ranks)
    compared = compare(comparison, pairs, out, ranks, plan.batch_size)
    result = lead = scores = None
    if chosen != plan.result:
        other = replace(wanted, models={TRAINED: plan.source(plan.result)})
        texts, scores = scores_of(plan, other, out / TRAINED, plan.scorers[:1], ranks)
    if compared is None:
        return None
    findings, scored = compared
    first = plan.scorers[0]
    if scores is not None:
        trained, over_prompts = scores[first][TRAINED], Bootstrap(texts)
        assert texts == scored.prompts
        result = (
            win_rate(scored.base[first], trained, texts, over_prompts),
            over_prompts.mean(trained - scored.base[first]),
        )
        lead = over_prompts.mean(scored.policy[first] - trained)
    return _Judged(findings, scored, pairs, result, lead)


def _write(plan: Plan, picked: Picked) -> None:
    """Write the picture, the result at the picked strength, and the records, each atomically."""
    save_png(
        surface([(row.point.step, row.point.strength, row) for row in picked.rows], picked.pick), plan.out / PICTURE
    )
    source = plan.source(picked.pick)

    def write(folder: Path) -> None:
        family = OneAtATime(torch.device("cpu")).open(source)
        weights = family.unet.state_dict()
        if plan.run.tuning == "lora":
            weights = {name: weights[name] for name in read_trained(Path(source.trained)).weights}
        counts = {
            "pairs_seen": picked.pick.step * plan.run.pairs_per_step,
            "strength": picked.pick.strength,
            "base_sha256": base_sha256(plan.run),
        }
        write_result(family, folder, plan.run, weights, counts)

    result = publish(plan.out, write)
    write_text(plan.out / "config.yaml", read_text(plan.folder / "config.yaml"))
    about = picked.findings.numbers() | {
        "steps": picked.pick.step,
        "strength": picked.pick.strength,
        "result": result,
    }
    write_signed_json(plan.out / SUMMARY, about)
    write_signed_json(plan.out / RESULT, for_json(plan, picked))


def for_json(plan: Plan, picked: Picked) -> dict[str, object]:
    """The content of pick.json."""
    first = picked.findings.overall[0]
    trained = None
    if picked.result is not None:
        trained = {
            "step": plan.result.step,
            "win_rate": picked.result[0]._asdict(),
            "gain": picked.result[1]._asdict(),
            "pick_minus_result": picked.lead._asdict(),
        }
    return {
        "pick": picked.pick._asdict(),
        "why": picked.why(),
        "scorer": plan.scorers[0],
        "by": plan.config.by,
        "judged": {
            "prompts": first.prompts,
            "images": picked.findings.images,
            "win_rate": first.win_rate._asdict(),
            "gain": first.gain._asdict(),
            "result_of_the_run": trained,
        },
        "images": {
            "to_pick": picked.images,
            "of_the_whole_grid": picked.images_of_grid,
            "to_judge": picked.images_to_judge,
        },
        "points": [
            {
                **row.point._asdict(),
                "images": row.images,
                "gain": row.gain._asdict(),
                "win_rate": row.win_rate._asdict(),
                "dropped_in_round": row.dropped_in,
            }
            for row in picked.rows
        ],
    }


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, with the last."""
    if len(steps) <= most:
        return [*steps]
    return [steps[(k + 1) * len(steps) // most - 1] for k in range(most)]
