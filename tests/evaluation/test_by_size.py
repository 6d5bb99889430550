"""Batches of one size: every image once, full where they can be, and few that wait."""

import random

import torch

from dpo_fast.evaluation.by_size import WAITING, batches_by_size


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


def test_of_many_sizes_few_wait():
    batch, read, most = random.randint(1, 9), 0, 0
    sizes = [*range(1, 300), 1000, 1000, *range(300, 600)]  # one size is there twice

    def reading():
        nonlocal read
        for item in given(sizes):
            read += 1
            yield item

    done, lengths = 0, []
    for part in batches_by_size(reading(), lambda item: item[1], batch):
        most = max(most, read - done)
        done += len(part)
        lengths.append(len(part))
    assert done == len(sizes) == read and most == WAITING * batch + 1
    if batch > 2:
        assert sorted(lengths)[-2:] == [1, 2]  # the fullest goes, not the first
