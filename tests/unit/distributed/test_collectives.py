# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Values that travel between ranks, and errors that every rank raises alike."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from models import parallel

from megatron_selfdistill.distributed import collectives
from megatron_selfdistill.distributed.collectives import (
    broadcast_object,
    gather_items,
    gather_objects,
    raise_on_all_ranks,
    run_long_on_rank_0,
    run_on_each_rank,
    run_on_rank_0,
)
from megatron_selfdistill.distributed.integers import max_over_ranks, min_over_ranks
from megatron_selfdistill.distributed.parcels import broadcast_in_replica, exchange_parcels
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError


def gathered() -> list[Any]:
    rank = dist.get_rank()
    values = [gather_objects(f"rank {rank}"), gather_items(["x"] * rank), broadcast_object(("from", rank))]
    return [*values, max_over_ranks([rank, -rank]), min_over_ranks([rank, -rank])]


def test_every_rank_gets_the_values_of_all_ranks_in_their_order(ranks):
    expected = [["rank 0", "rank 1", "rank 2"], ["x"] * 3, ("from", 0), [2, 0], [0, -2]]
    assert ranks.run(gathered, world_size=3) == [expected] * 3


Errors = list[Exception | None]


def raised(cases: list[Errors]) -> list[tuple[str, str] | None]:
    """Return the type and the message that this rank raises where rank i meets item i of each case in its block."""
    found: list[tuple[str, str] | None] = []
    for errors in cases:
        own = errors[dist.get_rank()]
        try:
            with raise_on_all_ranks(EngineError):
                if own is not None:
                    raise own
            found.append(None)
        except Exception as error:
            assert error.__cause__ is own
            found.append((type(error).__name__, str(error)))
        assert max_over_ranks([1]) == [1], "all ranks have left the block, so the next collective meets"
    return found


RAISED: list[tuple[Errors, tuple[str, str] | None]] = [
    ([None, None, None], None),
    ([None, EngineError("gone"), None], ("EngineError", "rank 1: gone")),
    ([CheckpointError("no such file")] * 3, ("CheckpointError", "no such file")),
    ([ConfigError("first"), ValueError("second"), None], ("ConfigError", "rank 0: first; rank 1: second")),
    ([ValueError("no room"), None, None], ("ValueError", "rank 0: no room")),
    ([None, KeyError("x"), None], ("EngineError", "rank 1: KeyError: 'x'")),
    ([None, UnicodeDecodeError("utf-8", b"", 0, 1, "y"), None], ("EngineError", "rank 1: UnicodeDecodeError: ")),
    ([EngineError("a"), *[EngineError("b")] * 2], ("EngineError", "rank 0: a; ranks 1, 2: b")),
]


def test_what_one_rank_raises_all_ranks_raise(ranks):
    for found in ranks.run(raised, [errors for errors, _ in RAISED], world_size=3):
        for one, (_, expected) in zip(found, RAISED, strict=True):
            assert one == expected or (one[0] == expected[0] and one[1].startswith(expected[1])), one


def fails(error: BaseException) -> Any:
    raise error


def results() -> tuple[Any, Any, str]:
    rank = dist.get_rank()
    for run in (run_on_rank_0, run_long_on_rank_0, run_on_each_rank):
        with pytest.raises(CheckpointError, match=r"^what to do$"):
            run(partial(fails, CheckpointError("what to do")))
    with pytest.raises(EngineError) as caught:
        run_long_on_rank_0(partial(fails, SystemExit(3)), EngineError)
    return run_on_rank_0(lambda: f"of {rank}"), run_on_each_rank(lambda: f"of {rank}"), str(caught.value)


def test_rank_0s_result_reaches_every_rank_and_each_ranks_own_stays_there_also_after_a_thread_that_exits(ranks):
    assert ranks.run(results, world_size=2) == [(*of, "SystemExit: 3") for of in (("of 0", "of 0"), ("of 0", "of 1"))]


def run_long(meetings: int) -> tuple[Any, int]:
    """Return the result of work that ends after so many ``meetings``, and the number of broadcasts of the ranks."""
    rank, met = dist.get_rank(), []
    original = dist.broadcast

    def counted(*args: Any, **kwargs: Any) -> Any:
        met.append(1)
        return original(*args, **kwargs)

    def work() -> str:
        assert rank == 0
        while len(met) < meetings:
            time.sleep(0.01)
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_HEARTBEAT_SECONDS", 0.02)
        patch.setattr(dist, "broadcast", counted)
        return run_long_on_rank_0(work), len(met)


def test_work_of_rank_0_may_take_longer_than_a_collective_may_wait(ranks):
    first, second = ranks.run(run_long, 4, world_size=2)
    assert (first[0], second[0]) == ("done", None)
    assert first[1] == second[1] >= 4


# What each source sends to each rank: a cycle, a parcel to oneself, an empty one, and a rank that takes no part.
ROUTES = {(0, 1): 3, (1, 0): 0, (1, 2): 1, (2, 2): 2, (2, 0): 6}


def parcel(source: int, to: int, count: int) -> list[np.ndarray]:
    """Return ``count`` arrays of all dtypes and several lengths, 0 among them; those of no two pairs are equal."""
    generator = np.random.default_rng(10 * source + to)
    known = [np.dtype(name) for name in ("uint8", "int32", "int64", "uint64", "float32", "float64")]
    dtypes = [known[i % len(known)] for i in range(count)]
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
    assert [sent for _, sent in results] == [[1, 1], [0, 0, 2, 2], [0, 0], []], "a size, and bytes"


def broadcasts(layout: dict[str, int]) -> tuple[int, int, bool, list[list[tuple[str, bytes]]]]:
    grid = initialize(parallel(**layout), seed=1)
    firsts = [grid.first_rank_of(replica) for replica in range(grid.dp_size)]
    results = [
        described(broadcast_in_replica(parcel(grid.rank, 0, count), grid))  # each rank has other arrays
        for count in (0, 7)
    ]
    return grid.dp_rank, firsts[grid.dp_rank], grid.is_first_of_replica, results


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        *(({axis: 2}, 4) for axis in ("tp", "pp", "cp")),
        *(pytest.param({"tp": 2, axis: 2}, 4, marks=pytest.mark.full) for axis in ("pp", "cp")),
        pytest.param({"tp": 2, "pp": 2, "cp": 2}, 8, marks=pytest.mark.full),
    ],
)
def test_all_ranks_of_a_replica_get_the_arrays_of_its_first_rank(ranks, layout, world_size):
    results = ranks.run(broadcasts, layout, world_size=world_size)
    assert [rank for rank, (*_, is_first, _) in enumerate(results) if is_first] == sorted({r[1] for r in results})
    for _, first, _, received in results:
        assert received == [[], described(parcel(first, 0, 7))]
