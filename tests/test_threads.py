"""Work that runs ahead in threads: values in order, few waiting, and within some bytes where sizes are known."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpo_fast import threads
from dpo_fast.threads import Sized, ahead


class Counted:
    """Plans that count how many of their values nobody has taken yet, and the bytes of these."""

    def __init__(self) -> None:
        self.lock, self.held, self.held_bytes, self.most, self.most_bytes = threading.Lock(), 0, 0, 0, 0

    def plan(self, number: int, size: int):
        def value() -> tuple[int, int]:
            with self.lock:
                self.held, self.held_bytes = self.held + 1, self.held_bytes + size
                self.most, self.most_bytes = max(self.most, self.held), max(self.most_bytes, self.held_bytes)
            return number, size

        return value

    def take(self, size: int) -> None:
        with self.lock:
            self.held, self.held_bytes = self.held - 1, self.held_bytes - size


@pytest.mark.parametrize("sized", [False, True])
def test_values_come_in_order_and_few_wait(sized, monkeypatch):
    monkeypatch.setattr(threads, "BYTES_AHEAD", 1000)
    sizes = [random.choice((1, 90, 400, 5000)) for _ in range(300)]
    counted = Counted()
    plans = [counted.plan(number, size) for number, size in enumerate(sizes)]
    if sized:
        plans = [Sized(plan, size) for plan, size in zip(plans, sizes, strict=True)]
    found = []
    with ThreadPoolExecutor(4) as pool:
        for number, size in ahead(pool, plans, 16):
            found.append(number)
            counted.take(size)
    assert found == [*range(300)] and counted.most <= 17
    assert not sized or counted.most_bytes <= 1000 + 5000


def test_a_value_stands_for_itself_and_a_failure_comes_in_its_place():
    def fail() -> int:
        raise LookupError("this one")

    with ThreadPoolExecutor(2) as pool:
        values = ahead(pool, [7, lambda: 8, fail, 9], 4)
        assert (next(values), next(values)) == (7, 8)
        with pytest.raises(LookupError, match="this one"):
            next(values)
