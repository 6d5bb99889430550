"""A plan whose candidates are right, wrong, slow, or end badly."""

import os
import signal
import sys
import threading
import time

from dpo_fast.choices.child import Disproved, Unusable


def start(arguments: dict) -> None:
    if arguments.get("exclusive"):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")


def prove(candidate: str, arguments: dict) -> float | None:
    if candidate == "wrong":
        raise Disproved(f"the sum is {arguments['sum'] + 1}")
    if candidate == "elsewhere":
        raise Unusable("needs another machine")
    if candidate == "raising":
        raise ValueError("no\nkernel")
    if candidate == "crashing":
        os.kill(os.getpid(), signal.SIGSEGV)
    if candidate == "leaving":
        os._exit(3)
    if candidate == "leaving well":
        os._exit(0)
    if candidate == "ending late":
        threading.Thread(target=time.sleep, args=(600,)).start()
    if candidate == "signed":
        os.kill(os.getpid(), signal.SIGRTMIN + 1)
    if candidate == "hanging":
        time.sleep(600)
    if candidate == "spinning":
        while True:
            pass
    if candidate == "hungry":
        held = []
        while True:
            held.append(bytearray(b"x" * (8 << 20)))
    if candidate == "talking":
        print('["proven", "wrong", null]')
        os.write(1, b"not JSON\n")
        sys.stdout.flush()
    return 60.0 if candidate == "compiling" else None


def times(candidates: list[str], arguments: dict) -> dict[str, tuple[float, list[float]]]:
    if arguments.get("timing crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if arguments.get("timing hangs"):
        time.sleep(600)
    seconds = arguments.get("seconds", {})
    return {name: (9.0, seconds.get(name, [1.0, 1.1, 1.2])) for name in candidates}
