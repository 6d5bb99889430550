"""What has to hold when a command is killed, told to stop, or meets a failing disk; each check lists its findings."""

import errno
import json
import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from PIL import Image
from safetensors import safe_open

from tests.faults.commands import Case, Inputs, contents, differences
from tests.faults.server import CHANGING, KINDS, Call, Fault, Outcome, Server, Signal

DISK = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EBUSY", "ESTALE", "EMFILE")
# What the C library may answer on file systems without locks: another kind of lock does it there.
NO_LOCKS = ("ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL")
ERRNOS = {
    **dict.fromkeys(KINDS, DISK),
    "LOCK": (*NO_LOCKS, "EIO", "ESTALE", "EPERM"),
    "READ": ("EIO", "ESTALE"),
    "LIST": ("EIO", "ESTALE", "EACCES", "EMFILE"),
    "READ_OPEN": ("EIO", "ESTALE", "EACCES", "EPERM", "EMFILE"),
}
_PASSING = (".tmp-", ".lock")


@dataclass
class Finding:
    """One case: what was done, what came of it, and what should not have."""

    command: str
    done: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    faults: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n  ".join([f"{self.command}:", *self.done, *(f"WRONG {text}" for text in self.wrong)])


@dataclass(frozen=True)
class Whole:
    """What a command does in peace."""

    files: dict[str, bytes | str]
    calls: tuple[Call, ...]  # of all kinds, in its folder
    reads: tuple[Call, ...]  # of its inputs
    seconds: float


