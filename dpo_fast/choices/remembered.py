"""What trials found on this machine, kept in the cache folder, so that the next run starts at once."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_fast.checksums import Damaged, read_signed_json, write_signed_json
from dpo_fast.choices.trial import Evidence

FOLDER = "choices"
_NAMES = ("about", "evidence")

logger = logging.getLogger(__name__)


def recall(root: Path, about: dict[str, Any]) -> Evidence | None:  # about: its "candidates" and all else that counts
    """Return what an earlier trial found about the same question on an equal machine; None if there was none."""
    file = _file(root, about)
    try:
        if not file.is_file():
            return None
        found = read_signed_json(file, "delete it, and the next run proves anew", _NAMES)
        evidence = Evidence(**found["evidence"])
    except (Damaged, OSError, TypeError, ValueError) as error:
        logger.warning("%s is not used (%s): the candidates are proven anew", file, error)
        return None
    same = found["about"] == json.loads(json.dumps(about)) and set(evidence.reasons) == set(about["candidates"])
    return evidence if same else None


def remember(root: Path, about: dict[str, Any], evidence: Evidence) -> None:
    """Keep what a trial found, if another would find the same."""
    if not evidence.final:
        return
    file = _file(root, about)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_signed_json(file, {"about": about, "evidence": asdict(evidence)})
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next run proves anew", file, error.strerror or error)


def _file(root: Path, about: dict[str, Any]) -> Path:
    text = json.dumps(about, sort_keys=True)
    return root / FOLDER / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.json"
