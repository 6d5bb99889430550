"""The output folder of a command: held while the command writes, and claimed by a signed record of its purpose."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_fast import locks
from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.errors import BadInput
from dpo_fast.files import contents, remove_temporaries

LONGEST = 80  # characters of a value in an error
BAD_ROWS = "bad_rows.jsonl"  # a report that is written before anything else


def hold(folder: Path) -> locks.Hold:
    """Hold `folder`; do so before claiming it, and until its last file is written.

    Raises BadInput if another process, which is named, holds the folder, or if it cannot be written.
    """
    try:
        refuse_file(folder)
        return locks.hold(folder, otherwise="wait until it is done, or name another --output_dir")
    except OSError as error:
        raise not_writable(folder, error) from error


def is_free(folder: Path) -> bool:
    """Whether a folder is missing or holds no more than locks, temporaries and a report of bad rows."""
    return all(entry.name == BAD_ROWS for entry in contents(folder))


def read_record(folder: Path, record: str, names: Iterable[str] = ()) -> dict[str, Any] | None:
    """Return the content of `folder`'s file `record`, or None. Raises Damaged, also if one of `names` is missing."""
    if not (folder / record).is_file():
        return None
    return read_signed_json(folder / record, "put it back from a copy, or name another --output_dir", names)


def claim(
    folder: Path,
    record: str,
    content: Mapping[str, Any],
    *,
    what: str,
    key: str | None = None,
    names: Iterable[str] = (),
) -> None:
    """Claim `folder`, which is held, for `content`, or resume it; delete what killed processes left half-written.

    If the file `record` is missing, `content` is written to it; otherwise the two must be equal, all of them or only
    their part `key`. Raises BadInput if the folder holds anything else, and, listing the differences, if its record
    differs; `what` names what the folder is to hold ("images"). Raises Damaged for a record that cannot be read.
    """
    before = read_record(folder, record, [*names] if key is None else [*names, key])
    now = json.loads(json.dumps(content))
    if before is None:
        if not is_free(folder):
            raise BadInput(f"--output_dir {folder} is not empty and holds no {record}; name another folder")
        write_signed_json(folder / record, now)
    elif found := differences(*((of if key is None else of[key]) for of in (before, now))):
        raise BadInput(
            f"--output_dir {folder} holds {what} of other settings ({'; '.join(found)}); give the same, or name"
            " another folder"
        )
    remove_temporaries(folder)


def differences(before: object, now: object, name: str = "") -> list[str]:
    """List what differs between two settings, as `name: X before, Y now`."""
    if isinstance(before, list) and isinstance(now, list) and max(len(str(before)), len(str(now))) > LONGEST:
        gone, new = ([word for word in one if word not in other] for one, other in ((before, now), (now, before)))
        before, now = " ".join(map(str, gone)) or "nothing", " ".join(map(str, new)) or "nothing"
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {**before, **now}
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if before == now else [f"{name}: {_short(before)} before, {_short(now)} now".removeprefix(": ")]


def _short(value: object) -> str:
    text = ", ".join(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def refuse_file(folder: Path) -> None:
    """Raise BadInput if `folder` is a file."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--output_dir {folder} is a file; name a folder")


def not_writable(folder: Path, error: OSError) -> BadInput:
    """Return a disk error in `folder` as BadInput."""
    return BadInput(f"--output_dir {folder} cannot be written ({error.strerror or error}); name a folder that can")
