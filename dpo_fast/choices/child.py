"""The process that a plan's candidates are proven or timed in: reads a request from stdin, answers in lines of JSON.

Each answer is [kind, candidate, value]: began; proven; disproved, unusable or failed, with the reason; timed, with
seconds. After a candidate that was disproved or failed the process ends: it may have left a broken CUDA context.
"""

import json
import os
import sys
import threading
from importlib import import_module
from typing import Any


class Disproved(Exception):
    """A candidate's result is not what it must be; the message says which one and how far off."""


class Unusable(Exception):
    """A candidate cannot run on this machine; the message says why."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not stand among the answers
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    plan, candidates, arguments = import_module(request["plan"]), request["candidates"], request["arguments"]

    def answer(kind: str, candidate: str, value: Any = None) -> None:
        answers.write(json.dumps([kind, candidate, value]) + "\n")
        answers.flush()

    if request["task"] == "times":
        answer("began", "")
        for candidate, seconds in plan.times(candidates, arguments).items():
            answer("timed", candidate, seconds)
        return
    for candidate in candidates:
        answer("began", candidate)
        try:
            plan.prove(candidate, arguments)
        except Unusable as error:
            answer("unusable", candidate, str(error))
        except Disproved as error:
            answer("disproved", candidate, str(error))
            return
        except Exception as error:  # whatever it raises, it cannot be used
            answer("failed", candidate, f"{type(error).__name__}: {error}")
            return
        else:
            answer("proven", candidate)


def _end_with_parent() -> None:
    """End this process once the parent is gone: then the other end of stdin is closed."""
    sys.stdin.read()
    os._exit(1)
