"""Summaries of a file of votes, made by a process of their own: voters must not wait for statistics.

`python -m dpo_fast.voting.summaries FILE` writes one line of JSON for each line that it reads, and ends when there are
no more: also when the server that started it was killed.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_fast.errors import BadInput
from dpo_fast.votes.store import VoteStore

SECONDS = 50.0  # for one summary, the start of the process included
NICER = 5  # than the server


class Summaries:
    """The process for one file, started when it is first needed. One thread at a time uses it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen | None = None

    def make(self) -> dict[str, Any]:
        """Return the summary of the votes that are in the file now. Raises BadInput if none can be made."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "dpo_fast.voting.summaries", str(self._path.absolute())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self._process
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            line = b""
        finally:
            late.cancel()
        if not line:
            process.kill()
            raise BadInput("the results could not be computed; the lines above say why, if there are any")
        summary = json.loads(line)
        if "error" in summary:
            raise BadInput(summary["error"])
        return summary

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    pipe.close()


def summary_of_file(path: Path) -> dict[str, Any]:
    """Return what `tally.summary_of` says of a file. Raises BadInput for one that cannot be read."""
    from dpo_fast.votes.tally import summary_of  # a second

    with VoteStore.read(path) as store:
        return summary_of(store.votes(excluded=True), store.checks(), store.settings(), store.excluded())


def main() -> None:
    """Answer until there are no more requests."""
    if hasattr(os, "nice"):
        os.nice(NICER)
    path = Path(sys.argv[1])
    with suppress(KeyboardInterrupt):  # Ctrl-C reaches all processes of a terminal; the server ends this one
        for _ in sys.stdin.buffer:
            try:
                answer = summary_of_file(path)
            except BadInput as error:
                answer = {"error": str(error)}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