class Checks:
    """The checks, over one server and one set of inputs; what a command leaves in peace is found out once."""

    def __init__(self, server: Server, folder: Path, inputs: Inputs) -> None:
        self.server, self.folder, self.inputs = server, folder, inputs
        self._whole: dict[str, Whole] = {}
        self._number = 0

    def whole(self, name: str) -> "Whole":
        """What the command does in peace."""
        if name not in self._whole:
            runs = []
            for root in (None, self.inputs.folder):
                case = self.case(name)
                outcome = case.run(Fault(kinds=KINDS), root=root)
                if outcome.status:
                    raise RuntimeError(f"{name} ended with {outcome.status} in peace: {outcome.err}")
                runs.append((contents(case.folder), outcome))
                case.remove()
            (files, own), (again, reading) = runs
            if found := differences(files, again):
                raise RuntimeError(f"{name} does not write the same files twice: {found}")
            self._whole[name] = Whole(files, own.calls, reading.calls, reading.seconds)
        return self._whole[name]

    def case(self, name: str) -> Case:
        """The command in a new folder."""
        self._number += 1
        return Case(self.server, self.inputs, name, self.folder / f"case-{self._number}")

    def killed(self, name: str, chance: random.Random, most: int = 3) -> Finding:
        """Killed before or within some file system calls, a few times in a row, the same command ends as in peace."""
        finding, case = Finding(name), self.case(name)
        number = sum(call.kind in CHANGING for call in self.whole(name).calls)
        for _ in range(chance.randint(1, most)):
            fault = Fault(chance.choice(("kill", "kill", "tear")), chance.randint(1, number))
            outcome = case.run(fault)
            self._note(finding, f"{fault.mode} before call", outcome)
            finding.kills += outcome.status == -signal.SIGKILL
            if outcome.status not in (0, -signal.SIGKILL):
                finding.wrong.append(f"it ended with {outcome.status}: {_end_of(outcome)}")
                break
        return self._again(finding, case)

    def at_any_moment(self, name: str, chance: random.Random, number: int = signal.SIGKILL) -> Finding:
        """Sent a signal at a random moment, the same command ends as in peace."""
        finding, case = Finding(name), self.case(name)
        sent = Signal(number, chance.uniform(0, 1) * self.whole(name).seconds)
        outcome = case.run(signal=sent)
        self._note(finding, f"{signal.Signals(number).name} after {sent.after:.3f} s, in or after call", outcome)
        if outcome.status not in (0, -number, *[130] * (number != signal.SIGKILL)):
            finding.wrong.append(f"it ended with {outcome.status}: {_end_of(outcome)}")
        if "Traceback" in outcome.err:
            finding.wrong.append(f"a traceback: {_end_of(outcome)}")
        finding.kills += number == signal.SIGKILL and outcome.status == -signal.SIGKILL
        return self._again(finding, case)

    def disk_error(self, name: str, fault: Fault, *, of_inputs: bool = False) -> Finding:
        """After an error of the disk the command ends with 0, or with 2 and one line that names the path; the same
        command ends as in peace once the disk is well."""
        finding, case = Finding(name, faults=1), self.case(name)
        root = self.inputs.folder if of_inputs else case.folder
        outcome = case.run(fault, root=root)
        self._note(finding, f"{errno.errorcode.get(fault.error, '')} {fault.mode} at call", outcome, fault.at)
        failed = outcome.calls[fault.at - 1 :][: 1 if fault.mode == "once" else None]
        lines = [line for line in re.split("[\r\n]", outcome.err) if line.startswith("dpo_fast: error:")]
        if "Traceback" in outcome.err or outcome.status not in (0, 2):
            finding.wrong.append(f"it ended with {outcome.status}: {_end_of(outcome)}")
        elif outcome.status == 2 and len(lines) != 1:
            finding.wrong.append(f"{len(lines)} lines say what is wrong: {lines}")
        elif outcome.status == 2 and failed and not any(_names(lines[0], call.path, root) for call in failed):
            finding.wrong.append(f"the path is not named: {lines[0]}")
        elif outcome.status == 2:
            finding.done.append(lines[0])
        finding.wrong += half_written(case.folder)
        return self._again(finding, case)

    def short_writes(self, name: str) -> Finding:
        """Where every write takes half of its bytes the results are the same."""
        finding, case = Finding(name, faults=1), self.case(name)
        outcome = case.run(Fault("short", 1, kinds=("WRITE",)))
        self._note(finding, "short writes up to call", outcome)
        if outcome.status:
            finding.wrong.append(f"it ended with {outcome.status}: {_end_of(outcome)}")
        return self._again(finding, case)

    def errors(self, name: str) -> list[tuple[str, str, bool]]:
        """Every kind of call that the command makes with every error it may meet, and whether inputs are read by it."""
        whole = self.whole(name)
        made = [(kind, False) for kind in KINDS if any(call.kind == kind for call in whole.calls)]
        made += [(kind, True) for kind in KINDS if any(call.kind == kind for call in whole.reads)]
        return [(kind, error, of_inputs) for kind, of_inputs in made for error in ERRNOS[kind]]

    def fault(self, name: str, kind: str, error: str, chance: random.Random, *, of_inputs: bool = False) -> Fault:
        """That error at a random call of the kind, once or from then on."""
        calls = self.whole(name).reads if of_inputs else self.whole(name).calls
        number = sum(call.kind == kind for call in calls)
        return Fault(chance.choice(("once", "always")), chance.randint(1, number), getattr(errno, error), (kind,))

    def _note(self, finding: Finding, what: str, outcome: Outcome, at: int | None = None) -> None:
        calls = outcome.calls[: at or None]
        finding.seconds += outcome.seconds
        finding.done.append(f"{what} {calls[-1] if calls else 'none'}; status {outcome.status}")

    def _again(self, finding: Finding, case: Case) -> Finding:
        """The same command line once more, without a fault."""
        finding.wrong += [text for text in half_written(case.folder) if text not in finding.wrong]
        outcome = case.run()
        finding.seconds += outcome.seconds
        if outcome.status:
            finding.wrong.append(f"the same command then ended with {outcome.status}: {_end_of(outcome)}")
        else:
            finding.wrong += differences(self.whole(finding.command).files, contents(case.folder))
        if not finding.wrong:
            case.remove()
        return finding


def half_written(folder: Path) -> list[str]:
    """Files of a final name that cannot be read. What is appended to may end in half a line."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        passing = any(part.startswith(_PASSING) for part in inside.parts)
        if path.is_file() and path.suffix in _READERS and not passing:
            try:
                _READERS[path.suffix](path)
            except Exception as error:
                found.append(f"half-written: {inside} ({error!r})")
    return found


def _safetensors(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            file.get_tensor(name)


def _png(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


_READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".parquet": pq.read_table,
    ".safetensors": _safetensors,
    ".png": _png,
}


def _end_of(outcome: Outcome) -> str:
    """What it said last; where it had to be ended, all of it, which says where its threads were."""
    lines = [line.strip() for line in outcome.err.splitlines() if line.strip()]
    return "\n".join(lines) if outcome.status is None else " | ".join(lines[-4:])[-600:]


def _names(line: str, path: str, root: Path) -> bool:
    """Whether a line names a file or a folder that it is in, as a path of its own, from the root or absolute.

    A temporary file may have the name that it would have got.
    """
    full = Path(re.sub(r"/\.tmp-[^/-]+-", "/", path.removesuffix(" (deleted)")))
    if full == root:
        return True  # it is the run's current folder
    given = Path(path)
    places = {place for end in (full, given) for place in (end, *end.parents) if root in place.parents}
    names = [str(name) for place in places for name in (place, place.relative_to(root))]
    return any(re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w.-])", line) for name in names)
