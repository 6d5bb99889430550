"""`dpo_fast.evaluate`: a policy against its base, another model or anybody's images, and on held-out pairs."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo_fast import output_folder, parallel
from dpo_fast.api.options import settled_options
from dpo_fast.checksums import write_signed_json
from dpo_fast.config import TrainConfig, public
from dpo_fast.data import PairIndex, PairsSource, Source, build_index, open_source
from dpo_fast.errors import out_of_memory
from dpo_fast.evaluation import evaluate_options
from dpo_fast.evaluation.comparison import (
    check_scorers,
    compare,
    find_pairs,
    leave_unscored,
    unscored,
    write_report,
)
from dpo_fast.evaluation.evaluate_options import EvaluateConfig
from dpo_fast.evaluation.findings import RECORD, REPORT, SUMMARY, Findings
from dpo_fast.evaluation.implicit import ImplicitAccuracy, accuracy, implicit_rewards
from dpo_fast.evaluation.protocol import begin
from dpo_fast.evaluation.protocol_table import ProtocolTable, write_table
from dpo_fast.evaluation.sides import (
    batch_size_of,
    comparison_of,
    evaluation_name,
    is_trained,
    point_of,
    read_run,
    reference_of,
    settings_of,
    sides_of,
)
from dpo_fast.evaluation.voted import people_of
from dpo_fast.hub_revisions import public_name, revision_of
from dpo_fast.models.load import revisions
from dpo_fast.models.source import ModelSource
from dpo_fast.models.text_chunks import CHUNK
from dpo_fast.parallel import Ranks
from dpo_fast.training.hub import public_config

DRAWS, WORKERS, MAX_BAD_FRACTION = 8, 2, 0.01  # where the flags say nothing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the same on every rank."""

    folder: Path  # with summary.json and, if images were compared, report.html, scores.parquet and the images
    findings: Findings | None  # of images; None: none were compared
    implicit: ImplicitAccuracy | None  # on held-out pairs; None: none were named

    def __str__(self) -> str:
        """Text for the terminal."""
        parts = [str(part) for part in (self.findings, self.implicit) if part is not None]
        if self.findings is not None:
            parts.append(f"report: {self.folder / REPORT}")
        elif self.implicit is None:
            parts.append(f"nothing is scored; people can vote: python -m dpo_fast.vote {self.folder}")
        return "\n\n".join(parts)


def evaluate(config: EvaluateConfig | None = None, **settings: object) -> Evaluation | ProtocolTable:
    """Compare a policy with a baseline, or measure its implicit-reward accuracy on pairs, and return what was found.
    With `protocol` make all comparisons of a published protocol, and return its table.

    The evaluation is described by `settings`, flags of `python -m dpo_fast.evaluate` by name (`policy=folder,
    prompts=["partiprompts"], scorers=["pickscore"]`), or by `config`, an EvaluateConfig. Images and scores that are in
    the output folder already are not made again. Under `accelerate launch` every process calls this.

    Raises BadInput, before long work, for settings, models, prompts and pairs that cannot be used, and OSError for a
    disk that is full or fails.
    """
    config = settled_options(EvaluateConfig, evaluate_options.parse, config, settings)
    return _evaluate(config) if config.protocol is None else _protocol(config)


def _protocol(config: EvaluateConfig) -> ProtocolTable:
    """Evaluate what the protocol compares, one evaluation after the other."""
    run = read_run(config.policy) if is_trained(config.policy) else None
    with parallel.joined("none") as ranks:
        plan = ranks.from_main(lambda: begin(config, run))
    for place, part in enumerate(plan.parts, start=1):
        logger.info("%s, %d of %d: %s", config.protocol, place, len(plan.parts), part.group.name)
        _evaluate(part.config)
    with parallel.joined("none") as ranks:
        return ranks.from_main(lambda: write_table(plan.folder))


