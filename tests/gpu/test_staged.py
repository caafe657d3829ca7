# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The staged backend does what plain gloo does, in every collective, at once and asynchronously."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

WORLD_SIZE = 3


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return small whole numbers, another tensor on each rank; sums of them are exact in every order."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def all_reduce(group: Any, dtype: torch.dtype = torch.float32, op: Any = dist.ReduceOp.SUM) -> list[Tensor]:
    tensor = numbers(4, 6, dtype=dtype)
    dist.all_reduce(tensor, op=op, group=group)
    return [tensor]


def all_reduce_maximum(group: Any) -> list[Tensor]:
    return all_reduce(group, op=dist.ReduceOp.MAX)


def all_reduce_bf16(group: Any) -> list[Tensor]:
    return all_reduce(group, dtype=torch.bfloat16)


def all_reduce_int64(group: Any) -> list[Tensor]:
    return all_reduce(group, dtype=torch.int64)


def all_reduce_later(group: Any) -> list[Tensor]:
    tensors = [numbers(5, seed=seed) for seed in range(3)]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all(work.is_completed() for work in works)
    return tensors


def all_reduce_coalesced(group: Any) -> list[Tensor]:
    tensors = [numbers(size, seed=size) for size in (1, 7, 4)]
    with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    manager.wait()
    return tensors


def reduce_scatter_coalesced(group: Any) -> list[Tensor]:
    outputs = [torch.zeros(2), torch.zeros(3)]
    with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as manager:
        for output in outputs:
            dist.reduce_scatter_tensor(output, numbers(WORLD_SIZE * output.numel()), group=group)
    manager.wait()
    return outputs


def all_gather_coalesced(group: Any) -> list[Tensor]:
    outputs = [torch.zeros(WORLD_SIZE * 2), torch.zeros(WORLD_SIZE * 3)]
    with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as manager:
        for output in outputs:
            dist.all_gather_into_tensor(output, numbers(output.numel() // WORLD_SIZE), group=group)
    manager.wait()
    return outputs


def all_gather(group: Any) -> list[Tensor]:
    outputs = [torch.zeros(2, 3) for _ in range(WORLD_SIZE)]
    dist.all_gather(outputs, numbers(2, 3), group=group)
    return outputs


def all_gather_into_tensor(group: Any) -> list[Tensor]:
    output = torch.zeros(2 * WORLD_SIZE, 3)
    work = dist.all_gather_into_tensor(output, numbers(2, 3), group=group, async_op=True)
    work.wait()
    return [output]


def reduce_scatter_tensor(group: Any) -> list[Tensor]:
    output = torch.zeros(2, 3)
    dist.reduce_scatter_tensor(output, numbers(2 * WORLD_SIZE, 3), group=group)
    return [output]


def reduce_scatter(group: Any) -> list[Tensor]:
    output = torch.zeros(4)
    dist.reduce_scatter(output, [numbers(4, seed=seed) for seed in range(WORLD_SIZE)], group=group)
    return [output]


def broadcast(group: Any) -> list[Tensor]:
    tensor = numbers(4)
    dist.broadcast(tensor, 1, group=group)
    return [tensor]


def reduce(group: Any) -> list[Tensor]:
    tensor = numbers(4)
    dist.reduce(tensor, 2, group=group)
    return [tensor] if dist.get_rank() == 2 else []


def all_to_all(group: Any) -> list[Tensor]:
    rank = dist.get_rank()
    sent = numbers(sum(range(1, WORLD_SIZE + 1)), 2)
    output = torch.zeros(WORLD_SIZE * (rank + 1), 2)
    dist.all_to_all_single(output, sent, [rank + 1] * WORLD_SIZE, list(range(1, WORLD_SIZE + 1)), group=group)
    even = torch.zeros(2 * WORLD_SIZE)
    dist.all_to_all_single(even, numbers(2 * WORLD_SIZE), group=group)
    return [output, even]


def gather_and_scatter(group: Any) -> list[Tensor]:
    first = dist.get_rank() == 0
    gathered = [torch.zeros(3) for _ in range(WORLD_SIZE)] if first else None
    dist.gather(numbers(3), gathered, 0, group=group)
    scattered = torch.zeros(3)
    dist.scatter(scattered, [numbers(3, seed=seed) for seed in range(WORLD_SIZE)] if first else None, 0, group=group)
    return [*(gathered or []), scattered]


def ring(group: Any) -> list[Tensor]:
    """Let every rank send to both neighbours in one batch; no rank waits for its sends."""
    rank = dist.get_rank()
    after, before = (rank + 1) % WORLD_SIZE, (rank - 1) % WORLD_SIZE
    one, other = torch.zeros(4), torch.zeros(2)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, numbers(4), after, group),
            dist.P2POp(dist.irecv, one, before, group),
            dist.P2POp(dist.isend, numbers(2, seed=1), before, group),
            dist.P2POp(dist.irecv, other, after, group),
        ]
    )
    works[1].wait()
    works[3].wait()
    dist.barrier(group=group)
    return [one, other]


