"""Find the votes on an evaluation's images, and show them in its report: nothing else of it changes.

Votes are in `votes.sqlite` in the evaluation's folder, or in that of its run or protocol. Those on pairs of the same
two files count, whatever the session called its groups and models.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_fast import output_folder
from dpo_fast.checksums import read_signed_json, write_signed_json
from dpo_fast.data.image_files import THREADS
from dpo_fast.evaluation.comparison import write_report
from dpo_fast.evaluation.findings import SUMMARY
from dpo_fast.evaluation.pairing import ImagePairs
from dpo_fast.evaluation.people import People
from dpo_fast.evaluation.protocol import is_protocol
from dpo_fast.evaluation.reopened import AGAIN, home_of, names_of, reopen
from dpo_fast.files import read_bytes
from dpo_fast.votes.records import FILE as VOTES
from dpo_fast.votes.records import Vote
from dpo_fast.votes.store import ImageFile, VoteStore

OWN = ("run", "implicit", "step", "strength")  # in summary.json, besides the findings

logger = logging.getLogger(__name__)


def people_of(folder: Path, pairs: ImagePairs) -> People | None:
    """The votes on the pairs of the evaluation in `folder`; None without a file of votes on any of them.

    Votes on images that have changed since, as those of a run that was trained further have, do not count, and are
    logged. Raises BadInput for a file of votes that cannot be read.
    """
    above = folder.parent if is_protocol(folder.parent) else home_of(folder)
    files = [folder / VOTES, above / VOTES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    row = {
        (base.resolve(), policy.resolve()): k
        for k, (base, policy) in enumerate(zip(pairs.base.paths, pairs.policy.paths, strict=True))
    }
    with VoteStore.read(file) as store:
        settings, of_comparison, shown = store.settings(), store.files(), store.comparisons()
        votes, seen = store.votes(), store.image_files()
    row_of, turned = {}, set()
    for comparison, (first, second) in of_comparison.items():
        first, second = first.resolve(), second.resolve()
        if (place := row.get((first, second))) is not None:
            row_of[comparison] = place
        elif (place := row.get((second, first))) is not None:
            row_of[comparison] = place
            turned.add(comparison)
    voted = {vote.comparison for vote in votes}
    files = {path for comparison in row_of if comparison in voted for path in of_comparison[comparison]}
    changed = _changed({path: seen[path] for path in files if path in seen})
    gone = {comparison for comparison in row_of if changed.intersection(of_comparison[comparison])}
    if gone:
        logger.warning("%s: votes on %d pairs do not count, as their images have changed since", file, len(gone))
        row_of = {comparison: place for comparison, place in row_of.items() if comparison not in gone}
    if not row_of:
        return None
    votes = [vote for vote in votes if vote.comparison in row_of]
    asked = {vote.comparison: vote.prompt for vote in votes} | {one.id: one.prompt for one in shown if one.id in row_of}
    return People(
        [_as_here(vote, vote.comparison in turned, folder) for vote in votes],
        row_of,
        settings["questions"],
        settings["votes"],
        asked,
    )


def _changed(seen: Mapping[Path, ImageFile]) -> set[Path]:
    """The files that are not as they were when people saw them."""

    def is_changed(path: Path) -> bool:
        try:
            return path.stat().st_size != seen[path].size or ImageFile.of(read_bytes(path)) != seen[path]
        except OSError:
            return True

    with ThreadPoolExecutor(THREADS) as pool:
        return {path for path, changed in zip(seen, pool.map(is_changed, seen), strict=True) if changed}


def refresh(folder: Path) -> Path:
    """Write an evaluation's report and summary again, with the votes that are there now; return the report's folder.

    Raises BadInput, as `reopen`, for a folder whose files cannot be read.
    """
    home, found = home_of(folder), reopen(folder)
    findings = found.findings.with_people(people_of(folder, found.pairs), found.scored)
    with output_folder.hold(folder):
        before = read_signed_json(folder / SUMMARY, AGAIN)
        more = {name: before[name] for name in OWN if name in before}
        write_report(home, findings, found.scored, found.pairs, found.implicit)
        write_signed_json(folder / SUMMARY, findings.for_summary() | more)
        if home != folder:
            before = read_signed_json(home / SUMMARY, AGAIN)
            before.pop("people", None)
            write_signed_json(home / SUMMARY, before | findings.numbers())
    return home


def _as_here(vote: Vote, turned: bool, folder: Path) -> Vote:
    """The vote under the evaluation's names, its baseline the first model. turned: the vote has the policy first."""
    vote = vote._replace(group=folder.name, models=names_of(folder))
    return vote._replace(outcome=1 - vote.outcome, first_left=not vote.first_left) if turned else vote
