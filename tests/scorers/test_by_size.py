"""Batches of one size: every image once, full where they can be, and few that wait."""

import random

import torch

from dpo_fast.scorers import by_size
from dpo_fast.scorers.by_size import WAITING, batches_by_size


def given(sizes: list[int]) -> list[tuple[int, torch.Size]]:
    return [(number, torch.Size((3, side, side))) for number, side in enumerate(sizes)]


def test_every_image_once_in_its_order_and_full_batches():
    batch, sizes = random.randint(2, 9), [random.choice((3, 3, 3, 5, 8)) for _ in range(200)]
    items = given(sizes)
    found = list(batches_by_size(items, lambda item: item[1], batch))
    assert sorted(item for part in found for item in part) == items
    assert all(len({size for _, size in part}) == 1 and part == sorted(part) for part in found)
    short = [part for part in found if len(part) < batch]
    assert max(map(len, found)) == batch and len(short) <= 3  # what is left over, a size each
    assert found == list(batches_by_size(items, lambda item: item[1], batch))


def test_of_many_sizes_few_wait_and_a_frequent_one_still_fills_batches():
    batch, read, done, most = random.randint(1, 9), 0, 0, 0
    sizes = [1000 if k % 2 else k + 1 for k in range(20 * batch)]  # every second of a size of its own

    def reading():
        nonlocal read
        for item in given(sizes):
            read += 1
            yield item

    frequent = []
    for part in batches_by_size(reading(), lambda item: item[1], batch):
        most = max(most, read - done)
        done += len(part)
        if part[0][1][1] == 1000:
            frequent.append(len(part))
    assert done == len(sizes) == read and frequent == [batch] * 10
    assert most <= WAITING * batch + 1 < len(sizes)


def test_large_images_do_not_wait_for_a_full_batch(monkeypatch):
    monkeypatch.setattr(by_size, "BYTES", 1 << 20)
    batch, sizes = 8, [random.choice((200, 300, 400)) for _ in range(60)]
    held, most = 0, 0

    def reading():
        nonlocal held, most
        for item in given(sizes):
            held += item[1].numel()
            most = max(most, held)
            yield item

    found = []
    for part in by_size.batches_by_size(reading(), lambda item: item[1], batch):
        held -= sum(size.numel() for _, size in part)
        found += part
    assert sorted(found) == given(sizes) and most <= by_size.BYTES + 3 * 400 * 400  # the newest