def send_and_receive(group: Any) -> list[Tensor]:
    tensor, rank = numbers(4), dist.get_rank()
    if rank == 0:
        dist.send(tensor, 2, group=group)
    if rank == 2:
        dist.recv(tensor, 0, group=group)
    return [tensor]


def objects(group: Any) -> list[Tensor]:
    found: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(found, {"rank": dist.get_rank()}, group=group)
    objects = [dist.get_rank() + 5]
    dist.broadcast_object_list(objects, src=1, group=group)
    return [torch.tensor([one["rank"] for one in found] + objects)]


COLLECTIVES: dict[str, Callable[[Any], list[Tensor]]] = {
    work.__name__: work
    for work in (
        *(all_reduce, all_reduce_maximum, all_reduce_bf16, all_reduce_int64, all_reduce_later, all_reduce_coalesced),
        *(reduce_scatter_coalesced, all_gather_coalesced, all_gather, all_gather_into_tensor, reduce_scatter_tensor),
        *(reduce_scatter, broadcast, reduce, all_to_all, gather_and_scatter, ring, send_and_receive, objects),
    )
}


def both() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    from tests.gpu import staged

    group = dist.new_group(backend=staged.NAME)
    assert dist.get_backend(group) == staged.NAME and isinstance(group, staged.StagedGroup)
    return {name: (work(group), work(dist.group.WORLD)) for name, work in COLLECTIVES.items()}


@pytest.fixture(scope="module")
def found(ranks) -> list[dict[str, tuple[list[Tensor], list[Tensor]]]]:
    return ranks.run(both, world_size=WORLD_SIZE)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_gives_what_gloo_gives(found, name):
    for rank, by_name in enumerate(found):
        staged, plain = by_name[name]
        assert len(staged) == len(plain) and all(map(torch.equal, staged, plain)), (rank, staged, plain)
    assert any(tensor.any() for by_name in found for tensor in by_name[name][0]), "nothing was moved"


def what_gloo_lacks() -> list[Tensor]:
    """Averages, booleans, lists of tensors of different sizes, and results that are there after ``wait`` only."""
    from tests.gpu import staged

    group, rank = dist.new_group(backend=staged.NAME), dist.get_rank()
    mean = torch.tensor([3.0 * rank, 6.0])
    group.allreduce([mean], _options(dist.ReduceOp.AVG)).wait()
    flags = torch.tensor([rank == 1, False])
    dist.broadcast(flags, 1, group=group)
    uneven = [torch.zeros(size + 1) for size in range(WORLD_SIZE)]
    work = group.allgather([uneven], [torch.full((rank + 1,), float(rank + 1))])
    early = sum(float(tensor.sum()) for tensor in uneven)
    work.wait()
    lists = [torch.zeros(2) for _ in range(WORLD_SIZE)]
    group.alltoall(lists, [torch.full((2,), float(10 * rank + to)) for to in range(WORLD_SIZE)]).wait()
    return [mean, flags, torch.tensor(early), torch.cat(uneven), torch.cat(lists)]


def _options(op: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


def test_it_has_what_nccl_has_and_gloo_lacks(ranks):
    for rank, (mean, flags, early, uneven, lists) in enumerate(ranks.run(what_gloo_lacks, world_size=WORLD_SIZE)):
        assert mean.tolist() == [3.0, 6.0] and flags.tolist() == [True, False]
        assert early == 0, "the result is there before anybody has waited for it"
        assert uneven.tolist() == [1, 2, 2, 3, 3, 3]
        assert lists.tolist() == [float(10 * source + rank) for source in range(WORLD_SIZE) for _ in range(2)]
