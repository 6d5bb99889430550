"""`python -m dpo_fast.relabel`: preference pairs labelled by scorers (AI feedback). `--help` lists every flag.

    python -m dpo_fast.relabel --dataset_name PAIRS --scorer pickscore --output labelled.parquet
    python -m dpo_fast.relabel --dataset_name PAIRS --scorer pickscore:1 --scorer aesthetic:0.5 --keep_fraction 0.1 ...
    accelerate launch --num_processes 8 -m dpo_fast.relabel ...     every process its share

Scores are kept beside the output: the same command goes on where it was stopped, and repeats nothing. Exit status:
0 done, 2 bad input, 130 interrupted, 1 an internal error.
"""

import hashlib
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from dpo_fast.cli import guarded, leave, say, show_log
from dpo_fast.errors import BadInput, out_of_memory
from dpo_fast.files import user_path
from dpo_fast.relabeling.options import RelabelConfig, parse

if TYPE_CHECKING:
    from dpo_fast.data import Source
    from dpo_fast.locks import Hold
    from dpo_fast.parallel import Ranks
    from dpo_fast.scorers import Scorer


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: _run(parse(argv)),
        argv=argv,
        kept="the scores that were written stay; the same command goes on from there",
        go_on="start the same command again",
    )


def _run(config: RelabelConfig) -> int:
    # Imported here: flags are checked in a moment, before the heavy libraries are loaded.
    import torch

    from dpo_fast import locks, parallel, scorers
    from dpo_fast.training.run_folder import release

    scorers.check_names([*config.weights])
    show_log()
    try:
        with parallel.joined("none") as ranks, ExitStack() as held:
            try:
                ranks.on_main(lambda: _check_places(config))
                ranks.on_main(lambda: held.enter_context(_hold_output(config)))
                source = ranks.on_all(lambda: _open(config))
                if _is_there(config, ranks, source):
                    return 0
                scoring = {"where": config.scorer_models, "cache_dir": config.cache_dir, "token": config.hub_token}
                loaded = ranks.on_all(
                    lambda: {name: scorers.load_scorer(name, ranks.device, **scoring) for name in config.weights}
                )
                with ExitStack() as scoring_alone:
                    ranks.on_main(lambda: scoring_alone.enter_context(_hold_scores(config)))
                    _relabel(config, ranks, source, loaded)
            except BadInput:
                if ranks.is_main:
                    with suppress(BadInput, OSError):
                        with locks.hold(config.scores, otherwise="leave it as it is"):
                            release(config.scores)
                        config.scores.rmdir()  # where nothing else is in it, once the lock is gone
                raise
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, "lower --batch_size") from error
    return 0


def _open(config: RelabelConfig) -> "Source":
    from dpo_fast.data import PairsSource, open_source

    source = PairsSource.of(config, max_rows=config.max_train_samples)
    return open_source(replace(source, label_column="none") if config.unlabelled else source)


def _check_places(config: RelabelConfig) -> None:
    """Refuse an output that would change what is read, that nobody may replace, or that cannot be written."""
    from dpo_fast.relabeling.labels import note_of

    if config.output.is_file() and not config.overwrite and note_of(config.output) is None:
        raise BadInput(f"--output {config.output} exists: name another file, or replace it with --overwrite")
    data, output = user_path(config.dataset_name), config.output.resolve()
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


def _hold_output(config: RelabelConfig) -> "Hold":
    """Hold the output, and clear away what a killed process left of it and of its counts."""
    from dpo_fast import locks
    from dpo_fast.files import remove_temporaries_of

    held = locks.hold_file(config.output, otherwise="wait until it is done, or name another --output")
    for path in (config.output, config.output.with_suffix(".json")):
        remove_temporaries_of(path)
    return held


def _hold_scores(config: RelabelConfig) -> "Hold":
    """Hold the folder of the scores, waiting for another process, and clear away what a killed one left."""
    from dpo_fast import locks
    from dpo_fast.files import remove_temporaries

    otherwise = "wait until it is done, or name another --scores_dir"
    held = locks.hold(config.scores, otherwise=otherwise, waiting=say)
    remove_temporaries(config.scores)
    return held


def _facts(config: RelabelConfig, ranks: "Ranks") -> dict[str, dict[str, str]]:
    """What the scorers are, by the files that are there now; the main rank's answer on every rank."""
    from dpo_fast import scorers

    files = {"where": config.scorer_models, "cache_dir": config.cache_dir}
    return ranks.from_main(lambda: {name: scorers.facts(name, ranks.device, **files) for name in config.weights})


