"""Read the results of a stage from its JSON file or its log. All functions take (file, log)."""

import json
import re
from pathlib import Path

from benchmarks.gpu.outcomes import summary


def nothing(file: Path, log: str) -> None:
    """Read nothing, for stages whose exit status and log say everything."""


def json_file(file: Path, log: str) -> object:
    """Return what the stage has written so far; None if nothing."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def tests(file: Path, log: str) -> dict[str, object] | None:
    """Return the counts and failures of a pytest run; None if it never began."""
    return summary(file) if file.exists() else None


def named_lines(file: Path, log: str) -> dict[str, str]:
    """Return the log lines of the form `name: value`."""
    pairs = (line.split(": ", 1) for line in log.splitlines() if re.match(r"[\w ]+: ", line))
    return {name: value for name, value in pairs}


def sanitizer(file: Path, log: str) -> dict[str, object]:
    """Return the number of errors and hazards that compute-sanitizer found, and the results of the tests it ran."""
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", log)
    found = [*errors, *map(int, hazards)]
    return {"errors": sum(found) if found else None, "tests": tests(file, log)}
