"""A piece of work that is killed before one of its calls to the file system."""

import os
import sys
from collections.abc import Callable, Iterator

CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.utime")


def killed_before_each_call(prepare: Callable[[], None], work: Callable[[], None]) -> Iterator[int]:
    """`prepare`, then `work` killed before its k-th call to the file system, for every k until it comes to its end.

    Yields k after each kill, with the files as the kill left them; no `finally` and no handler ran.
    """
    for k in range(1, 1000):
        prepare()
        if _runs_to_its_end(work, k):
            return
        yield k
    raise AssertionError("1,000 calls and no end")


def _runs_to_its_end(work: Callable[[], None], k: int) -> bool:
    child = os.fork()
    if child == 0:
        left = k

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in CALLS:
                left -= 1
                if left == 0:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    return status == 0
