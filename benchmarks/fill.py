"""Fills the tables of README and docs from results, so that no number in them is typed.

    python -m benchmarks.fill [FILE] [--check]

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`; benchmarks/tables.py renders it from
benchmarks/results/ and, what a GPU measured, from FILE, a JSON of benchmarks/gpu_report.py. Left out it is the newest
such file in benchmarks/results/; without any the GPU's cells say `not measured`. With FILE, sentences elsewhere that
may no longer hold are listed: they are for you to change.

`--check` writes nothing; exit status 1 where a table is not what the results give.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.tables import TABLES, Sources

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("kernels", "performance", "reference_cache", "step_time")))
_TABLE = re.compile(r"<!-- table ([\w-]+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)
_UNMEASURED = re.compile(r"(?:not|never|neither\b.*) (?:yet )?(?:been )?(?:measured|run|tried)", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a JSON of benchmarks/gpu_report.py")
    parser.add_argument("--check", action="store_true", help="only say whether the tables are what the results give")
    arguments = parser.parse_args()
    try:
        sources = sources_of(ROOT, arguments.file)
        changed = fill(ROOT, sources, write=not arguments.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name in changed:
        print(f"{name}: {'is not what the results give' if arguments.check else 'filled'}")
    if arguments.file is not None:
        for line in doubtful(ROOT):
            print(f"does this still hold? {line}")
        if arguments.file.resolve().parent != (ROOT / "benchmarks" / "results").resolve():
            print("copy the file to benchmarks/results/ too, or --check will miss it")
    return 1 if arguments.check and changed else 0


def sources_of(root: Path, file: Path | None = None) -> Sources:
    """Return the committed results and a GPU's report: `file`, or the newest committed one.

    Raises ValueError for a file that cannot be read or is not a GPU's report.
    """
    folder = root / "benchmarks" / "results"
    reports = {path: _report(path) for path in (sorted(folder.glob("*.json")) if file is None else [file])}
    reports = {path: report for path, report in reports.items() if report}
    if file is not None and not reports:
        raise ValueError(f"{file} is not the report of a GPU: give a JSON that benchmarks/gpu_report.py wrote there")
    newest = max(reports, key=lambda path: reports[path]["started"], default=None)
    return Sources(folder, reports[newest], newest.name) if newest else Sources(folder)


def _report(path: Path) -> dict | None:
    """Return the report in a file; None if it is other JSON, or a report of the stand-ins on a CPU."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): name a file that exists") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): give a file of benchmarks/gpu_report.py") from error
    return value if isinstance(value, dict) and "stages" in value and value.get("device") == "cuda" else None


def fill(root: Path, sources: Sources, *, write: bool) -> list[str]:
    """Render every table of the documents; return the names of those that change.

    Raises ValueError for an unknown table, a missing table, or markers without their partner.
    """
    changed, seen = [], set()
    for document in DOCUMENTS:
        path = root / document
        before = path.read_text(encoding="utf-8")

        def rendered(match: re.Match, document: str = document) -> str:
            name, old = match[1], match[2]
            if name not in TABLES:
                raise ValueError(f"{document} has a table {name!r}: choose from {', '.join(TABLES)}")
            seen.add(name)
            new = TABLES[name](sources) + "\n"
            if new != old:
                changed.append(f"{document}, table {name}")
            return f"<!-- table {name} -->\n{new}<!-- end {name} -->"

        after = _TABLE.sub(rendered, before)
        if markers := len(re.findall(r"<!-- (?:table|end) ", after)) - 2 * len(_TABLE.findall(after)):
            raise ValueError(f"{document} has {markers} markers of tables without their partner: mend them")
        if write and after != before:
            path.write_text(after, encoding="utf-8")
    if missing := [name for name in TABLES if name not in seen]:
        raise ValueError(f"no document has the table {missing[0]}: put its markers where it belongs")
    return changed


def doubtful(root: Path) -> list[str]:
    """Return the lines outside the tables that say something was not measured."""
    lines = []
    for document in DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        inside = {
            text.count("\n", 0, m.start()) + n for m in _TABLE.finditer(text) for n in range(m[0].count("\n") + 1)
        }
        for number, line in enumerate(text.splitlines()):
            if number not in inside and _UNMEASURED.search(line):
                lines.append(f"{document}:{number + 1}: {line.strip()}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
