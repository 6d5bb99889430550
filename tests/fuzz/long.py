"""Many damaged files for every reader: `python -m tests.fuzz.long --cases 200000 --seed N --json FILE`.

Prints figures for each reader. Exit status 1 where something did not hold; such cases are written to --corpus, the
first of each kind, and `pytest tests/fuzz` replays what is in tests/fuzz/corpus. A seed draws the same cases again.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.cases import CORPUS, MEMORY, SECONDS, Outcome, Runner, from_json, limit_memory, save, to_json
from tests.fuzz.readers import READERS

BATCH = 400  # cases drawn from one seed
AT_ONCE = 8  # cases that Hypothesis draws as one example: it takes longer over an example than most readers over a case


def plan(cases: int, names: list[str], first: int) -> list[tuple[str, int, int]]:
    """(reader, seed, number of cases) of every batch, readers mixed."""
    total = sum(READERS[name].weight for name in names)
    batches = []
    for name in names:
        left = max(1, round(cases * READERS[name].weight / total))
        batches += [(name, min(BATCH, left - start)) for start in range(0, left, BATCH)]
    random.Random(first).shuffle(batches)
    return [(name, first * 1_000_003 + number, size) for number, (name, size) in enumerate(batches)]


def run_batch(runner: Runner, number: int, cases: int, note, before=None) -> None:
    """Run cases drawn from a seed. before, note: called with the changes, and then with them and the outcome."""

    left = cases

    @seed(number)
    @settings(
        max_examples=-(-cases // AT_ONCE),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(runner.strategy(), min_size=AT_ONCE, max_size=AT_ONCE))
    def each(several) -> None:
        nonlocal left
        for changed in several[: max(left, 0)]:
            left -= 1
            if before is not None:
                before(changed)
            note(changed, runner.run(changed))

    each()


def work(batches, answers: Connection, now: Path) -> None:
    """A process: run batches until there are none. `now` holds the case that runs, for when the process dies of it."""
    try:
        _work(batches, answers, now)
    except BaseException:
        answers.send(traceback.format_exc())


def _work(batches, answers: Connection, now: Path) -> None:
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), 2)
    limit_memory()
    for name, number, cases in iter(batches.get, None):
        with Runner(name) as runner:

            def before(changed, name: str = name) -> None:
                now.write_bytes(pickle.dumps((name, changed)))

            def note(changed, outcome: Outcome, name: str = name) -> None:
                text = to_json(name, changed, outcome.wrong) if outcome.wrong else None
                answers.send((name, outcome, text))

            run_batch(runner, number, cases, note, before)
    answers.send(None)


class Figures:
    """What was found, reader by reader."""

    def __init__(self, names: list[str], corpus: Path) -> None:
        self.readers = {
            name: {"cases": 0, "kinds": Counter(), "seconds": 0.0, "slowest": 0.0, "peak_mib": 0.0, "wrong": 0}
            for name in names
        }
        self.corpus, self.wrong = corpus, Counter()

    def note(self, name: str, outcome: Outcome, text: str | None) -> None:
        of = self.readers[name]
        of["cases"] += 1
        of["kinds"][outcome.kind] += 1
        of["seconds"] += outcome.seconds
        of["slowest"] = max(of["slowest"], outcome.seconds)
        of["peak_mib"] = max(of["peak_mib"], outcome.peak_mib)
        if text is not None:
            of["wrong"] += 1
            kind = f"{name}: {_without_values(outcome.wrong)}"
            self.wrong[kind] += 1
            if self.wrong[kind] == 1:
                file = save(self.corpus, *from_json(text), outcome.wrong)
                print(f"WRONG {name}: {outcome.wrong!a}\n      {file}", flush=True)

    def table(self) -> str:
        lines = [
            "| reader | cases | read | refused | slowest (s) | peak (MiB) | wrong |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, of in self.readers.items():
            read = of["kinds"]["read"]
            numbers = f"{of['cases']} | {read} | {of['cases'] - read - of['wrong']}"
            lines.append(f"| {name} | {numbers} | {of['slowest']:.2f} | {of['peak_mib']:.0f} | {of['wrong']} |")
        return "\n".join(lines)


def _without_values(wrong: str) -> str:
    """The kind of an error: its type and place, without what the message says of this case."""
    head, _, place = wrong.rpartition("; ")
    return f"{head.partition(':')[0]} at {place}" if head else wrong.partition(":")[0]


def main() -> int:
    """Run, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=200_000, help="in all, shared out among the readers by what they cost"
    )
    parser.add_argument("--seed", type=int, help="of all draws; left out: drawn and printed")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder for cases that did not hold")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    options.corpus.mkdir(parents=True, exist_ok=True)
    print(f"seed {first}", flush=True)
    started = time.monotonic()
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    batches = context.SimpleQueue()
    planned = plan(options.cases, options.readers, first)
    figures = Figures(options.readers, options.corpus)
    folder = Path(MEMORY or tempfile.gettempdir())
    workers: dict[Connection, tuple] = {}
    heard: dict[Connection, float] = {}

    def begin() -> None:
        answers, other = context.Pipe(duplex=False)
        now = folder / f"dpo_fast-fuzz-case-{os.getpid()}-{len(begun)}.json"
        begun.append(now)
        process = context.Process(target=work, args=(batches, other, now), daemon=True)
        process.start()
        other.close()
        workers[answers], heard[answers] = (process, now), time.monotonic()

    begun: list[Path] = []
    waiting = iter([*planned, *[None] * options.processes])
    for _ in range(options.processes):
        begin()
    shown = 0
    threading.Thread(target=lambda: [batches.put(batch) for batch in waiting], daemon=True).start()
    while workers:
        for answers in wait(list(workers), timeout=SECONDS):
            heard[answers] = time.monotonic()
            try:
                answer = answers.recv()
            except EOFError:  # the process died of its case
                process, now = workers.pop(answers)
                process.join()
                name, changed = pickle.loads(now.read_bytes())
                wrong = f"the process died, exit status {process.exitcode}; at an unknown place"
                figures.note(name, Outcome("died", wrong, 0.0, 0.0), to_json(name, changed, wrong))
                begin()
                continue
            if isinstance(answer, str):
                raise RuntimeError(f"a process failed: {answer}")
            if answer is None:
                workers.pop(answers)[0].join()
            else:
                figures.note(*answer)
        for answers, (process, _) in workers.items():
            if time.monotonic() - heard[answers] > 2 * SECONDS:
                process.kill()  # then seen as one that died
        done = sum(of["cases"] for of in figures.readers.values())
        if done >= shown + 2_000:
            shown = done
            print(f"{done} cases, {time.monotonic() - started:.0f} s", flush=True)
            _write(options.json, figures, first, time.monotonic() - started)
    print(figures.table())
    kinds = sum((of["kinds"] for of in figures.readers.values()), Counter())
    print(f"{time.monotonic() - started:.0f} s; kinds: {dict(kinds)}")
    _write(options.json, figures, first, time.monotonic() - started)
    for now in begun:
        now.unlink(missing_ok=True)
    return 1 if figures.wrong else 0


def _write(path: Path | None, figures: Figures, first: int, seconds: float) -> None:
    if path is not None:
        found = {"seed": first, "seconds": seconds, "readers": figures.readers, "wrong": figures.wrong}
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
