"""The process that a plan's candidates are proven and timed in: reads a request from stdin, answers in lines of JSON.

Each answer is [kind, candidate, value]: unstartable, with the reason; began; proven, with the seconds of the first
call where the proof knows them; disproved, unusable, failed or skipped, with the reason; timing; timed, with the
seconds of the first call and of later rounds. After a candidate that was disproved or failed the process ends: it may
have left a broken CUDA context.
"""

import json
import os
import sys
import threading
import time
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
    plan, arguments, began = import_module(request["plan"]), request["arguments"], time.monotonic()

    def answer(kind: str, candidate: str = "", value: Any = None) -> None:
        answers.write(json.dumps([kind, candidate, value]) + "\n")
        answers.flush()

    try:
        plan.start(arguments)
    except Exception as error:  # the device may be exclusive to another process
        answer("unstartable", value=_said(error))
        return
    proven = []
    for candidate in request["candidates"]:
        if time.monotonic() - began > request["seconds"]:
            answer("skipped", candidate, "there was no time left for it")
            continue
        answer("began", candidate)
        try:
            first = plan.prove(candidate, arguments)
        except Unusable as error:
            answer("unusable", candidate, str(error))
        except Disproved as error:
            answer("disproved", candidate, str(error))
            return
        except Exception as error:  # whatever it raises, it cannot be used
            answer("failed", candidate, _said(error))
            return
        else:
            answer("proven", candidate, first)
            proven.append(candidate)
    timed = [*request["timed"], *proven]
    if request["timed"] and len(timed) > 1:
        answer("timing")
        for candidate, times in plan.times(timed, arguments).items():
            answer("timed", candidate, times)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """End this process once the parent is gone: then the other end of stdin is closed."""
    sys.stdin.read()
    os._exit(1)
