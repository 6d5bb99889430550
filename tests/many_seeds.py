"""Run the tests under many seeds; print which failed under which.

python -m tests.many_seeds 20                          all tests, exhaustive ones too, under the seeds 1 to 20
python -m tests.many_seeds 3,7-20                      under the seeds 3 and 7 to 20
python -m tests.many_seeds 20 tests/kernels -n 0       further arguments are pytest's

The first seed runs everything and shows which tests draw from the seed; the others run only those, since the rest
would do the same again. The exit status is 1 where a test failed.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.helpers.seeds import DRAWS


def run(seed: int, arguments: list[str]) -> tuple[set[str], dict[str, str]]:
    """Run pytest under one seed. Return the ids of the tests that drew, and of each failed one its last line."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "--seed", str(seed), f"--junitxml={report}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if not report.is_file():
            sys.exit(f"pytest did not run under seed {seed}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    drew, failed = set(), {}
    for case in cases:
        ids = [of.get("value") for of in case.iter("property") if of.get("name") == DRAWS]
        drew |= set(ids)
        for problem in (*case.iter("failure"), *case.iter("error")):
            name = ids[0] if ids else f"{case.get('classname')}::{case.get('name')}"
            failed[name] = (problem.get("message") or "no message").strip().splitlines()[0]
    print(
        f"seed {seed}: {len(cases)} tests, {len(drew)} draw, {len(failed)} failed",
        *(f"{name}: {message}" for name, message in sorted(failed.items())),
        sep="\n    ",
        flush=True,
    )
    return drew, failed


def seeds_of(given: str) -> list[int]:
    """The seeds that `given` names: a number N stands for 1 to N, a list for its seeds and ranges; none if neither."""
    if given.isdecimal():
        return [*range(1, int(given) + 1)]
    seeds: list[int] = []
    for part in given.split(","):
        first, _, last = part.rpartition("-")
        if not last.isdecimal() or not (first or last).isdecimal():
            return []
        seeds += range(int(first or last), int(last) + 1)
    return seeds


def main(arguments: list[str]) -> int:
    seeds, given = seeds_of((arguments or [""])[0]), arguments[1:]
    if not seeds:
        sys.exit("usage: python -m tests.many_seeds NUMBER|SEED,FIRST-LAST,... [arguments of pytest]")
    options = [one for one in given if not Path(one.split("::")[0]).exists()]  # the rest selects tests
    failures: dict[str, dict[int, str]] = {}  # test -> seed -> message
    chosen = given
    for seed in seeds:
        drew, failed = run(seed, chosen)
        for name, message in failed.items():
            failures.setdefault(name, {})[seed] = message
        if seed == seeds[0]:
            chosen = [*sorted(drew), *options]
            if not drew:
                break
    for name, messages in sorted(failures.items()):
        print(f"{name}: failed under {len(messages)} of {len(seeds)} seeds")
        for seed, message in messages.items():
            print(f"    {seed}: {message}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
