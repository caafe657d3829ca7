# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Arrays arrive at the ranks that they are sent to, with equal bits, and no other rank gets a message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from models import parallel

from megatron_selfdistill.distributed.parcels import PARCEL_DTYPES, broadcast_in_replica, exchange_parcels
from megatron_selfdistill.distributed.ranks import initialize

# What each source sends to each rank: a cycle, a parcel to oneself, an empty one, and a rank that takes no part.
ROUTES = {(0, 1): 3, (1, 0): 0, (1, 2): 1, (2, 2): 2, (2, 0): 6}


def parcel(source: int, to: int, count: int) -> list[np.ndarray]:
    """Return ``count`` arrays of all dtypes and several lengths, 0 among them; those of no two pairs are equal."""
    generator = np.random.default_rng(10 * source + to)
    dtypes = [PARCEL_DTYPES[i % len(PARCEL_DTYPES)] for i in range(count)]
    sizes = [(5 * i * dtype.itemsize) // 3 * 8 // dtype.itemsize for i, dtype in enumerate(dtypes)]
    return [
        np.frombuffer(generator.bytes(size * dtype.itemsize), dtype)[::2]
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]


def described(arrays: list[np.ndarray]) -> list[tuple[str, bytes]]:
    return [(str(array.dtype), array.tobytes()) for array in arrays]


def exchanged() -> tuple[dict[int, list[tuple[str, bytes]]], list[int]]:
    """Return what this rank gets, and the ranks to which it has sent messages."""
    grid = initialize(parallel(), seed=1)
    outgoing = {to: parcel(source, to, n) for (source, to), n in ROUTES.items() if source == grid.rank}
    sources = [source for source, to in ROUTES if to == grid.rank]
    sent: list[int] = []
    original = dist.batch_isend_irecv

    def counted(batch: list[dist.P2POp]) -> Any:
        sent.extend(message.peer for message in batch if message.op is dist.isend)
        return original(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        received = exchange_parcels(outgoing, sources, grid.device)
    return {source: described(arrays) for source, arrays in received.items()}, sorted(sent)


def test_each_rank_gets_equal_bits_of_what_was_sent_to_it_and_no_message_else(ranks):
    results = ranks.run(exchanged, world_size=4)
    for rank, (received, _) in enumerate(results):
        wanted = {source: described(parcel(source, to, n)) for (source, to), n in ROUTES.items() if to == rank}
        assert received == wanted
    assert [sent for _, sent in results] == [[1, 1], [0, 2, 2], [0, 0], []]  # a size, and bytes where there are any


def refused() -> list[str]:
    grid = initialize(parallel(), seed=1)
    messages = []
    for array in (np.zeros(2, np.float16), np.zeros((2, 2), np.int32)):
        for work in (
            lambda a=array: exchange_parcels({0: [a]} if grid.rank == 1 else {}, [1][grid.rank :], grid.device),
            lambda a=array: broadcast_in_replica([a] if grid.rank == 1 else [], grid),
        ):
            with pytest.raises(ValueError, match="rank 1: expected arrays of one dimension") as caught:
                work()
            messages.append(str(caught.value))
    return messages


def test_an_array_that_cannot_travel_is_an_error_on_all_ranks_before_any_message(ranks):
    first, second = ranks.run(refused, world_size=2)
    assert first == second and len(first) == 4


def broadcasts(layout: dict[str, int]) -> tuple[int, int, bool, list[list[tuple[str, bytes]]]]:
    grid = initialize(parallel(**layout), seed=1)
    firsts = [grid.first_rank_of(replica) for replica in range(grid.dp_size)]
    results = [
        described(broadcast_in_replica(parcel(grid.rank, 0, count), grid))  # each rank has other arrays
        for count in (0, 7)
    ]
    return grid.dp_rank, firsts[grid.dp_rank], grid.is_first_of_replica, results


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2}])
def test_all_ranks_of_a_replica_get_the_arrays_of_its_first_rank(ranks, layout):
    results = ranks.run(broadcasts, layout, world_size=4)
    assert [rank for rank, (*_, is_first, _) in enumerate(results) if is_first] == sorted({r[1] for r in results})
    for _, first, _, received in results:
        assert received == [[], described(parcel(first, 0, 7))]


@pytest.mark.full
def test_all_ranks_of_a_replica_of_three_axes_get_the_arrays_of_its_first_rank(ranks):
    for _, first, _, received in ranks.run(broadcasts, {"tp": 2, "pp": 2, "cp": 2}, world_size=8):
        assert received == [[], described(parcel(first, 0, 7))]