def _evaluate(config: EvaluateConfig) -> Evaluation:
    run = read_run(config.policy) if is_trained(config.policy) else None
    config = replace(config, batch_size=batch_size_of(config, run))
    models, sides = sides_of(config)
    comparison = None
    if config.prompts or config.dataset_name is None:
        comparison = comparison_of(config, run, models, sides)
    reference = None if config.dataset_name is None else reference_of(config, run, models, sides)
    out = config.output_dir or Path("evaluations", evaluation_name(config, sides))
    for name, model in models.items():
        logger.info("%s: %s", name, sampled_as(model))

    try:
        with parallel.joined("none") as ranks, ExitStack() as held:
            parallel.allow_tf32(run is not None and run.allow_tf32)  # as in training
            # everything that may be refused comes before everything that takes long
            held_out = None if reference is None else _open_pairs(config, ranks)
            ranks.on_main(lambda: held.enter_context(output_folder.hold(out)))
            about = settings_of(config, sides, models, comparison)
            ranks.on_main(lambda: output_folder.claim(out, RECORD, about, what="an evaluation"))
            pairs = result = implicit = None
            if comparison is not None:
                texts = [prompt.text for prompt in comparison.wanted.prompts]
                ranks.on_main(lambda: check_scorers(unscored(comparison, out), comparison.scoring, texts))
                comparison, pairs = find_pairs(comparison, out, ranks)
                result = compare(comparison, pairs, out, ranks, config.batch_size)
            if reference is not None:
                implicit = _implicit(config, run, models[sides[1].name], reference, held_out, ranks)

            def write() -> Evaluation:
                summary = {} if run is None else {"run": public_config(public(run))}  # how the policy was trained
                if (point := point_of(config.policy)) is not None:
                    summary |= point._asdict()  # of its weights, which are not those of the last step
                if implicit is not None:
                    summary["implicit"] = implicit.for_summary()
                if comparison is not None and result is None:
                    leave_unscored(comparison, pairs, out, summary)
                    return Evaluation(out, None, implicit)
                if result is None:
                    write_signed_json(out / SUMMARY, summary)
                    return Evaluation(out, None, implicit)
                findings, scored = result
                findings = findings.with_people(people_of(out, pairs), scored)
                write_report(out, findings, scored, pairs, implicit)
                write_signed_json(out / SUMMARY, findings.for_summary() | summary)
                return Evaluation(out, findings, implicit)

            return ranks.from_main(write)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, "lower --batch_size") from error


def sampled_as(model: ModelSource) -> str:
    """Describe in one line which model is sampled, and how."""
    long = "" if model.max_token_length == CHUNK else f", prompts of up to {model.max_token_length} tokens"
    return f"{model}, {model.steps} steps, guidance {model.guidance:g}, {model.resolution} pixels a side{long}"


def _open_pairs(config: EvaluateConfig, ranks: Ranks) -> tuple[Source, PairIndex]:
    """The held-out pairs, on every rank."""

    def work() -> tuple[Source, PairIndex]:
        source = open_source(PairsSource.of(config, max_rows=config.max_pairs))
        sets = build_index(source, seed=0, max_bad_fraction=_bad_fraction(config), progress=ranks.is_main)
        logger.info("%s: %d pairs; %s", source.description, len(sets.train), sets.left_out)
        return source, sets.train

    return ranks.on_all(work)


def _implicit(
    config: EvaluateConfig,
    run: TrainConfig | None,
    policy: ModelSource,
    reference: ModelSource,
    held_out: tuple[Source, PairIndex],
    ranks: Ranks,
) -> ImplicitAccuracy | None:
    """The implicit-reward accuracy, on the main rank."""
    as_trained = {}
    if run is not None:
        as_trained = {name: getattr(run, name) for name in ("time_ids", "min_timestep", "max_timestep")}
    rewards = implicit_rewards(
        policy,
        reference,
        *held_out,
        ranks,
        draws=config.draws or DRAWS,
        seed=0,
        batch_size=max(1, config.batch_size // 2),
        num_workers=WORKERS if config.dataloader_num_workers is None else config.dataloader_num_workers,
        beta=None if run is None else run.beta_dpo,
        max_bad_fraction=_bad_fraction(config),
        **as_trained,
    )
    if rewards is None:
        return None
    pairs = {public_name(config.dataset_name): revision_of(config.dataset_name, kind="dataset")}
    return replace(
        accuracy(rewards),
        files={"reference": revisions(reference), "policy": revisions(policy), "pairs": pairs},
    )


def _bad_fraction(config: EvaluateConfig) -> float:
    return MAX_BAD_FRACTION if config.max_bad_fraction is None else config.max_bad_fraction