def _request(config: RelabelConfig, source: "Source", facts: dict[str, dict[str, str]]) -> dict:
    """What the output follows from."""
    text = hashlib.blake2b(repr((source.captions(), source.labels())).encode(errors="replace"), digest_size=8)
    pairs = {"pairs": source.identity.rows, "stamp": source.identity.stamp, "captions and labels": text.hexdigest()}
    rule = {name: getattr(config, name) for name in ("temperature", "keep_fraction", "min_margin", "unlabelled")}
    return {**pairs, "scorers": facts, "weights": config.weights, **rule}


def _is_there(config: RelabelConfig, ranks: "Ranks", source: "Source") -> bool:
    """Whether the output is there, made by the same command; then it is shown. One made by another is refused."""
    from dpo_fast.relabeling.labels import as_text, check_output, note_of, write_counts

    facts = _facts(config, ranks)

    def look() -> bool:
        if config.overwrite or not config.output.is_file():
            return False
        existing, wanted = note_of(config.output), _request(config, source, facts)
        differing = [name for name in wanted if existing["request"].get(name) != wanted[name]]
        if differing:
            raise BadInput(
                f"--output {config.output} exists, made from other pairs, by other files of the scorers or with other"
                f" flags ({', '.join(differing)}): name another file, or replace it with --overwrite (scores that still"
                " hold are not made again)"
            )
        say(f"{config.output} is there already, made by the same command")
        check_output(config.output)
        write_counts(config.output, existing["report"])  # it may have been killed before
        print(as_text(existing["report"]), flush=True)
        return True

    return ranks.from_main(look)


def _relabel(config: RelabelConfig, ranks: "Ranks", source: "Source", scorers: dict[str, "Scorer"]) -> None:
    """Score, label, write. Every rank calls this; the main rank writes and says what came of it."""
    import numpy as np

    from dpo_fast.data import build_index, write_report
    from dpo_fast.output_folder import BAD_ROWS
    from dpo_fast.relabeling.labels import Rule, as_text, human_labels, label, report, write_counts, write_pairs
    from dpo_fast.relabeling.pair_scores import score_pairs
    from dpo_fast.scorers import provenance

    started = time.perf_counter()
    bad_report = config.scores / BAD_ROWS
    sets = ranks.on_all(
        lambda: build_index(
            source,
            seed=0,
            soft_labels=True,  # keep human ties: the scorer relabels them
            for_scorers=True,
            max_bad_fraction=config.max_bad_fraction,
            report_path=bad_report if ranks.is_main else None,
            progress=ranks.is_main,
        ),
    )
    captions = list(dict.fromkeys(sets.train.captions))
    ranks.on_all(lambda: [scorer.check(captions) for scorer in scorers.values()])
    facts = _facts(config, ranks)  # now that their files have been fetched
    say(f"{source.description}; by {', '.join(scorers)} on {ranks.world_size} x {ranks.device.type}")
    scores = score_pairs(
        source,
        sets.train,
        scorers,
        facts,
        config.scores,
        ranks,
        batch_size=config.batch_size,
        num_workers=config.dataloader_num_workers,
        max_bad_fraction=config.max_bad_fraction,
    )

    files = {"where": config.scorer_models, "cache_dir": config.cache_dir}

    def finish() -> None:
        bad = sorted([*sets.bad, *scores.bad])
        write_report(bad_report, bad)
        rule = Rule(config.weights, config.temperature, config.keep_fraction, config.min_margin)
        labels = label(scores, rule)
        human = [None] * len(source) if config.unlabelled else human_labels(source)
        known = None if config.unlabelled else np.array(human)[scores.rows]
        found = report(scores, labels, rule, known, rows=sets.rows, bad=len(bad))
        for name in config.weights:
            found["scorers"][name] |= {"made_by": provenance(name, ranks.device, **files)}
        note = {"request": _request(config, source, facts), "report": found}
        write_pairs(config.output, source, scores, labels, human, note, progress=True)
        write_counts(config.output, found)
        print(as_text(found), flush=True)
        soft = " --soft_labels" if config.temperature is not None else ""
        say(f"{scores.scored_now} pairs scored now, {time.perf_counter() - started:.0f} s")
        say(f"train on it with --dataset_name {config.output}{soft}; bad rows and scores are in {config.scores}")

    ranks.on_main(finish)


if __name__ == "__main__":
    leave(main())
