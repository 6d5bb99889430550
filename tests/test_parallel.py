"""What a launcher may ask for; sums over ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import parallel
from dpo_fast.errors import BadInput


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_what_a_launcher_asks_for_and_nothing_heeds_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInput, match=rf"{variable}={value}\), which has no effect here"):
        parallel.start("none")
    monkeypatch.setenv(variable, "no" if "DYNAMO" in variable else "1" if "STEPS" in variable else "false")
    parallel.start("none")


LAST = torch.channels_last
SHAPES = [(6, 4, 3, 3), (5, 7), (8, 4, 1, 1), (1, 3, 3, 3), (9,), (3, 1, 2, 5), ()]


class Noted(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def in_order(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor


def random(seed: int, layout: torch.memory_format = torch.contiguous_format) -> list[torch.Tensor]:
    """A tensor of each shape, the same numbers in every layout."""
    generator = torch.Generator().manual_seed(seed)
    return [in_order(torch.randn(shape, generator=generator), layout) for shape in SHAPES]


def ranks_of_two(rank: int) -> parallel.Ranks:
    return parallel.Ranks(None, rank, 2, torch.device("cpu"), None)


@pytest.fixture
def two_ranks(monkeypatch):
    """Runs a function of a rank's Ranks on both of two ranks, threads over gloo; its two results in their order."""
    mine = threading.local()
    monkeypatch.setattr(dist, "all_reduce", lambda x: mine.group.allreduce([x]).wait())
    monkeypatch.setattr(dist, "broadcast", lambda x, src: mine.group.broadcast(x, src).wait())

    def run(work):
        store, barrier, values = dist.HashStore(), threading.Barrier(2, timeout=60), [None, None]

        def gather(value):
            values[mine.rank] = value
            barrier.wait()
            return values

        def of_rank(rank):
            mine.rank, mine.group = rank, dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
            ranks = ranks_of_two(rank)
            ranks.gather = gather
            return work(ranks)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(of_rank, (0, 1)))

    return run


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_gradients_that_lie_as_their_parameters_are_summed_without_a_transposition(monkeypatch, seed, layout):
    """The bucket is the memory of the gradients, end to end, and nothing but the bucket is copied."""
    gradients, parameters = random(seed, layout), random(seed + 1, layout)
    memory = torch.cat([g.as_strided((g.numel(),), (1,)) for g in gradients])
    expected = [2 * g for g in gradients]
    flats = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flats.append(flat.clone()) or flat.mul_(2))
    with Noted() as noted:
        ranks_of_two(0).sum_(gradients, like=parameters)
    assert torch.equal(flats[0], memory) and len(flats) == 1
    copies = [name for name in noted.names if name not in ("permute", "view", "_unsafe_view", "split_with_sizes")]
    assert copies == ["cat", "clone", "mul_", "_foreach_copy_"]  # clone and mul_ are of the all_reduce above
    assert all(map(torch.equal, gradients, expected))


def test_ranks_whose_gradients_lie_differently_are_summed_number_by_number(two_ranks, monkeypatch, seed):
    """What autograd makes of strides may differ between ranks; buckets follow the parameters, which do not."""
    monkeypatch.setattr(parallel, "BUCKET_ELEMENTS", 200)  # several buckets, and one tensor larger than a bucket
    layouts = {0: LAST, 1: torch.contiguous_format}

    def work(ranks):
        gradients = random(seed + ranks.rank, layouts[ranks.rank])
        ranks.sum_(gradients, like=random(0, LAST))
        return gradients

    expected = [a + b for a, b in zip(random(seed), random(seed + 1), strict=True)]
    for found, layout in zip(two_ranks(work), layouts.values(), strict=True):
        assert all(map(torch.equal, found, expected))
        assert [t.stride() for t in found] == [t.stride() for t in random(0, layout)]


def test_without_like_sums_go_by_index(two_ranks, seed):
    def work(ranks):
        tensors = random(seed + ranks.rank, LAST if ranks.rank else torch.contiguous_format)
        ranks.sum_(tensors)
        return tensors

    expected = [a + b for a, b in zip(random(seed), random(seed + 1), strict=True)]
    for found in two_ranks(work):
        assert all(map(torch.equal, found, expected))


def test_weights_in_another_memory_order_are_not_broadcast(two_ranks, seed):
    def same(ranks):
        weights = random(seed + ranks.rank, LAST)
        ranks.broadcast_(weights)
        return weights

    for found in two_ranks(same):
        assert all(map(torch.equal, found, random(seed)))

    def different(ranks):
        with pytest.raises(RuntimeError, match="rank 1 does not hold the weights in the shapes and memory order of"):
            ranks.broadcast_(random(seed, LAST if ranks.rank else torch.contiguous_format))

    two_ranks(different)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_a_dense_tensor_in_its_memory_order_is_contiguous(layout):
    for tensor in random(0, layout):
        assert tensor.permute(parallel.memory_order(tensor)).is_contiguous()
    one = torch.empty(8, 4, 1, 1)  # the strides of its last two dimensions mean nothing, and may be anything
    assert parallel.memory_order(one) == parallel.memory_order(one.as_strided(one.shape, (4, 1, 9, 7))) == [2, 3, 0, 1]
    odd = torch.empty(4, 5, 6).permute(2, 0, 1)
    assert parallel.memory_order(odd) == [1, 2, 0]


@pytest.mark.parametrize("name", ["allow_tf32", "fp32_precision"])
def test_tf32_is_what_it_was_once_a_run_is_over(name):
    """PyTorch has two names for it, and refuses to read the older one once the newer has been set."""
    part = torch.backends.cuda.matmul
    value = {"allow_tf32": True, "fp32_precision": "tf32"}[name]
    before = part.allow_tf32
    try:
        setattr(part, name, value)
        with parallel.joined("none"):
            parallel.allow_tf32(False)
        assert getattr(part, name) == value
    finally:
        part.allow_tf32 = before
    assert part.allow_tf32 == before


def test_the_generators_of_the_user_s_are_left():
    torch.manual_seed(1)
    with parallel.joined("none"):
        torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


def test_a_run_that_cannot_start_leaves_the_process_as_it_was(monkeypatch):
    states = [{**kind._shared_state} for kind in parallel.STATES]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(RuntimeError, match="2 processes were launched but 1 joined"):
        parallel.start("none")
    assert [{**kind._shared_state} for kind in parallel.STATES] == states
