"""Damaged files for every reader: the cases that were found once, and some new ones; `long` has many more."""

import sys
import time
from pathlib import Path

import pytest

from dpo_fast.errors import BadInput
from tests.fuzz import cases, long
from tests.fuzz.cases import CORPUS, Runner, from_json, to_json
from tests.fuzz.mutations import Special
from tests.fuzz.readers import READERS, Reader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses inotify and /proc")

QUICK = {name: max(4, round(20 * min(reader.weight, 3))) for name, reader in READERS.items()}


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*.json")), ids=lambda file: file.stem)
def test_what_was_found_once(file):
    name, changed = from_json(file.read_text(encoding="utf-8"))
    with Runner(name) as runner:
        assert runner.run(changed).wrong is None


@pytest.mark.parametrize("name", READERS)
def test_files_as_they_were_written_are_read(name):
    with Runner(name) as runner:
        outcome = runner.run({file: data for file, data in runner.files.items()})
        assert (outcome.kind, outcome.wrong) == ("read", None)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name, seed):
    wrong = []

    def note(changed, outcome) -> None:
        if outcome.wrong is not None:
            wrong.append((outcome.wrong, to_json(name, changed, outcome.wrong)))

    with Runner(name) as runner:
        long.run_batch(runner, seed, QUICK[name], note)
    assert not wrong, wrong[0]


# ---- the judge ---------------------------------------------------------------------------------------------------


def judged(monkeypatch, read, changed=None, **options) -> cases.Outcome:
    """What is said of a reader that does what `read` does, in a folder with one file `a.txt`."""
    monkeypatch.setitem(READERS, "judged", Reader(lambda f: (f / "a.txt").write_text("a"), read, 1, **options))
    with Runner("judged") as runner:
        return runner.run(changed or {})


def fail(error: BaseException):
    def read(folder, names) -> None:
        raise error

    return read


def test_named_errors_hold_and_others_do_not(monkeypatch):
    assert judged(monkeypatch, lambda folder, names: None).wrong is None
    for error in (BadInput("x"), IsADirectoryError(21, "x"), PermissionError(13, "x")):
        assert judged(monkeypatch, fail(error)).wrong is None
    for error in (KeyError("x"), RecursionError("x"), FileNotFoundError(2, "x"), MemoryError(), RuntimeError("x")):
        assert type(error).__name__ in judged(monkeypatch, fail(error)).wrong
    assert judged(monkeypatch, fail(KeyError("x")), named=(KeyError,)).wrong is None


def test_what_is_opened_outside_does_not_hold(monkeypatch):
    def outside(folder: Path, names) -> None:
        (folder / "../outside/a.txt").read_text()

    def elsewhere(folder: Path, names) -> None:
        Path("/etc/passwd").read_text()

    def by_another_language(folder: Path, names) -> None:
        import pyarrow as pa

        pa.OSFile(str(folder / "../outside/a.txt")).close()

    def inside(folder: Path, names) -> None:
        (folder / "a.txt").read_text()

    for read in (outside, elsewhere, by_another_language):
        assert "outside the folder" in judged(monkeypatch, read).wrong
    link = {"a.txt": Special("link", "../outside/a.txt")}
    assert judged(monkeypatch, inside).wrong is None
    assert judged(monkeypatch, inside, link).wrong is None
    assert "outside the folder" in judged(monkeypatch, inside, link, confined=("a",)).wrong


def test_what_does_not_end_does_not_hold(monkeypatch):
    monkeypatch.setattr(cases, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(cases, "SECONDS", 0.5)

    def spin(folder: Path, names) -> None:
        while True:
            pass

    def wait(folder: Path, names) -> None:
        (folder / "a.txt").read_text()

    assert "did not end" in judged(monkeypatch, spin).wrong
    assert "did not end" in judged(monkeypatch, wait, {"a.txt": Special("fifo")}).wrong
    assert "did not end" in judged(monkeypatch, lambda folder, names: time.sleep(5)).wrong


def test_what_takes_much_memory_does_not_hold(monkeypatch):
    def take(folder: Path, names) -> None:
        bytearray(b"x" * (1 << 28))  # twice 256 MiB: some kernels take cold pages away meanwhile

    outcome = judged(monkeypatch, take, peak_mib=32)
    assert "more than 32" in outcome.wrong and 32 < outcome.peak_mib < 600
    assert judged(monkeypatch, take, peak_mib=600).wrong is None


def test_a_case_is_kept_as_text():
    changed = {"a": b"\xff\0" * 100, "b": Special("link", "../x"), "c": Special("missing"), "d": b""}
    assert from_json(to_json("JSONL", changed, "x")) == ("JSONL", changed)


def test_a_seed_draws_the_same_cases_again(seed):
    drawn = []
    for _ in range(2):
        cases_of_this = []
        with Runner("scores") as runner:
            place = str(runner.place)
            long.run_batch(runner, seed, 20, lambda changed, outcome, to=cases_of_this: to.append(changed))
        drawn.append(repr(cases_of_this).replace(place, "PLACE").encode())
    assert len(drawn[0]) == len(drawn[1])


def test_the_cases_are_shared_out_among_the_readers():
    planned = long.plan(10_000, list(READERS), 1)
    for name, reader in READERS.items():
        share = 10_000 * reader.weight / sum(each.weight for each in READERS.values())
        assert sum(size for of, _, size in planned if of == name) == pytest.approx(share, abs=1)
    assert len({number for _, number, _ in planned}) == len(planned)
