"""Kills and disk errors in large numbers: `python -m tests.faults.long --kills 500 --json FILE`.

Each kill is before or in the middle of a random file system call, or at a random moment. Exit status 1 where something
did not hold; a folder where it did not is kept.
"""

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.checks import Checks, Finding
from tests.faults.commands import COMMANDS, write_inputs
from tests.faults.server import Server


def main() -> int:
    """Run, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="SIGKILLs in all, shared out among the commands")
    parser.add_argument("--faults", type=int, default=300, help="disk errors in all")
    parser.add_argument("--signals", type=int, default=60, help="SIGTERMs and SIGINTs in all")
    parser.add_argument("--seed", type=int, help="of all draws; left out: drawn and printed")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--folder", type=Path, help="where to work; left out: a temporary folder")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dpo_fast-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, in {folder}", flush=True)

    started = time.monotonic()
    server = Server(folder)
    checks = Checks(server, folder, write_inputs(server, folder / "inputs"))
    totals = {name: Counter() for name in options.commands}
    wrong: list[Finding] = []
    number = len(options.commands)
    for place, name in enumerate(options.commands):
        chance, count = random.Random(f"{seed} {name}"), totals[name]

        def share(of_all: int, place: int = place) -> int:
            return of_all // number + (place < of_all % number)

        def note(kind: str, finding: Finding, count: Counter = count) -> None:
            count.update({kind: finding.kills if kind == "kills" else 1, "runs": len(finding.done), "cases": 1})
            count["seconds"] += finding.seconds
            if finding.wrong:
                count["wrong"] += 1
                wrong.append(finding)
                print(finding, flush=True)

        while count["kills"] < share(options.kills):
            left = share(options.kills) - count["kills"]
            if chance.random() < 0.25:
                note("kills", checks.at_any_moment(name, chance))
            else:
                note("kills", checks.killed(name, chance, most=min(3, left)))
        for _ in range(share(options.signals)):
            note("signals", checks.at_any_moment(name, chance, chance.choice((signal.SIGTERM, signal.SIGINT))))
        if options.faults:
            note("faults", checks.short_writes(name))
        errors = checks.errors(name)
        chance.shuffle(errors)
        for (kind, error, of_inputs), _ in zip(itertools.cycle(errors), range(share(options.faults) - 1), strict=False):
            fault = checks.fault(name, kind, error, chance, of_inputs=of_inputs)
            note("faults", checks.disk_error(name, fault, of_inputs=of_inputs))
        print(f"{name}: {dict(count)}; {time.monotonic() - started:.0f} s", flush=True)
    server.close()
    sums = sum(totals.values(), Counter())
    print(f"in all: {dict(sums)}; {time.monotonic() - started:.0f} s")
    if options.json is not None:
        found = [{"command": f.command, "done": f.done, "wrong": f.wrong} for f in wrong]
        figures = {"seed": seed, "seconds": time.monotonic() - started, "commands": totals, "wrong": found}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
