"""A pytest plugin that writes test outcomes to a file as they happen, so that a killed run leaves them too.

python -m pytest -p benchmarks.gpu.outcomes --outcomes FILE ...
"""

import json
from pathlib import Path

import pytest

_MESSAGE = 500  # characters kept of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write a line of JSON for each start and each result of a test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # with pytest-xdist only the main process
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def _write(self, **line: object) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, event="start")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        message = report.longreprtext[-_MESSAGE:] if report.failed else ""
        self._write(test=report.nodeid, event=report.when, outcome=report.outcome, message=message)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(test=report.nodeid, event="collect", outcome="failed", message=report.longreprtext[-_MESSAGE:])

    def pytest_sessionfinish(self) -> None:
        self.file.close()


def summary(path: Path) -> dict[str, object]:
    """Return counts of passed, failed and skipped tests, each failure's message, and the tests that never ended."""
    results: dict[str, str] = {}
    failures: dict[str, str] = {}
    started, ended = [], set()
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        test, event = line["test"], line["event"]
        if event == "start":
            started.append(test)
            continue
        if line["outcome"] == "failed":
            results[test], failures[test] = "failed", line["message"]
        elif event == "call" or line["outcome"] == "skipped":
            results.setdefault(test, line["outcome"])
        if event == "teardown":
            ended.add(test)
    counts = {kind: list(results.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    return {**counts, "failures": failures, "unfinished": [test for test in started if test not in ended]}
