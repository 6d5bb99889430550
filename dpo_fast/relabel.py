"""`python -m dpo_fast.relabel`: preference pairs labelled by scorers (AI feedback). `--help` lists every flag.

    python -m dpo_fast.relabel --dataset_name PAIRS --scorer pickscore --output labelled.parquet
    python -m dpo_fast.relabel --dataset_name PAIRS --scorer pickscore:1 --scorer aesthetic:0.5 --keep_fraction 0.1 ...
    accelerate launch --num_processes 8 -m dpo_fast.relabel ...     every process its share

Scores are kept beside the output: the same command goes on where it was stopped, and repeats nothing. Exit status:
0 done, 2 bad input, 130 interrupted, 1 a fault of ours.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.door import guarded, refuse, say, show_log
from dpo_fast.errors import BadInput
from dpo_fast.evaluation.relabel_options import RelabelConfig, parse

if TYPE_CHECKING:
    from dpo_fast.data import Source
    from dpo_fast.evaluation.scorers import Scorer
    from dpo_fast.parallel import Ranks


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        kept="the scores that were written stay; the same command goes on from there",
        go_on="make room, or name another --output, then start the same command again",
    )


def _run(config: RelabelConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import parallel
    from dpo_fast.data import open_source
    from dpo_fast.evaluation import scorers
    from dpo_fast.evaluation.relabeling import note_of
    from dpo_fast.run_folder import release

    scorers.check_names([*config.weights])
    existing = note_of(config.output) if config.output.is_file() else None
    if config.output.is_file() and existing is None and not config.overwrite:
        raise BadInput(f"--output {config.output} exists: name another file, or replace it with --overwrite")
    _check_places(config)

    show_log()
    ranks = parallel.start("none")
    try:
        source = open_source(
            config.dataset_name,
            config_name=config.dataset_config_name,
            split=config.dataset_split_name,
            image_columns=config.image_columns,
            label_column="none" if config.unlabelled else config.label_column,
            caption_column=config.caption_column,
            cache_dir=config.cache_dir,
            token=config.hub_token,
            max_rows=config.max_train_samples,
        )
        if existing is not None and not config.overwrite:
            ranks.on_main(lambda: _already_there(config, source, existing))
            return 0
        scoring = {"where": config.scorer_models, "cache_dir": config.cache_dir, "token": config.hub_token}
        loaded = {name: scorers.load_scorer(name, ranks.device, **scoring) for name in config.weights}
        _relabel(config, ranks, source, loaded)
    except torch.OutOfMemoryError as error:
        return refuse(f"out of GPU memory ({str(error).split('.')[0]}); lower --batch_size", any_rank=True)
    except BadInput:
        release(config.scores)
        raise
    finally:
        ranks.close()
    return 0


def _check_places(config: RelabelConfig) -> None:
    """Refuse an output that would change what is read, or that cannot be written."""
    data, output = Path(config.dataset_name).expanduser(), config.output.resolve()
    if data.exists() and (data.resolve() == output or (data.is_dir() and output.is_relative_to(data.resolve()))):
        raise BadInput(f"--output {config.output} is among the pairs that are read: name a file elsewhere")
    if config.output.is_dir():
        raise BadInput(f"--output {config.output} is a folder: name a file in it")
    if config.output.with_suffix(".json").exists() and not config.output.exists() and not config.overwrite:
        raise BadInput(
            f"{config.output.with_suffix('.json')} exists, which would hold the counts: name another --output, or"
            " replace it with --overwrite"
        )
    for flag, folder in (("--output", config.output.parent), ("--scores_dir", config.scores)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            raise BadInput(f"{flag}: {folder} cannot be written ({error.strerror or error}): name another") from error


def _request(config: RelabelConfig, source: "Source") -> dict:
    """What the output follows from."""
    rule = {name: getattr(config, name) for name in ("temperature", "keep_fraction", "min_margin", "unlabelled")}
    return {"pairs": source.identity(), "stamp": source.stamp(), "weights": config.weights, **rule}


def _already_there(config: RelabelConfig, source: "Source", existing: dict) -> None:
    """An output of the same command is the result; any other is refused."""
    from dpo_fast.evaluation.relabeling import as_text
    from dpo_fast.files import write_json

    if existing["request"] != _request(config, source):
        raise BadInput(
            f"--output {config.output} exists, made from other pairs or with other flags: name another file, or replace"
            " it with --overwrite (scores are not made again)"
        )
    say(f"{config.output} is there already, made by the same command")
    write_json(config.output.with_suffix(".json"), existing["report"])  # it may have been killed before
    print(as_text(existing["report"]), flush=True)


def _relabel(config: RelabelConfig, ranks: "Ranks", source: "Source", scorers: dict[str, "Scorer"]) -> None:
    """Score, label, write. Every rank calls this; the main rank writes and says what came of it."""
    import numpy as np

    from dpo_fast.data import build_index, write_report
    from dpo_fast.evaluation.judging import score_pairs
    from dpo_fast.evaluation.relabeling import Rule, as_text, human_labels, label, report, write_pairs
    from dpo_fast.files import write_json
    from dpo_fast.run_folder import REPORT

    started = time.perf_counter()
    bad_report = config.scores / REPORT
    sets = build_index(
        source,
        seed=0,
        soft_labels=True,  # a tie of people is a pair as good as any
        max_bad_fraction=config.max_bad_fraction,
        report_path=bad_report if ranks.is_main else None,
        progress=ranks.is_main,
    )
    captions = list(dict.fromkeys(sets.train.captions))
    for scorer in scorers.values():
        scorer.check(captions)
    say(f"{source.description}; by {', '.join(scorers)} on {ranks.world_size} x {ranks.device.type}")
    scores = score_pairs(
        source,
        sets.train,
        scorers,
        config.scores,
        ranks,
        batch_size=config.batch_size,
        num_workers=config.dataloader_num_workers,
        max_bad_fraction=config.max_bad_fraction,
        waiting=say,
    )

    def finish() -> None:
        bad = sorted([*sets.bad, *scores.bad])
        write_report(bad_report, bad)
        rule = Rule(config.weights, config.temperature, config.keep_fraction, config.min_margin)
        labels = label(scores, rule)
        human = [None] * len(source) if config.unlabelled else human_labels(source)
        known = None if config.unlabelled else np.array(human)[scores.rows]
        found = report(scores, labels, rule, known, rows=sets.rows, bad=len(bad))
        note = {"request": _request(config, source), "report": found}
        write_pairs(config.output, source, scores, labels, human, note, progress=True)
        write_json(config.output.with_suffix(".json"), found)
        print(as_text(found), flush=True)
        soft = " --soft_labels" if config.temperature is not None else ""
        say(f"{scores.scored_now} pairs scored now, {time.perf_counter() - started:.0f} s")
        say(f"train on it with --dataset_name {config.output}{soft}; bad rows and scores are in {config.scores}")

    ranks.on_main(finish)


if __name__ == "__main__":
    sys.exit(main())
